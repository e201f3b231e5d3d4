"""Training state of a learner in safetensors files: full tensors by parameter name.

A state saved with any number of ranks, ZeRO stage and precision can be restored with any other.
Rank i of n writes the parameters i, i + n, i + 2n, ... to its own file. A parameter has three
tensors: the float32 master weight and both AdamW moments. Frozen parameters are not saved. With
adapters, the files also contain the identity of the base model.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import Parameter

from seqkd.errors import ModelError

MASTER = "master"
MOMENTS = ("exp_avg", "exp_avg_sq")
STEPS = "optimizer_steps"
"""Metadata key for the number of AdamW steps, which determines the bias correction of moments."""


class TrainingState:
    """Uniform access to master weights and AdamW state in all ZeRO stages and precisions."""

    def __init__(self, engine: Any, zero_stage: int, identity: Mapping[str, str]) -> None:
        """Read the state of ``engine``. ``identity`` contains, by configuration field, the values
        that a saved state must match. It is empty if the state contains the whole student."""
        self.identity = dict(identity)
        self.optimizer, self.zero_stage = engine.optimizer, zero_stage
        self.adamw = getattr(engine.optimizer, "optimizer", engine.optimizer)
        self.parameters: dict[str, Parameter] = {
            name: p for name, p in engine.module.model.named_parameters() if p.requires_grad
        }
        self.masters: dict[Parameter, Tensor] = {}
        if not zero_stage:  # every rank has full masters; in float32 these are the parameters
            low = getattr(engine.optimizer, "fp16_groups", None)
            high = [group["params"] for group in self.adamw.param_groups]
            self.masters = dict(zip(chain(*(low or high)), chain(*high), strict=True))
        self._begin()

    def _begin(self) -> None:
        """Create the state that AdamW otherwise creates in its first step."""
        flat = self.optimizer.fp32_partitioned_groups_flat if self.zero_stage == 3 else None
        for master in flat or chain(*(group["params"] for group in self.adamw.param_groups)):
            moments = {key: torch.zeros_like(master) for key in MOMENTS}
            self.adamw.state[master] = {"step": torch.tensor(0.0), **moments}
        if self.zero_stage in (1, 2):
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def save(self, directory: Path, rank: int, ranks: int) -> None:
        """Write this rank's share of the tensors and sync it to disk. Must be called on all
        ranks."""
        tensors = {}
        for index, (name, parameter) in enumerate(self.parameters.items()):
            for key in (MASTER, *MOMENTS):
                value = self._whole(parameter, key)
                if index % ranks == rank:
                    tensors[f"{key}/{name}"] = value.detach().cpu().contiguous()
        file = directory / f"learner-{rank:05d}.safetensors"
        save_file(tensors, file, {STEPS: str(int(self._steps()[0])), **self.identity})
        with open(file, "rb") as written:
            os.fsync(written.fileno())

    def restore(self, directory: Path) -> None:
        """Restore a saved state. Raises ModelError, without changing anything, if the state does
        not fit the student."""
        files = self._find(directory)
        for name, parameter in self.parameters.items():
            for key in (MASTER, *MOMENTS):
                with safe_open(files[f"{key}/{name}"], framework="pt") as reader:
                    self._put(parameter, key, reader.get_tensor(f"{key}/{name}"))
        with safe_open(next(iter(files.values())), framework="pt") as reader:
            steps = int(reader.metadata()[STEPS])
        for step in self._steps():
            step.fill_(steps)

    def _steps(self) -> list[Tensor]:
        return [state["step"] for state in self.adamw.state.values()]

    def _find(self, directory: Path) -> dict[str, Path]:
        """Return the file of each tensor."""
        files = {}
        for file in sorted(directory.glob("learner-*.safetensors")):
            with safe_open(file, framework="pt") as reader:
                self._check_identity(file, reader.metadata() or {})
                for tensor in reader.keys():  # noqa: SIM118 (a reader is not a mapping)
                    files[tensor] = file
                    self._check(file, tensor, reader.get_slice(tensor).get_shape())
        for name in self.parameters:
            for key in (MASTER, *MOMENTS):
                if f"{key}/{name}" not in files:
                    raise ModelError(
                        f"{directory}/learner-*.safetensors: {key} of the student's parameter "
                        f"{name} is missing. Resume with the student and the checkpoint of the "
                        "same run."
                    )
        return files

    def _check_identity(self, file: Path, saved: Mapping[str, str]) -> None:
        """Raise ModelError if the saved state belongs to another student."""
        for key in sorted({*self.identity, *saved} - {STEPS}):
            then, now = saved.get(key, "(none)"), self.identity.get(key, "(none)")
            if then != now:
                raise ModelError(
                    f"{file}: was saved with {key}: {then}, but the student has {now}. Resume with "
                    "the student and the checkpoint of the same run."
                )

    def _check(self, file: Path, tensor: str, shape: list[int]) -> None:
        _, name = tensor.split("/", 1)
        parameter = self.parameters.get(name)
        expected = None if parameter is None else getattr(parameter, "ds_shape", parameter.shape)
        if expected is None or list(expected) != shape:
            has = "does not have it" if expected is None else f"has {list(expected)}"
            raise ModelError(
                f"{file}: {name} has shape {shape}, but the student {has}. Resume with the student "
                "and the checkpoint of the same run."
            )

    def _whole(self, parameter: Parameter, key: str) -> Tensor:
        """Return a float32 tensor of ``parameter``'s full shape. Must be called on all ranks."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if not self.zero_stage:
            return self._own(parameter, key)
        whole: Tensor = (
            safe_get_full_fp32_param(parameter)
            if key == MASTER
            else safe_get_full_optimizer_state(parameter, key)
        )
        return whole

    def _own(self, parameter: Parameter, key: str) -> Tensor:
        master = self.masters[parameter]
        return master if key == MASTER else self.adamw.state[master][key]

    def _put(self, parameter: Parameter, key: str, value: Tensor) -> None:
        """Set the tensor that :meth:`_whole` returns. A master weight is also copied to the model's
        own parameter."""
        import deepspeed
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        if not self.zero_stage:
            self._own(parameter, key).data.copy_(value)
        elif self.zero_stage == 3:
            _set_partition(parameter, key, value)
        elif key == MASTER:
            safe_set_full_fp32_param(parameter, value)
        else:
            safe_set_full_optimizer_state(parameter, value, key)
        if key == MASTER:
            partitioned = [parameter] if self.zero_stage == 3 else []
            with deepspeed.zero.GatheredParameters(
                partitioned, modifier_rank=0, enabled=bool(partitioned)
            ):
                parameter.data.copy_(value)


def _set_partition(parameter: Parameter, key: str, value: Tensor) -> None:
    """Set this rank's partition of a full tensor. DeepSpeed's own function does not handle the
    padding of tensors whose size is not divisible by the number of ranks."""
    from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

    size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
    rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
    padded = torch.nn.functional.pad(value.flatten(), (0, size * ranks - value.numel()))
    part = padded[rank * size : (rank + 1) * size]
    if key == MASTER:
        safe_set_local_fp32_param(parameter, part)
    else:
        safe_set_local_optimizer_state(parameter, part, key)
