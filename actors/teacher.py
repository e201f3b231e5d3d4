"""Scoring teachers: hidden states before each completion token, by vLLM or transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from actors.cpu_matmul import use_onednn
from actors.host_memory import to_host, wait_for_copies
from actors.rollout import build_engine
from seqkd.config.teacher import HfTeacherConfig, LocalTeacherConfig, VllmTeacherConfig
from seqkd.imports import importing
from seqkd.learner import batching
from seqkd.learner.student import check_head, last_hidden
from seqkd.models.loading import expand, load_causal_lm
from seqkd.models.output_head import OutputHead, head_of, load_head
from seqkd.types import Rollout, TeacherScore


class TeacherActor:
    """Scorer of rollouts with one frozen model."""

    def start(self, config: LocalTeacherConfig, max_model_len: int, vocabulary: int) -> None:
        """Load the model. This is separate from the constructor so that a failure keeps its cause.
        Scores cover the first ``vocabulary`` tokens. Any further rows are padding of one of the two
        models."""
        self.top_k = config.top_k if config.scores == "top_k" else 0
        self.states: VllmStates | HfStates = STATES[config.kind](config, max_model_len)
        self.head: OutputHead | None = None
        if config.scores != "hidden":
            self.head = self.states.head().first(vocabulary)

    def score(self, rollouts: list[Rollout]) -> list[TeacherScore]:
        """Return one score per rollout, in order."""
        hidden = self.states.compute([batching.fed_tokens(r) for r in rollouts])
        return [
            self._score(r, states[batching.state_span(r)])
            for r, states in zip(rollouts, hidden, strict=True)
        ]

    def _score(self, rollout: Rollout, states: Tensor) -> TeacherScore:
        if self.head is None:
            return TeacherScore(rollout.sample_id, hidden=states)
        device = self.head.weight.device
        targets = torch.tensor(rollout.completion_ids, device=device)
        logprobs, *top = self.head.logprobs(states.to(device), targets, self.top_k)
        ids, values = (None if t is None else t.cpu() for t in top)
        return TeacherScore(
            rollout.sample_id, logprobs=logprobs.cpu(), top_ids=ids, top_logprobs=values
        )


class VllmStates:
    """Final-norm hidden states from vLLM's pooling runner."""

    def __init__(self, config: VllmTeacherConfig, max_model_len: int) -> None:
        with importing():
            from vllm.config import PoolerConfig

        self.config = config
        self.llm = build_engine(
            expand(config.model),
            config,
            max_model_len,
            skip_tokenizer_init=False,  # the pooling runner requires a tokenizer
            runner="pooling",
            convert="embed",
            pooler_config=PoolerConfig(task="token_embed", use_activation=False),
            # The states of all tokens are needed, so none may be skipped as cached.
            enable_prefix_caching=False,
            enable_chunked_prefill=False,
            max_num_batched_tokens=max(config.batch_tokens, max_model_len),
        )

    def compute(self, sequences: list[list[int]]) -> list[Tensor]:
        """Return hidden states of shape [S_i, H] per sequence."""
        outputs = self.llm.encode(
            [{"prompt_token_ids": ids} for ids in sequences],
            pooling_task="token_embed",
            use_tqdm=False,
        )
        return [output.outputs.data for output in outputs]

    def head(self) -> Any:
        """Return the output head for these states."""
        return load_head(self.config.model, self.config.precision)


class HfStates:
    """Hidden states from a transformers forward pass."""

    def __init__(self, config: HfTeacherConfig, max_model_len: int) -> None:
        self.batch_tokens = max(config.batch_tokens, max_model_len)
        # "auto" distributes the model over all GPUs of the actor, or uses the CPU.
        self.model = load_causal_lm(config.model, config.precision, "teacher.model", "auto")
        self.device = next(self.model.parameters()).device
        if self.device.type == "cpu":
            use_onednn()
        check_head(self.model, "teacher.model")

    @torch.inference_mode()
    def compute(self, sequences: list[list[int]]) -> list[Tensor]:
        """Return hidden states of shape [S_i, H] per sequence. Sequences of similar length share a
        forward pass."""
        order = sorted(range(len(sequences)), key=lambda i: len(sequences[i]))
        states: list[Tensor] = [torch.empty(0)] * len(sequences)
        while order:
            longest = len(sequences[order[-1]])
            rows = order[-max(1, self.batch_tokens // longest) :]
            del order[-len(rows) :]
            ids, mask = batching.padded([sequences[i] for i in rows])
            hidden = to_host(last_hidden(self.model, ids.to(self.device), mask.to(self.device)))
            for i, row in zip(rows, hidden, strict=True):
                states[i] = row[: len(sequences[i])]
        wait_for_copies(self.device)
        return states

    def head(self) -> Any:
        """Return the output head for these states."""
        return head_of(self.model)


STATES: dict[str, Any] = {"vllm": VllmStates, "hf": HfStates}
