"""One DeepSpeed rank: statistics, objective, optimizer step, measuring, publishing, exporting."""

from __future__ import annotations

import os
import socket
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from actors import weight_sync
from seqkd.config import Learner, Objective
from seqkd.models import (
    StudentModel,
    as_token_stats,
    check_head,
    export,
    load_causal_lm,
    load_head,
    without_dropout,
)
from seqkd.objectives import OBJECTIVES
from seqkd.token_stats import OutputHead
from seqkd.types import Counts, StepResult, TrainBatch, WeightVersion


class LearnerRank:
    """One rank of the data-parallel learner."""

    def __init__(self, config: Learner, run_id: str) -> None:
        self.config, self.run_id = config, run_id
        self.device = "cuda" if config.gpus else "cpu"
        self.teacher_head: OutputHead | None = None
        self.policy_version = 0

    def rendezvous(self) -> tuple[tuple[str, int], str]:
        """Address and free port of this rank, for the others to meet at; and its Ray node."""
        import ray

        with socket.socket() as probe:
            probe.bind(("", 0))
            master = ray.util.get_node_ip_address(), probe.getsockname()[1]
        return master, ray.get_runtime_context().get_node_id()

    def start(
        self, rank: int, master: tuple[str, int], model: str, teacher: str | None, precision: str
    ) -> None:
        """Join the group and load the student; ``teacher`` names the model whose output head is
        kept here, frozen, in ``precision``."""
        import deepspeed

        self.rank = rank
        os.environ |= {
            "MASTER_ADDR": master[0],
            "MASTER_PORT": str(master[1]),
            "RANK": str(self.rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(self.config.ranks),
        }
        deepspeed.init_distributed("nccl" if self.config.gpus else "gloo", verbose=False)
        student = load_causal_lm(model, self.config.precision, "student.model").to(self.device)
        check_head(student, "student.model")
        without_dropout(student)
        if self.config.gradient_checkpointing:
            student.gradient_checkpointing_enable()  # type: ignore[operator]
        module = StudentModel(student)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            config=deepspeed_config(self.config),
        )
        if self.config.zero_stage == 3:
            # The head is read by the wrapper, outside the layer that owns it.
            layer = student.get_output_embeddings()  # type: ignore[operator]
            for parameter in layer.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)
        if teacher is not None:
            head = load_head(teacher, precision)
            bias = None if head.bias is None else head.bias.to(self.device)
            self.teacher_head = replace(head, weight=head.weight.to(self.device), bias=bias)

    def step(
        self, micro_batches: list[TrainBatch], counts: Counts, objective: Objective, lr: float
    ) -> StepResult:
        """One optimizer step on this rank's micro-batches. The result's sums are this rank's."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.train()
        loss_of, total = OBJECTIVES[objective.kind], 0.0
        sums: dict[str, float] = {}
        gap_max = 0.0
        for index, batch in enumerate(micro_batches):
            self.engine.set_gradient_accumulation_boundary(index == len(micro_batches) - 1)
            batch = self._to_device(batch)
            stats = self.engine(batch, self._names(batch, objective.stats()), self.teacher_head)
            loss = loss_of(as_token_stats(batch, stats), counts, **objective.options())
            # DeepSpeed averages over ranks; the loss already divides by global counts.
            self.engine.backward(loss * self.config.ranks)
            total += loss.item()
            gap_max = max(gap_max, _accumulate(sums, batch, stats))
        norm = self._grad_norm_before_step()
        self.engine.step()
        self.policy_version += 1
        if norm is None:
            norm = float(self.engine.get_global_grad_norm())
        return StepResult(total, norm, sums, gap_max)

    def measure(self, micro_batches: list[TrainBatch]) -> list[dict[str, Tensor]]:
        """[B] sums over each sequence's tokens of every statistic, a dict a micro-batch."""
        self.engine.eval()
        results = []
        with torch.no_grad():
            for batch in micro_batches:
                batch = self._to_device(batch)
                stats = self.engine(batch, self._names(batch, ()), self.teacher_head)
                results.append(
                    {name: (v * batch.loss_mask).sum(1).cpu() for name, v in stats.items()}
                )
        return results

    def publish(self) -> WeightVersion | None:
        """Write the weights for the engines; every rank takes part, rank 0 returns the version."""
        import ray

        state = self._gathered()
        if self.rank:
            return None
        node = ray.get_runtime_context().get_node_id()
        return weight_sync.publish(state, self.policy_version, self.run_id, node)

    def published_bytes(self, version: WeightVersion) -> bytes:
        """The published file, for engines on other nodes."""
        return weight_sync.read_bytes(version)

    def export(self, directory: str, tokenizer_from: str) -> None:
        """Write a model directory that transformers and vLLM load as it is."""
        state = self._gathered()
        if self.rank == 0:
            export(self.engine.module.model, state, Path(directory), tokenizer_from)

    def _names(self, batch: TrainBatch, wanted: tuple[str, ...]) -> tuple[str, ...]:
        """What the objective reads and everything else that this batch's teacher allows."""
        names = ("student_logprob", "entropy", *wanted)
        if batch.teacher_hidden is not None:
            names += ("teacher_logprob", "reverse_kl", "forward_kl")
        elif batch.teacher_logprobs is not None:
            names += ("teacher_logprob",)
        return tuple(dict.fromkeys(names))

    def _to_device(self, batch: TrainBatch) -> TrainBatch:
        if self.device == "cpu":
            return batch
        tensors = {f.name: getattr(batch, f.name) for f in fields(batch)}
        moved: dict[str, Any] = {
            k: v.to(self.device) for k, v in tensors.items() if isinstance(v, Tensor)
        }
        return replace(batch, **moved)

    def _grad_norm_before_step(self) -> float | None:
        """ZeRO 0 keeps whole gradients and does not report their norm; it does for other stages."""
        if self.config.zero_stage or self.config.precision != "float32":
            return None
        grads = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        return torch.nn.utils.get_total_norm(grads).item()

    def _gathered(self) -> dict[str, Tensor]:
        """Whole weights by checkpoint name, on the CPU of rank 0; empty elsewhere."""
        import deepspeed

        state = {}
        for name, parameter in self.engine.module.model.named_parameters():
            partitioned = [parameter] if self.config.zero_stage == 3 else []
            with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
                if self.rank == 0:
                    state[name] = parameter.detach().to("cpu", copy=bool(partitioned))
        return state


def deepspeed_config(config: Learner) -> dict[str, Any]:
    """DeepSpeed's own configuration. Accumulation is driven by the rank, so it is 1 here."""
    return {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": config.max_grad_norm,
        "zero_optimization": {"stage": config.zero_stage},
        "bf16": {"enabled": config.precision == "bfloat16"},
        "optimizer": {
            "type": "AdamW",
            "params": {
                "lr": config.lr,
                "betas": list(config.betas),
                "weight_decay": config.weight_decay,
                "torch_adam": True,
            },
        },
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }


def _accumulate(sums: dict[str, float], batch: TrainBatch, stats: dict[str, Tensor]) -> float:
    """Add a micro-batch to ``sums``; returns its largest log-prob gap."""
    mask = batch.loss_mask
    found = {name: (v.detach() * mask).sum().item() for name, v in stats.items()}
    found |= {"tokens": mask.sum().item(), "sequences": mask.any(1).sum().item()}
    gap = _logprob_gap(batch, stats)
    if gap is not None:
        found["logprob_gap"] = gap.sum().item()
    for name, value in found.items():
        sums[name] = sums.get(name, 0.0) + value
    return 0.0 if gap is None else gap.max().item()


def _logprob_gap(batch: TrainBatch, stats: dict[str, Tensor]) -> Tensor | None:
    """[B, T] |log-prob of the drawn token here - at the sampler|, of the model that drew it."""
    name = "student_logprob" if batch.source == "student" else "teacher_logprob"
    if batch.rollout_logprobs is None or name not in stats:
        return None
    return ((stats[name].detach() - batch.rollout_logprobs) * batch.loss_mask).abs()
