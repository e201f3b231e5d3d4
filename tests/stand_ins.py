"""Small stand-ins for the models and data sets of the recipes: models with their published
configurations and almost no weights, rows in the published columns, an endpoint and a teacher
cache."""

from __future__ import annotations

import io
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from safetensors.torch import save
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers

FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "tie_word_embeddings",
    "max_position_embeddings",
)
QWEN = {
    "Qwen/Qwen2.5-1.5B-Instruct": (1536, 8960, 28, 12, 2, 151936, True, 32768),
    "Qwen/Qwen2.5-7B-Instruct": (3584, 18944, 28, 28, 4, 152064, False, 32768),
    "Qwen/Qwen2.5-72B-Instruct": (8192, 29568, 80, 64, 8, 152064, False, 32768),
    "Qwen/Qwen3-1.7B": (2048, 6144, 28, 16, 8, 151936, True, 40960),
    "Qwen/Qwen3-8B": (4096, 12288, 36, 32, 8, 151936, False, 40960),
}
"""Values of :data:`FIELDS` from the published config.json of each model."""
PARAMETERS = {
    "Qwen/Qwen2.5-1.5B-Instruct": 1_543_714_304,
    "Qwen/Qwen2.5-7B-Instruct": 7_615_616_512,
    "Qwen/Qwen2.5-72B-Instruct": 72_706_203_648,
    "Qwen/Qwen3-8B": 8_190_735_360,
}
"""Parameters in the safetensors files according to the hub. Qwen3-1.7B is not listed, because its
file also stores the tied head."""
SPECIAL = {151643: "<|endoftext|>", 151644: "<|im_start|>", 151645: "<|im_end|>"}
TURNS = (
    "{%- for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{%- endfor %}{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
)
TEMPLATES = {
    "qwen2": "{%- if messages[0].role != 'system' %}{{ '<|im_start|>system\nYou are Qwen, created "
    "by Alibaba Cloud. You are a helpful assistant.<|im_end|>\n' }}{%- endif %}"
    + TURNS + "{%- endif %}",
    "qwen3": TURNS + "{%- if enable_thinking is defined and enable_thinking is false %}"
    "{{ '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}",
}  # fmt: skip
"""Parts of the published chat templates that affect these prompts."""


def tokenizer(template):
    """Return the files of a byte-level tokenizer with the special tokens at their published ids."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate(alphabet)} | {v: k for k, v in SPECIAL.items()}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    built.normalizer = normalizers.NFC()
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL.values()])
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "chat_template": template,
    }
    return {"tokenizer.json": built.to_str().encode(), "tokenizer_config.json": as_json(described)}


def model(name):
    """Return the files of a model: configuration, generation config, tokenizer, and almost no
    weights."""
    kind = "qwen3" if "Qwen3" in name else "qwen2"
    config = dict(zip(FIELDS, QWEN[name], strict=True)) | {
        "model_type": kind,
        "architectures": [f"{kind.capitalize()}ForCausalLM"],
        "eos_token_id": 151645,
        "dtype": "bfloat16",
    }
    if kind == "qwen3":
        config["head_dim"] = 128
    ends = {"eos_token_id": [151645, 151643], "pad_token_id": 151643, "do_sample": True}
    return {
        "README.md": b"---\nlicense: apache-2.0\n---\n",
        "config.json": as_json(config),
        "generation_config.json": as_json(ends | {"temperature": 0.7, "top_p": 0.8, "top_k": 20}),
        "model.safetensors": save({"lm_head.weight": torch.zeros(2, 2)}),
    } | tokenizer(TEMPLATES[kind])


def data_sets():
    """Return the files of the data sets: a few rows in the published columns and layouts."""

    def chats(word, number):
        roles = ("user", "assistant") * 2
        turns = [[{"role": r, "content": f"{word} {i}"} for r in roles] for i in range(number)]
        return as_parquet([{"prompt": m[0]["content"], "messages": m} for m in turns])

    dolly = [
        {"instruction": f"name {i}", "context": "", "response": "a", "category": "open_qa"}
        for i in range(100)
    ]
    problems = [{"problem": f"1 + {i}", "answer": f"{i + 1}", "solution": ""} for i in range(400)]
    ultrachat = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n"
        "  - split: train_sft\n    path: data/train_sft-*\n"
        "  - split: test_sft\n    path: data/test_sft-*\n---\n"
    )
    fineweb = (
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: data/*/*\n- config_name: sample-10BT\n  data_files:\n  - split: train\n"
        "    path: sample/10BT/*\n---\n"
    )
    return {
        "HuggingFaceH4/ultrachat_200k": {
            "README.md": ultrachat.encode(),
            "data/train_sft-00000-of-00001.parquet": chats("why", 20),
            "data/test_sft-00000-of-00001.parquet": chats("how", 10),
        },
        "databricks/databricks-dolly-15k": {
            "databricks-dolly-15k.jsonl": b"".join(as_json(row) + b"\n" for row in dolly),
        },
        "HuggingFaceFW/fineweb": {
            "README.md": fineweb.encode(),
            "data/CC-MAIN-2013-20/000_00000.parquet": as_parquet([{"text": "another"}]),
            "sample/10BT/000_00000.parquet": as_parquet([{"text": f"page {i}"} for i in range(40)]),
        },
        "agentica-org/DeepScaleR-Preview-Dataset": {"deepscaler.json": as_json(problems)},
    }


def as_json(value):
    return json.dumps(value).encode()


def as_parquet(rows):
    buffer = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), buffer)
    return buffer.getvalue()


class Endpoint(BaseHTTPRequestHandler):
    """Endpoint with the responses that --dry-run needs: the list of models and token usage."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.reply({"data": [{"id": "mistralai/Mistral-Small-24B-Instruct-2501"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        read = 10 + len(body["messages"][-1]["content"])
        choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant"}}
        choice["message"]["content"] = "a"
        usage = {"prompt_tokens": read, "completion_tokens": 1, "total_tokens": read + 1}
        self.reply({"id": "x", "model": body["model"], "choices": [choice], "usage": usage})

    def reply(self, value):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(as_json(value))


@contextmanager
def endpoint() -> Iterator[str]:
    """Serve :class:`Endpoint` on a free port of localhost; yield the base URL."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1"
    finally:
        server.shutdown()
        server.server_close()


class Terse:
    """Teacher and sampler with completions of two tokens and constant scores."""

    def sample(self, prompts, samples, seed, temperature=1.0, top_p=1.0, finished=None):
        from seqkd.types import Rollout

        return [
            Rollout(p.prompt_id, f"{p.prompt_id}/{n}", p.token_ids, (65, 151645), (-1.0, -1.0),
                    "teacher", 0, "stop")
            for p, number in zip(prompts, samples, strict=True) for n in range(number)
        ]  # fmt: skip

    def score(self, rollouts):
        from seqkd.types import TeacherScore

        top = {
            "logprobs": torch.full((2,), -6.0),
            "top_ids": torch.arange(256, dtype=torch.int32).repeat(2, 1),
            "top_logprobs": torch.full((2, 257), 1 / 257).log(),
        }
        return {r.sample_id: TeacherScore(r.sample_id, **top) for r in rollouts}

    def usage(self):
        return {}


def record(file, overrides) -> None:
    """Write the teacher cache of a configuration as seqkd precompute does, with a :class:`Terse`
    teacher."""
    from seqkd.checks import preflight
    from seqkd.config import run
    from seqkd.teachers.cache import keep_teachers, open_caches, with_caches
    from seqkd.training import precompute
    from seqkd.workers import Workers

    read = run.load(file, overrides)
    checked = preflight.check(read)
    _, caches = open_caches(read, teacher_here=True)
    teacher = {"": Terse()}
    workers = Workers(None, None, teacher, teacher, read.teacher.choose, distribution=True)
    keep_teachers(read, caches)
    workers = with_caches(workers, read, checked.stop_ids, checked.vocabulary, caches)
    precompute.record(read, workers, checked, lambda steps, tokens: None)
