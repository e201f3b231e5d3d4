"""Weight sync from the learner to the rollout engines.

The learner writes one safetensors file into anonymous memory, which is freed when its process ends.
Engines on the same node read it there. Engines on other nodes receive its bytes through Ray's
object store, also into anonymous memory. New weights overwrite the previous ones. Otherwise the
system would free and clear the memory, which takes longer than writing it.

Each tensor's digest is compared while vLLM loads it. This verifies what arrived, but not what the
engine computes with. The log-prob gap of each step (metrics.jsonl) verifies the latter.

This is the only module that uses vLLM's reload interface.
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
"""Names of the learner's precisions in safetensors."""


def memory_file() -> BinaryIO:
    """Return a file in memory that is freed when it is closed or when this process ends."""
    return os.fdopen(os.memfd_create("seqkd-weights"), "wb")


def path_of(file: BinaryIO) -> str:
    """Return the path by which this user's processes on this node can open a
    :func:`memory_file`."""
    return f"/proc/{os.getpid()}/fd/{file.fileno()}"


def publish(
    state: dict[str, Tensor], policy_version: int, file: BinaryIO, node_id: str
) -> WeightVersion:
    """Write ``state`` to ``file`` in the safetensors format, overwriting its content. The file must
    not change until all engines have loaded it. safetensors' own writer is not used, because it
    replaces the file instead of overwriting it."""
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
        content = _bytes(tensor)  # copies a GPU tensor
        file.write(content)
        digests[name] = xxhash.xxh3_128_hexdigest(content)
    file.truncate()
    return WeightVersion(policy_version, path_of(file), node_id, digests)


def read_bytes(version: WeightVersion) -> bytes:
    """Return the bytes of the published file, for engines on other nodes."""
    return Path(version.path).read_bytes()


def load(engine: Any, version: WeightVersion, data: bytes | None) -> None:
    """Load ``version`` into a vLLM engine and reset its prefix cache.

    ``data`` is the file's content if the engine is not on the learner's node, else None.
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
    """Return the xxh3-128 digest of a tensor's bytes."""
    return xxhash.xxh3_128_hexdigest(_bytes(tensor))


class VerifiedReload:
    """Extension of vLLM's workers (``worker_extension_cls``)."""

    def load_verified(self, path: str, digests: dict[str, str]) -> None:
        """Reload the model's weights from ``path``. Raises SyncError unless all tensors of
        ``digests`` arrive with the same digests."""
        arrived: set[str] = set()

        def tensors() -> Iterator[tuple[str, Tensor]]:
            with safe_open(path, framework="pt") as reader, ThreadPoolExecutor(1) as ahead:

                def verified(name: str) -> tuple[str, Tensor]:
                    tensor = reader.get_tensor(name)
                    if digest(tensor) != digests.get(name):
                        raise SyncError(f"weight sync: {name} differs from the learner's tensor.")
                    return name, tensor

                # The next tensors are read and verified while vLLM loads one.
                for name, tensor in ahead.map(verified, reader.keys()):
                    arrived.add(name)
                    yield name, tensor

        self.reload_weights(weights_iterator=tensors())  # type: ignore[attr-defined]
        self._repack_heads()
        if missing := digests.keys() - arrived:
            raise SyncError(f"weight sync: {sorted(missing)[0]} did not arrive in the engine.")

    def _repack_heads(self) -> None:
        """Repack the output head of a CPU engine.

        A CPU engine computes logits from a packed copy of the head. vLLM's reload does not update
        this copy if the head is tied to the embedding, so logits would silently use the old
        weights.
        """
        from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
        from vllm.platforms import current_platform

        if not current_platform.is_cpu():
            return
        for module in self.model_runner.get_model().modules():  # type: ignore[attr-defined]
            if isinstance(module, ParallelLMHead):
                module.quant_method.process_weights_after_loading(module)
