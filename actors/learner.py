"""DeepSpeed rank: statistics, objective, optimizer step, measuring, publishing, exporting."""

from __future__ import annotations

import math
import os
import socket
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO
from unittest.mock import patch

import torch
from torch import Tensor

from actors import weight_sync
from actors.cpu_matmul import use_onednn
from actors.host_memory import to_host, wait_for_copies
from actors.optimizer_state import TrainingState
from seqkd.config.learner import LearnerConfig
from seqkd.config.student import LoraConfig
from seqkd.files import disk_errors
from seqkd.imports import importing
from seqkd.learner.batching import to_device
from seqkd.learner.loss import RankPart, part_result, stat_names
from seqkd.learner.student import StudentModel, check_head, prefix_sharing_factor
from seqkd.models.export import export
from seqkd.models.loading import load_causal_lm, without_dropout
from seqkd.models.lora import Adapters
from seqkd.models.output_head import OutputHead, load_head
from seqkd.models.pruning import layers_of
from seqkd.types import EndStat, PartResult, StepResult, TrainBatch, WeightVersion


class LearnerRank:
    """One rank of the data-parallel learner."""

    def __init__(
        self,
        config: LearnerConfig,
        lora: LoraConfig | None = None,
        seed: int = 0,
        ends: tuple[int, ...] = (),
    ) -> None:
        """Create the rank. With ``lora``, only adapters are trained; ``seed`` initializes them.
        ``ends`` are the tokens that end a completion."""
        self.config, self.lora, self.seed, self.ends = config, lora, seed, ends
        self.device = "cuda" if config.gpus else "cpu"
        self.teacher_heads: dict[str, OutputHead] = {}
        self.policy_version = 0
        self.published: BinaryIO | None = None
        """File that weights are published to."""

    def rendezvous(self) -> tuple[str, int]:
        """Listen for the other ranks, on one address of this node only. Return address and port."""
        import ray

        address = "127.0.0.1" if self.config.ranks == 1 else ray.util.get_node_ip_address()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.listener = socket.create_server((address, 0), family=family)
        return address, self.listener.getsockname()[1]

    def start(
        self,
        rank: int,
        master: tuple[str, int],
        model: str,
        teachers: Mapping[str, tuple[str, str]],
    ) -> int:
        """Join the group and load the student.

        ``teachers`` contains (model, precision) by the name of each teacher that returns hidden
        states. The output heads of these models are loaded here, frozen. Returns the student's
        :func:`seqkd.learner.student.prefix_sharing_factor`.
        """
        with importing(freeze=True):
            import deepspeed
            from transformers import AutoModelForCausalLM  # noqa: F401

            # DeepSpeed imports its Muon optimizer to compare types. The decorators of that module
            # would import torch's compiler. Other versions of DeepSpeed may not have the names.
            undecorated = patch("deepspeed.runtime.compiler.compile", lambda: lambda method: method)
            with suppress(ImportError, AttributeError), undecorated:
                import deepspeed.runtime.zero.muon.muon_optimizer

        self.rank = rank
        # DeepSpeed would compile an operator that only inference uses. If the compilation is
        # killed, it leaves a lock for which all later processes wait forever.
        deepspeed.ops.__compatible_ops__ = {}
        self._join(master)
        deepspeed.init_distributed(verbose=False)
        if not self.config.gpus:
            use_onednn()
        student = load_causal_lm(model, self.config.precision, "student.model")
        self.adapters = Adapters(student, self.lora, self.seed) if self.lora else None
        student.to(self.device)
        check_head(student, "student.model")
        without_dropout(student)
        sharing = prefix_sharing_factor(student)
        if self.config.gradient_checkpointing:
            student.gradient_checkpointing_enable()  # type: ignore[operator]
        if self.config.compile:
            for layer in layers_of(student):
                layer.compile(dynamic=True)  # micro-batches have many shapes
        module = StudentModel(student, self.config.compile)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            model_parameters=[p for p in module.parameters() if p.requires_grad],
            config=deepspeed_config(self.config),
        )
        if self.config.ranks == 1 and not self.config.zero_stage:
            # DeepSpeed would copy every gradient to a buffer and back, although there is no other
            # rank to add gradients of.
            self.engine.enable_backward_allreduce = False
        if self.config.zero_stage == 3:
            # The wrapper reads the head outside the layer that owns it.
            layer = student.get_output_embeddings()  # type: ignore[operator]
            for parameter in layer.parameters():
                deepspeed.zero.register_external_parameter(module, parameter)
        identity = self.adapters.identity if self.adapters else {}
        self.state = TrainingState(self.engine, self.config.zero_stage, identity)
        for name, teacher in teachers.items():
            head = load_head(*teacher)
            bias = None if head.bias is None else head.bias.to(self.device)
            self.teacher_heads[name] = replace(head, weight=head.weight.to(self.device), bias=bias)
        return sharing

    def _join(self, master: tuple[str, int]) -> None:
        """Form the process group. Its store has no authentication, and torch would let it listen on
        every interface."""
        from torch import distributed

        os.environ |= {
            "MASTER_ADDR": master[0],
            "MASTER_PORT": str(master[1]),
            "RANK": str(self.rank),
            "LOCAL_RANK": "0",
            "WORLD_SIZE": str(self.config.ranks),
        }
        listener = self.listener.detach() if self.rank == 0 else None
        store = distributed.TCPStore(  # type: ignore[attr-defined]
            *master, self.config.ranks, is_master=self.rank == 0, master_listen_fd=listener
        )
        distributed.init_process_group(
            "nccl" if self.config.gpus else "gloo",
            store=store,
            rank=self.rank,
            world_size=self.config.ranks,
        )

    def step(self, parts: list[RankPart], lr: float) -> StepResult:
        """Take an optimizer step on this rank's micro-batches. The sums of the result are those of
        this rank only."""
        for group in self.engine.optimizer.param_groups:
            group["lr"] = lr
        self.engine.train()
        total, results = 0.0, [PartResult() for _ in parts]
        pending = [(i, part, batch) for i, part in enumerate(parts) for batch in part.micro_batches]
        for number, (index, part, batch) in enumerate(pending, 1):
            self.engine.set_gradient_accumulation_boundary(number == len(pending))
            batch = to_device(batch, self.device)
            names, head = stat_names(batch, part.terms, self.ends), self._head(batch)
            loss, stats = self.engine(batch, names, head, partial(part.loss, batch))
            # DeepSpeed averages over ranks, but the loss already divides by global counts. A
            # non-finite loss makes the factor NaN, and therefore the gradient on all ranks.
            self.engine.backward(loss * (self.config.ranks + 0 * loss.detach()))
            total += float(loss)
            results[index] += part_result(batch, stats, part.weight(batch, stats))
        norm, skipped = self._update()
        self.policy_version += 1
        return StepResult(total, norm, tuple(results), skipped)

    def measure(
        self, micro_batches: list[TrainBatch], ends: tuple[int, ...] = ()
    ) -> list[dict[str, Tensor]]:
        """Return all statistics that the teacher's scores allow, of shape [B, T] each, in one dict
        per micro-batch. With ``ends`` (see :class:`seqkd.protocols.Learner`) also
        "end_logprob"."""
        extra = (EndStat("end_logprob", ends),) if ends else ()
        self.engine.eval()
        results = []
        with torch.no_grad():
            for batch in micro_batches:
                batch = to_device(batch, self.device)
                _, stats = self.engine(
                    batch, (*stat_names(batch, (), ()), *extra), self._head(batch)
                )
                results.append(
                    {
                        name if isinstance(name, str) else "end_logprob": value.cpu()
                        for name, value in stats.items()
                    }
                )
        return results

    def publish(self) -> WeightVersion | None:
        """Publish the weights for the engines. They overwrite the previous weights, which all
        engines have loaded. Must be called on all ranks; only rank 0 returns the version."""
        import ray

        state = self._gathered()
        if self.rank:
            return None
        node = ray.get_runtime_context().get_node_id()
        if self.adapters:
            state = self.adapters.published(state)
        self.published = self.published or weight_sync.memory_file()
        return weight_sync.publish(state, self.policy_version, self.published, node)

    def published_bytes(self, version: WeightVersion) -> bytes:
        """Return the bytes of the published file, for engines on other nodes."""
        return weight_sync.read_bytes(version)

    def export(self, directory: str, tokenizer_from: str) -> None:
        """Write a model directory that transformers and vLLM can load. With LoRA, adapters are
        merged, and are also written separately to ``<directory>_adapter``."""
        state = self._gathered()
        if self.rank == 0:
            with disk_errors(Path(directory)):
                if self.adapters:
                    self.adapters.export(state, Path(f"{directory}_adapter"))
                    state = self.adapters.merged(state)
                export(self.engine.module.model, state, Path(directory), tokenizer_from)

    def save(self, directory: str) -> None:
        """Write this rank's share of the training state. Must be called on all ranks."""
        self.state.save(Path(directory), self.rank, self.config.ranks)

    def restore(self, directory: str, policy_version: int) -> None:
        """Continue from a saved state. Must be called on all ranks."""
        self.state.restore(Path(directory))
        self.policy_version = policy_version

    def _head(self, batch: TrainBatch) -> OutputHead | None:
        return self.teacher_heads.get(batch.teacher)

    def _update(self) -> tuple[float, bool]:
        """Return the gradient norm, and True if it is not finite. In that case all ranks skip the
        step, and weights and moments do not change."""
        if self.config.zero_stage or self.config.precision != "float32":
            self.engine.step()  # skips a non-finite step by itself
            return float(self.engine.get_global_grad_norm()), bool(self.engine.optimizer.overflow)
        grads = [p.grad for p in self.engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(grads).item()
        if skipped := not math.isfinite(norm):
            self.engine.zero_grad()
        else:
            self.engine.step()
        return norm, skipped

    def _gathered(self) -> dict[str, Tensor]:
        """Return full weights by parameter name, in host memory. Empty on ranks other than 0."""
        import deepspeed

        state = {}
        for name, parameter in self.engine.module.model.named_parameters():
            partitioned = [parameter] if self.config.zero_stage == 3 else []
            with deepspeed.zero.GatheredParameters(partitioned, enabled=bool(partitioned)):
                if self.rank == 0:
                    state[name] = to_host(parameter)
                    if partitioned:  # gathered weights are freed after this block
                        wait_for_copies(self.device)
                        state[name] = state[name].clone()
        wait_for_copies(self.device)
        return state


def deepspeed_config(config: LearnerConfig) -> dict[str, Any]:
    """Return DeepSpeed's configuration. The rank itself controls accumulation, so it is 1 here."""
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
                "fused": True,
            },
        },
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
