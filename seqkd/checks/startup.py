"""Checks with running actors before the first step: probe texts are scored and compared.

The texts are few and short. No optimizer step is taken and no state is changed.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import psutil
import torch
from torch import Tensor

from seqkd.checks.preflight import Checked
from seqkd.checks.probe import (
    UNIFORM,
    answers,
    as_rollout,
    distance,
    english,
    finite,
    scored_tokens,
    tolerance,
)
from seqkd.config.data import DataConfig
from seqkd.config.learner import LearnerConfig
from seqkd.config.rollout import RolloutConfig
from seqkd.config.run import Config
from seqkd.config.teacher import LocalTeacherConfig
from seqkd.errors import ModelError
from seqkd.models.loading import load_causal_lm
from seqkd.protocols import Sampler
from seqkd.types import Prompt, Rollout
from seqkd.workers import Workers

REFERENCE_GIB = 4.0
"""Largest checkpoint size for which the driver runs its own reference forward pass."""


def check_workers(
    config: Config, checked: Checked, workers: Workers, roles: Collection[str]
) -> list[str]:
    """Return warnings. Raises ModelError with all errors, one per line. ``roles`` are the roles
    that have actors.

    A teacher's scores must

    - exist for every token
    - be reproducible
    - agree with an independent forward pass
    - be better than a uniform guess
    - depend on the whole prompt

    The log-probs of a sampling engine must agree with those of the model that scores its samples.
    """
    errors: list[str] = []
    warnings: list[str] = []
    if "rollout" in roles:
        errors += _student_agrees(config.rollout, config.learner, checked, workers)
    for name, teacher in config.teachers.items():
        if "teacher" in roles and (local := teacher.local):
            echo = _Echo(name, local, config.data, config.rollout, checked, workers)
            errors += echo.errors(sampling="teacher_sampler" in roles)
            warnings += echo.warnings
    if errors:
        raise ModelError("\n".join(errors))
    return warnings


def _student_agrees(
    rollout: RolloutConfig, learner: LearnerConfig, checked: Checked, workers: Workers
) -> list[str]:
    drawn = _draw(workers.student, checked, rollout.actors)
    measured = workers.learner.measure(drawn, {})
    gap = _gap([(r, torch.tensor(measured[r.sample_id]["student_logprob"])) for r in drawn])
    most = tolerance(rollout.precision, learner.precision)
    if gap <= most:
        return []
    return [
        f"rollout: the log-probs of sampled tokens from the engine and from the learner differ by "
        f"{gap:.3g} nats per token (limit {most:g}). Their weights or their computation differ. "
        "Set rollout.precision and learner.precision to float32. If the difference remains, vLLM "
        "and transformers compute this model type differently."
    ]


class _Echo:
    """Checks of one teacher's scores of probe texts."""

    def __init__(
        self,
        name: str,
        teacher: LocalTeacherConfig,
        data: DataConfig,
        rollout: RolloutConfig,
        checked: Checked,
        workers: Workers,
    ) -> None:
        self.name, self.teacher, self.workers = name, teacher, workers
        self.data, self.rollout, self.checked = data, rollout, checked
        self.most = tolerance(teacher.precision)
        self.warnings: list[str] = []

    def errors(self, sampling: bool) -> list[str]:
        """Return all faults of the scores. If scores are missing, only that fault is returned."""
        copies = answers(self.checked, "echo", max(2, self.teacher.actors))
        others = _full_length(self.data.max_prompt_tokens, self.checked)
        once = self.logprobs(copies)
        again = self.logprobs([copies[0], *others])  # the same text in another batch
        if once is None or again is None:
            return [self.missing]
        echo = again[0]
        faults = [self.differs_from_itself([*once, echo])]
        if faults == [None]:  # the next checks compare scores, so they need reproducible ones
            faults += [
                self.differs_from_the_checkpoint(copies[0], echo),
                self.truncates(*again[1:]),
            ]
            faults += [self.differs_from_its_sampler()] if sampling else []
        faults.append(self.guesses(echo))
        return [error for error in faults if error]

    @property
    def missing(self) -> str:
        return (
            f"{self._name} some tokens of the probe text have no log-prob, or a non-finite one. "
            f"Run with --verbose to see the teacher's log{self._without_engine}."
        )

    def logprobs(self, rollouts: Sequence[Rollout]) -> list[Tensor] | None:
        """Return log-probs of shape [T] per rollout, or None if one is missing or not finite."""
        scores = self.workers.teachers[self.name].score(rollouts)
        if any(scored_tokens(scores[r.sample_id]) != len(r.completion_ids) for r in rollouts):
            return None
        measured = self.workers.learner.measure(rollouts, scores)
        values = [torch.tensor(measured[r.sample_id]["teacher_logprob"]) for r in rollouts]
        return values if all(map(finite, values)) else None

    def differs_from_itself(self, answers: list[Tensor]) -> str | None:
        """Compare the scores of one text from all actors and from two batches."""
        gap = max(distance(answers[0], answer) for answer in answers)
        if gap <= self.most:
            return None
        return (
            f"{self._name} repeated scores of the same text differ by {gap:.3g} nats per token "
            f"(limit {self.most:g} in {self.teacher.precision}). Check for dropout, and for nodes "
            f"with a different checkpoint under the same path{self._without_engine}."
        )

    def differs_from_the_checkpoint(self, rollout: Rollout, echo: Tensor) -> str | None:
        """Compare with a transformers forward pass on the driver, if the model is small enough."""
        model = self.checked.teachers[self.name]
        expected = _forward(self.teacher, model, self.checked.vocabulary, rollout)
        if expected is None or (gap := distance(expected, echo)) <= self.most:
            return None
        return (
            f"{self._name} its scores differ by {gap:.3g} nats per token from a forward pass of "
            f"the checkpoint in transformers (limit {self.most:g} in {self.teacher.precision}). "
            "The scorer computes another model. Check that every node has the same files under "
            f"this name{self._without_engine}."
        )

    def differs_from_its_sampler(self) -> str | None:
        """Compare the teacher's sampling engine with its scorer."""
        generation = self.teacher.generation
        sampler = self.workers.teacher_samplers[self.name]
        drawn = _draw(sampler, self.checked, generation.actors)
        scores = self.logprobs(drawn)
        if scores is None:
            return self.missing
        gap = _gap(list(zip(drawn, scores, strict=True)))
        most = tolerance(generation.precision, self.teacher.precision)
        if gap <= most:
            return None
        return (
            f"{self._name} the log-probs of sampled tokens from its sampling engine and from its "
            f"scorer differ by {gap:.3g} nats per token (limit {most:g}). One of the two computes "
            "another model. Set teacher.generation.precision to teacher.precision, and check that "
            "every node has the same files under this name."
        )

    def truncates(self, full: Tensor, again: Tensor, changed: Tensor) -> str | None:
        """Return an error if changing the first token of the longest text does not change its
        scores. Differences between two scores of the same text (``full`` and ``again``) are
        noise."""
        noise = (full - again).abs().max().item()
        if (full - changed).abs().max().item() > max(3 * noise, 1e-6):
            return None
        prompt, completion = self.data.max_prompt_tokens, self.rollout.max_tokens
        return (
            f"{self._name} scores do not depend on the first token of a prompt of "
            f"data.max_prompt_tokens = {prompt} with a completion of rollout.max_tokens = "
            f"{completion}: the prompt is truncated. Lower the two limits, or use a teacher with a "
            "longer context."
        )

    def guesses(self, echo: Tensor) -> str | None:
        """Return an error if the scores are those of an untrained head. Add a warning if they are
        worse than a uniform guess."""
        uniform = math.log(self.checked.vocabulary)
        surprise = -echo.mean().item()
        if surprise < UNIFORM[0] * uniform:
            return None
        text = f"{self._name} the mean log-prob of plain English is {-surprise:.2f} per token"
        if surprise > UNIFORM[1] * uniform:
            self.warnings.append(
                f"{text}, worse than a uniform guess ({-uniform:.2f}). This is expected of random "
                "weights, but not of a trained language model."
            )
            return None
        return (
            f"{text}, as of an untrained model (-ln V = {-uniform:.2f}): its output head is "
            "untrained or its weights are lost. Use a checkpoint that was saved with its "
            "language-model head."
        )

    @property
    def _without_engine(self) -> str:
        return ", or set teacher.kind to hf to score without vLLM" if self.teacher.engine else ""

    @property
    def _name(self) -> str:
        return f"teacher.model: {self.teacher.model!r}:"


def _full_length(prompt: int, checked: Checked) -> list[Rollout]:
    """Return the longest text that the run allows (the first ``prompt`` tokens are its prompt), the
    same text again, and the text with another first token."""
    words = english(checked)
    text = (words * -(-checked.max_model_len // len(words)))[: checked.max_model_len]
    # A tokenizer of few words may map all of them to its unknown token.
    other = next(i for i in (*words, *checked.train[0].token_ids) if i != text[0])
    texts = {"full": text, "again": text, "changed": (other, *text[1:])}
    return [as_rollout(name, ids[:prompt], ids[prompt:]) for name, ids in texts.items()]


def _draw(sampler: Sampler, checked: Checked, engines: int) -> list[Rollout]:
    """Return one sampled completion per engine."""
    prompts: list[Prompt] = [checked.train[i % len(checked.train)] for i in range(engines)]
    return sampler.sample(prompts, [1] * engines, seed=0)


def _forward(
    teacher: LocalTeacherConfig, config: Any, vocabulary: int, rollout: Rollout
) -> Tensor | None:
    """Return log-probs of shape [T] computed by transformers, or None if the checkpoint is too
    large."""
    from seqkd.checks.memory import BYTES, GIB, size_of

    size = size_of(config).parameters * BYTES[teacher.precision]
    if size > min(REFERENCE_GIB * GIB, psutil.virtual_memory().available / 2):
        return None
    model: Any = load_causal_lm(teacher.model, teacher.precision, "teacher.model")
    ids = torch.tensor([[*rollout.prompt_ids, *rollout.completion_ids]])
    with torch.inference_mode():
        logits = model(ids).logits[0, len(rollout.prompt_ids) - 1 : -1, :vocabulary]
    logprobs = torch.log_softmax(logits.float(), -1)
    return logprobs.gather(-1, torch.tensor(rollout.completion_ids)[:, None]).squeeze(-1)


def _gap(pairs: Sequence[tuple[Rollout, Tensor]]) -> float:
    """Return the largest mean difference between a rollout's sampled and measured log-probs."""
    return max(distance(torch.tensor(r.rollout_logprobs), scored) for r, scored in pairs)
