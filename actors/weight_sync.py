"""Learner -> rollout weights. The only file that knows vLLM's reload interface.

The learner writes one safetensors file into anonymous memory, which ends with the process; every
engine on that node reads it there, an engine elsewhere gets the file's bytes through Ray's object
store and holds them likewise. The next weights are written over the last ones, whose memory the
system would otherwise take back and clear anew, which takes longer than writing does. Each tensor's
digest is compared as vLLM takes it in. That proves what arrived, not what the engine computes with:
the log-prob gap of each step (metrics.jsonl) shows that.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, BinaryIO

import torch
import xxhash
from safetensors import safe_open
from torch import Tensor

from seqkd.errors import SyncError
from seqkd.types import WeightVersion

DTYPES = {torch.float32: "F32", torch.bfloat16: "BF16"}
"""By what safetensors calls them: the learner's precisions."""


def memory_file() -> BinaryIO:
    """A file that is in memory alone, and gone when it is closed or this process ends, however."""
    return os.fdopen(os.memfd_create("seqkd-weights"), "wb")


def path_of(file: BinaryIO) -> str:
    """Where the processes of this user on this node find an open :func:`memory_file`."""
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def publish(
    state: dict[str, Tensor], policy_version: int, file: BinaryIO, node_id: str
) -> WeightVersion:
    """Write ``state`` to ``file``, over what it had, to be left alone until every engine has taken
    it in: as safetensors, whose own writer puts a new file in the place of the one it is given."""
    header, end = {}, 0
    for name, tensor in state.items():
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.seek(0)
    file.write(len(text).to_bytes(8, "little") + text)
    digests = {}
    for name, tensor in state.items():
        content = _bytes(tensor)  # of a tensor on a GPU a copy
        file.write(content)
        digests[name] = xxhash.xxh3_128_hexdigest(content)
    file.truncate()
    return WeightVersion(policy_version, path_of(file), node_id, digests)


def read_bytes(version: WeightVersion) -> bytes:
    """The published file, for engines on other nodes."""
    return Path(version.path).read_bytes()


def load(engine: Any, version: WeightVersion, data: bytes | None) -> None:
    """Put ``version`` into a vLLM engine and forget what it cached of the old weights.

    ``data`` is the file's content where the engine is on another node than the learner.
    """
    with ExitStack() as stack:
        path = version.path
        if data is not None:
            file = stack.enter_context(memory_file())
            file.write(data)
            file.flush()
            path = path_of(file)
        engine.collective_rpc("load_verified", args=(path, version.digests))
    engine.reset_prefix_cache()


def _bytes(tensor: Tensor) -> memoryview:
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return flat.numpy().data


def digest(tensor: Tensor) -> str:
    """xxh3-128 of a tensor's bytes."""
    return xxhash.xxh3_128_hexdigest(_bytes(tensor))


class VerifiedReload:
    """Mixed into vLLM's workers (``worker_extension_cls``)."""

    def load_verified(self, path: str, digests: dict[str, str]) -> None:
        """Reload the model's weights from ``path``; SyncError unless every tensor of ``digests``
        arrives with that content."""
        arrived: set[str] = set()

        def tensors() -> Iterator[tuple[str, Tensor]]:
            with safe_open(path, framework="pt") as reader, ThreadPoolExecutor(1) as ahead:

                def verified(name: str) -> tuple[str, Tensor]:
                    tensor = reader.get_tensor(name)
                    if digest(tensor) != digests.get(name):
                        raise SyncError(f"weight sync: {name} differs from what the learner sent.")
                    return name, tensor

                # While vLLM takes one in the next are read and verified.
                for name, tensor in ahead.map(verified, reader.keys()):
                    arrived.add(name)
                    yield name, tensor

        self.reload_weights(weights_iterator=tensors())  # type: ignore[attr-defined]
        self._repack_heads()
        if missing := digests.keys() - arrived:
            raise SyncError(f"weight sync: {sorted(missing)[0]} did not arrive in the engine.")

    def _repack_heads(self) -> None:
        """A CPU engine computes logits from a packed copy of the head, which vLLM's reload leaves
        as it was where the head is tied to the embedding: logits of the old weights, silently."""
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        for module in self.model_runner.get_model().modules():  # type: ignore[attr-defined]
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
