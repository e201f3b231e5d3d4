"""Output of ``seqkd inspect``, which marks the tokens that the loss is computed on."""

from __future__ import annotations

import json
import re
import sys

import pytest
import yaml
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from seqkd import console
from seqkd.cli.inspect_data import pieces
from seqkd.cli.main import main

MESSAGES = [
    {"role": "user", "content": "hé"},
    {"role": "assistant", "content": "one\n"},
    {"role": "user", "content": "go"},
    {"role": "assistant", "content": "two"},
]


@pytest.fixture
def inspect(tiny, tmp_path, capsys):
    """Function that returns exit code and output for a two-turn conversation and a corpus."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": MESSAGES, "kind": "chat"}) + "\n")
    (tmp_path / "texts.jsonl").write_text('{"text": "abcdef"}\n')
    config = {
        "name": "x",
        "student": {"model": tiny["student"]},
        "teacher": {"kind": "vllm", "model": tiny["teacher"]},
        "data": {
            "path": str(tmp_path / "rows.jsonl"),
            "corpus_path": str(tmp_path / "texts.jsonl"),
            "corpus_tokens": 4,
        },
        "evaluation": {"prompts": 0},
        "steps": 1,
    }
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(config))

    def run(*arguments):
        code = main(["inspect", str(tmp_path / "c.yaml"), *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def test_tokens_with_loss_are_in_brackets(inspect):
    code, out, _ = inspect("sampler=dataset", "data.tag_key=kind")
    first, second = out.split("\n\nsampler ")[1:]
    assert code == 0
    assert first == (
        "dataset: prompt 1 of 2, tag 'chat'\n"
        "<|user|>│h│é×2│<|end|>│<|assistant|>│[o][n][e][↵]\n[<|end|>]"
    )
    assert second.endswith(
        "<|user|>│h│é×2│<|end|>│<|assistant|>│o│n│e│↵│\n<|end|>│<|user|>│g│o│<|end|>│<|assistant|>│"
        "[t][w][o][<|end|>]\n"
    )


def test_the_header_has_counts_and_lengths(inspect):
    _, out, err = inspect("sampler=dataset", "rollout.max_tokens=4")
    header = out.split("\n\n")[0]
    assert "format messages (messages): 1 conversations, 1 prompts" in header
    assert "1 prompts dropped: their answers are longer than rollout.max_tokens = 4" in err
    assert re.search(r"answer tokens: +50 % 4 +90 % 4 +99 % 4 +max 4", header)


def test_the_place_of_a_sampled_completion_is_marked(inspect):
    _, out, _ = inspect("sampler=teacher", "-n", "1", "--row", "2")
    (shown,) = out.split("\n\n")[1:]
    assert shown.startswith("sampler teacher: prompt 2 of 2\n")
    assert shown.endswith("<|assistant|>│[<- the teacher writes here, at most 64 tokens]\n")


def test_a_corpus_has_loss_from_its_second_token(inspect):
    _, out, _ = inspect("sampler=corpus")
    assert "a│[b][c][d] (cut: no end of sequence)" in out
    assert "e│[f][<|end|>]\n" in out


def test_color_on_a_terminal(inspect, monkeypatch):
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    _, out, _ = inspect("sampler=dataset", "--row", "2")
    green = re.findall(r"\033\[(?:1;)?32m(.*?)\033\[0m", out)
    assert green == ["t", "w", "o", "<|end|>"]
    monkeypatch.setenv("NO_COLOR", "1")
    console._console.cache_clear()
    assert "\033" not in inspect("sampler=dataset")[1]


def test_the_space_before_a_word_is_shown():
    """Also with tokenizers that drop the first space when decoding, such as SentencePiece's."""
    backend = Tokenizer(models.WordLevel({"▁a": 0, "▁b": 1}, unk_token="▁a"))
    backend.decoder = decoders.Metaspace(prepend_scheme="always")
    words = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert [text for _, text in pieces([0, 1, 0], [], words)] == ["a", " b", " a"]
    assert [text for _, text in pieces([1], [0], words)] == [" b"]


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("data.path=/none.jsonl", "error: data.path: /none.jsonl: no such file"),
        ("student.model=/none", "error: student.model: '/none' does not exist"),
        ("data.pth=x", "Did you mean 'path'"),
        ("--row=3", "error: --row: is 3, but there are 2 prompts"),
    ],
)
def test_an_error_is_one_message(inspect, argument, message):
    code, _, err = inspect(argument)
    assert code == 2
    assert message in err
    assert len(err.splitlines()) == 1
