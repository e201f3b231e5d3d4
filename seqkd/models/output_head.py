"""Output heads, what is known of a teacher, and how many logits are formed and read at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqkd.errors import ModelError
from seqkd.models.loading import (
    dtype_of,
    expand,
    generation_config,
    load_config,
    load_tokenizer,
    save_generation_config,
)
from seqkd.models.weight_files import _safetensors_index

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""Logits that one product with a head forms, [chunk, V]: enough rows to be fast, and few enough
chunks that adding each one's [V, H] gradient costs little."""
BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
"""Of those, what is read at a time: some thirty operations, each of which reads and writes a tensor
of this size. On a CPU they stay in its cache; a GPU runs them as one. More where a prompt's samples
at one position are: those are read together."""


def chunk_rows(weight: Tensor) -> int:
    """How many states one product with ``weight`` ([V, H]) is of."""
    return max(1, CHUNK_ELEMENTS[weight.device.type] // weight.shape[0])


def block_rows(weight: Tensor) -> int:
    """How many states' logits are read at a time."""
    return max(1, min(chunk_rows(weight), BLOCK_ELEMENTS[weight.device.type] // weight.shape[0]))


def blocks_of(count: int, weight: Tensor) -> list[Tensor]:
    """The indices of ``count`` states, block by block."""
    blocks = torch.arange(count, device=weight.device).split(block_rows(weight))
    return list(blocks) if count else []


def chunks_of(blocks: Sequence[Tensor], weight: Tensor) -> Iterator[list[Tensor]]:
    """As many consecutive blocks as one product is of, one at least."""
    chunk: list[Tensor] = []
    for block in blocks:
        if chunk and sum(map(len, chunk)) + len(block) > chunk_rows(weight):
            yield chunk
            chunk = []
        chunk.append(block)
    if chunk:
        yield chunk


@dataclass(frozen=True)
class OutputHead:
    """The map from the last hidden state to logits: ``softcap(scale * (W h + b))``."""

    weight: Tensor
    """[V, H]"""
    bias: Tensor | None = None
    """[V]"""
    scale: float = 1.0
    softcap: float | None = None

    def first(self, rows: int) -> OutputHead:
        """The same for the first ``rows`` tokens alone."""
        bias = None if self.bias is None else self.bias[:rows]
        return OutputHead(self.weight[:rows], bias, self.scale, self.softcap)

    def raw(self, hidden: Tensor, room: Tensor | None = None) -> Tensor:
        """[n, H] -> [n, V] W h, in the weight's precision; in the first rows of ``room`` where
        there is one."""
        into = None if room is None else room[: len(hidden)]
        return torch.mm(hidden.to(self.weight), self.weight.T, out=into)

    def room(self, count: int) -> Tensor:
        """[chunk, V], nothing in it, for one product after the other over ``count`` states: for new
        ones the kernel would clear pages every time."""
        return self.weight.new_empty(min(count, chunk_rows(self.weight)), len(self.weight))

    def finish(self, raw: Tensor) -> Tensor:
        """[n, V] W h -> the logits, float32."""
        raw = raw.float() if self.bias is None else raw.float() + self.bias.float()
        logits = raw * self.scale if self.scale != 1.0 else raw
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    @torch.no_grad()
    def logprobs(
        self, hidden: Tensor, targets: Tensor, top_k: int = 0
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """[n, H], [n] -> [n] float32 log-probability of each target, and with ``top_k`` what
        :func:`top_teacher` makes of each distribution."""
        chosen = hidden.new_empty(len(hidden), dtype=torch.float32)
        ids = torch.empty(len(hidden), top_k, dtype=torch.int32, device=hidden.device)
        top = chosen.new_empty(len(hidden), top_k + 1)
        room = self.room(len(hidden))
        for chunk in chunks_of(blocks_of(len(hidden), self.weight), self.weight):
            formed = self.raw(hidden[torch.cat(chunk)], room).split(list(map(len, chunk)))
            for rows, raw in zip(chunk, formed, strict=True):
                logprobs = torch.log_softmax(self.finish(raw), -1)
                chosen[rows] = gather(logprobs, targets[rows])
                if top_k:
                    ids[rows], top[rows] = top_teacher(logprobs, top_k)
        return (chosen, ids, top) if top_k else (chosen, None, None)


def top_teacher(logprobs: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """[N, V] log-probs -> ([N, k] int32, [N, k + 1]): the k largest, and the rest as one event."""
    values, ids = logprobs.topk(k)
    rest = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return ids.to(torch.int32), torch.cat([values, rest], -1)


def gather(logprobs: Tensor, targets: Tensor) -> Tensor:
    """[n, V], [n] -> [n] those of the targets."""
    return logprobs.gather(-1, targets[:, None]).squeeze(-1)


def head_of(model: nn.Module) -> OutputHead:
    """The output head of a loaded model, sharing its tensors."""
    layer: Any = model.get_output_embeddings()  # type: ignore[operator]
    return OutputHead(layer.weight, getattr(layer, "bias", None), **_logit_options(model.config))


def load_head(model: str, precision: str) -> OutputHead:
    """Only the output head of a checkpoint: the teacher's, frozen, for the learner."""
    from safetensors import safe_open
    from transformers.utils.hub import cached_file

    config = load_config(model, "teacher.model")
    files = _safetensors_index(expand(model), cached_file)
    # A tied checkpoint stores the matrix once, under the name of the embedding.
    ends = ("lm_head.weight", *(("embed_tokens.weight",) if config.tie_word_embeddings else ()))
    name = next((n for end in ends for n in files if n.endswith(end)), None)
    if name is None:
        raise ModelError(
            f"teacher.model: {model!r} has no {' or '.join(ends)} in its safetensors files. Set "
            "teacher.kind to hf and teacher.scores to logprobs."
        )
    bias_name = name.removesuffix("weight") + "bias"
    tensors = {}
    for wanted in (name, bias_name):
        if wanted in files:
            with safe_open(files[wanted], framework="pt") as reader:
                tensors[wanted] = reader.get_tensor(wanted).to(dtype_of(precision))
    return OutputHead(tensors[name], tensors.get(bias_name), **_logit_options(config))


def export_head(model: str, precision: str, directory: Path) -> None:
    """Write a model directory with configuration, tokenizer and the output head alone: what the
    learner and the checks read of a teacher."""
    from safetensors.torch import save_file
    from transformers import AutoConfig

    AutoConfig.from_pretrained(expand(model)).save_pretrained(directory)
    load_tokenizer(model, "teacher.model").save_pretrained(directory)
    if (generation := generation_config(model)) is not None:
        save_generation_config(generation, directory)
    head = load_head(model, precision)
    tensors = {"lm_head.weight": head.weight}
    if head.bias is not None:
        tensors["lm_head.bias"] = head.bias
    save_file(tensors, directory / "model.safetensors", {"format": "pt"})


def _logit_options(config: Any) -> dict[str, Any]:
    """What model families do to their logits after the matrix (Cohere, Granite, Gemma)."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return {
        "scale": float(scale) if scale else 1.0 / float(divisor) if divisor else 1.0,
        "softcap": getattr(config, "final_logit_softcapping", None),
    }
