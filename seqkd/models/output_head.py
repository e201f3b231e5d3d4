"""Output heads: logits and log-probs in chunks of limited memory, and loading of a teacher's
head."""

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
from seqkd.models.model_files import parameter_files

CHUNK_ELEMENTS = {"cpu": 2**24, "cuda": 2**27}
"""Number of logits, [chunk, V], per matrix product with a head. A chunk has enough rows to be fast.
There are few enough chunks that accumulating their [V, H] gradients is cheap."""
BLOCK_ELEMENTS = {"cpu": 2**20, "cuda": 2**27}
"""Number of logits of a chunk that are processed at a time, by some thirty operations that each
read and write a tensor of this size. On a CPU such a block stays in the cache. On a GPU the
operations are fused. A block is larger if the samples of a prompt at one position need it, because
they are processed together."""


def chunk_rows(weight: Tensor) -> int:
    """Return the number of states per matrix product with ``weight`` ([V, H])."""
    return max(1, CHUNK_ELEMENTS[weight.device.type] // weight.shape[0])


def block_rows(weight: Tensor) -> int:
    """Return the number of states whose logits are processed at a time."""
    return max(1, min(chunk_rows(weight), BLOCK_ELEMENTS[weight.device.type] // weight.shape[0]))


def blocks_of(count: int, weight: Tensor) -> list[Tensor]:
    """Split the indices of ``count`` states into blocks."""
    blocks = torch.arange(count, device=weight.device).split(block_rows(weight))
    return list(blocks) if count else []


def chunks_of(blocks: Sequence[Tensor], weight: Tensor) -> Iterator[list[Tensor]]:
    """Group consecutive blocks into chunks for one matrix product, with at least one block per
    chunk."""
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
    """[V, H] weight W."""
    bias: Tensor | None = None
    """[V] bias b."""
    scale: float = 1.0
    softcap: float | None = None

    def first(self, rows: int) -> OutputHead:
        """Return the output head of the first ``rows`` tokens of the vocabulary."""
        bias = None if self.bias is None else self.bias[:rows]
        return OutputHead(self.weight[:rows], bias, self.scale, self.softcap)

    def raw(self, hidden: Tensor, room: Tensor | None = None) -> Tensor:
        """Compute W h, [n, H] -> [n, V], in the weight's precision. If ``room`` is passed, the
        result is written into its first rows."""
        into = None if room is None else room[: len(hidden)]
        return torch.mm(hidden.to(self.weight), self.weight.T, out=into)

    def room(self, count: int) -> Tensor:
        """Allocate an uninitialized [chunk, V] buffer that is reused by all products over ``count``
        states. With a new buffer per product, the kernel would clear its pages every time."""
        return self.weight.new_empty(min(count, chunk_rows(self.weight)), len(self.weight))

    def finish(self, raw: Tensor) -> Tensor:
        """Convert W h, [n, V], to float32 logits: add the bias, scale and softcap."""
        raw = raw.float() if self.bias is None else raw.float() + self.bias.float()
        logits = raw * self.scale if self.scale != 1.0 else raw
        return self.softcap * torch.tanh(logits / self.softcap) if self.softcap else logits

    @torch.no_grad()
    def logprobs(
        self, hidden: Tensor, targets: Tensor, top_k: int = 0
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Compute the log-probs of targets and optionally the most probable tokens.

        Args:
            hidden: [n, H] last hidden states.
            targets: [n] token ids.
            top_k: Number of most probable tokens per state; 0 for none.

        Returns:
            [n] float32 log-probs of the targets and, with ``top_k``, the result of
            :func:`top_teacher`, otherwise None and None.
        """
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
    """Reduce [N, V] log-probs to the k largest: ([N, k] int32 token ids, [N, k + 1] log-probs with
    all other tokens as one event at the end)."""
    values, ids = logprobs.topk(k)
    rest = logprobs.scatter(-1, ids, -torch.inf).logsumexp(-1, keepdim=True)
    return ids.to(torch.int32), torch.cat([values, rest], -1)


def gather(logprobs: Tensor, targets: Tensor) -> Tensor:
    """Select the log-probs of the targets, [n, V], [n] -> [n]."""
    return logprobs.gather(-1, targets[:, None]).squeeze(-1)


def head_of(model: nn.Module) -> OutputHead:
    """Return the output head of a loaded model. It shares the model's tensors."""
    layer: Any = model.get_output_embeddings()  # type: ignore[operator]
    return OutputHead(layer.weight, getattr(layer, "bias", None), **_logit_options(model.config))


def load_head(model: str, precision: str) -> OutputHead:
    """Load only the output head of a teacher checkpoint, for the learner."""
    from safetensors import safe_open

    config = load_config(model, "teacher.model")
    files = parameter_files(model, "teacher.model")
    # A tied checkpoint stores the matrix once, under the name of the embedding.
    ends = ("lm_head.weight", *(("embed_tokens.weight",) if config.tie_word_embeddings else ()))
    name = next((n for end in ends for n in files if n.endswith(end)), None)
    if name is None:
        raise ModelError(
            f"teacher.model: {model!r} has no {' or '.join(ends)} in its safetensors files, so "
            "hidden states cannot be used. Set teacher.kind to hf and teacher.scores to logprobs."
        )
    bias_name = name.removesuffix("weight") + "bias"
    tensors = {}
    for wanted in (name, bias_name):
        if wanted in files:
            with safe_open(files[wanted], framework="pt") as reader:
                tensors[wanted] = reader.get_tensor(wanted).to(dtype_of(precision))
    return OutputHead(tensors[name], tensors.get(bias_name), **_logit_options(config))


def export_head(model: str, precision: str, directory: Path) -> None:
    """Write a model directory with only the config, the tokenizer and the output head. The learner
    and the checks read nothing else of a teacher."""
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
    """Read the scaling and softcapping that some model families (Cohere, Granite, Gemma) apply to
    their logits."""
    scale = getattr(config, "logit_scale", None)
    divisor = getattr(config, "logits_scaling", None)
    return {
        "scale": float(scale) if scale else 1.0 / float(divisor) if divisor else 1.0,
        "softcap": getattr(config, "final_logit_softcapping", None),
    }
