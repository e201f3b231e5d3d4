"""Learner -> rollout weights. The only file that knows vLLM's reload interface.

The learner writes one safetensors file to shared memory; every engine on that node reads it, an
engine elsewhere gets the file's bytes through Ray's object store and writes its own. Each tensor's
digest is compared as vLLM takes it in. That proves what arrived, not what the engine computes with:
the log-prob gap of each step (metrics.jsonl) shows that.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
import xxhash
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from seqkd.errors import SyncError
from seqkd.types import WeightVersion

FILE = "model.safetensors"


def shared_memory() -> Path:
    """A folder in memory, where this machine has one."""
    memory = Path("/dev/shm")
    return memory if memory.is_dir() else Path(gettempdir())


def sync_directory(run_id: str) -> Path:
    """Where a run's weights are published on this node."""
    return shared_memory() / f"seqkd-{run_id}"


def publish(
    state: dict[str, Tensor], policy_version: int, run_id: str, node_id: str
) -> WeightVersion:
    """Write ``state``; the previous version is removed, as every engine has taken it in."""
    directory = sync_directory(run_id)
    shutil.rmtree(directory, ignore_errors=True)
    target = directory / f"v{policy_version}"
    target.mkdir(parents=True)
    state = {name: tensor.contiguous() for name, tensor in state.items()}
    save_file(state, target / FILE)
    digests = {name: digest(tensor) for name, tensor in state.items()}
    return WeightVersion(policy_version, str(target), node_id, digests)


def remove(run_id: str) -> None:
    """Leave nothing of a run on this node."""
    shutil.rmtree(sync_directory(run_id), ignore_errors=True)


def read_bytes(version: WeightVersion) -> bytes:
    """The published file, for engines on other nodes."""
    return (Path(version.path) / FILE).read_bytes()


def load(engine: Any, version: WeightVersion, data: bytes | None) -> None:
    """Put ``version`` into a vLLM engine and forget what it cached of the old weights.

    ``data`` is the file's content where the engine is on another node than the learner.
    """
    with ExitStack() as stack:
        directory = Path(version.path)
        if data is not None:  # a directory of its own: engines of one node may load at once
            directory = Path(stack.enter_context(TemporaryDirectory(dir=shared_memory())))
            (directory / FILE).write_bytes(data)
        engine.collective_rpc("load_verified", args=(str(directory / FILE), version.digests))
    engine.reset_prefix_cache()


def digest(tensor: Tensor) -> str:
    """xxh3-128 of a tensor's bytes."""
    flat = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)
    return xxhash.xxh3_128_hexdigest(flat.numpy().data)


class VerifiedReload:
    """Mixed into vLLM's workers (``worker_extension_cls``)."""

    def load_verified(self, path: str, digests: dict[str, str]) -> None:
        """Reload the model's weights from ``path``; SyncError unless every tensor of ``digests``
        arrives with that content."""
        arrived: set[str] = set()

        def tensors() -> Iterator[tuple[str, Tensor]]:
            with safe_open(path, framework="pt") as reader:
                for name in reader.keys():  # noqa: SIM118 (a reader is no mapping)
                    tensor = reader.get_tensor(name)
                    if digest(tensor) != digests.get(name):
                        raise SyncError(f"weight sync: {name} differs from what the learner sent.")
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
