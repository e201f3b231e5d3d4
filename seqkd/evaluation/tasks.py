"""Task accuracy: the share of completions whose result equals the result of the data set's answer.

Figures are named ``task_NAME`` for the student and ``teacher_task_NAME`` for the teacher, with the
names of ``evaluation.tasks``. Prompts without an answer are dropped.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from seqkd.config.tasks import TaskConfig
from seqkd.errors import DataError
from seqkd.evaluation.intervals import Array
from seqkd.evaluation.text import without_eos
from seqkd.types import Prompt, Rollout

PREFIX, TEACHER_PREFIX = "task_", "teacher_task_"
ANSWERED = "answered"
"""Name of the sums that count the completions of prompts with an answer."""


def result(text: str, pattern: str) -> str | None:
    """Return the last match of ``pattern``, or of its group if it has one. None without a match."""
    matches = re.findall(pattern, text)
    return matches[-1] if matches else None


def correct(task: TaskConfig, rollout: Rollout, text: str, answers: Sequence[str]) -> bool:
    """Return True if the completion ``rollout`` with the given text has the result of an answer."""
    own = result(text, task.pattern) if rollout.finish_reason == "stop" else None
    return own is not None and own in {result(answer, task.pattern) for answer in answers}


@dataclass(frozen=True)
class Tasks:
    """Tasks with the answers to the held-out prompts."""

    tasks: Mapping[str, TaskConfig]
    references: Mapping[str, Sequence[str]]
    """Answers of the data set by prompt id; prompts without an answer may be missing."""
    decode: Callable[[Sequence[int]], str]
    """Decoder from token ids to text, without special tokens."""

    def accuracy(self, rollouts: Sequence[Rollout]) -> dict[str, float | None]:
        """Return the accuracy on completions of one prompt by task. None without an answer or
        without completions."""
        answers = self.references.get(rollouts[0].prompt_id) if rollouts else None
        texts = [self.decode(without_eos(rollout)) for rollout in rollouts]
        pairs = list(zip(rollouts, texts, strict=True))
        return {
            name: sum(correct(task, *pair, answers) for pair in pairs) / len(pairs)
            if answers
            else None
            for name, task in self.tasks.items()
        }

    def sums(
        self, prompts: Sequence[Prompt], student: Sequence[Rollout], teacher: Sequence[Rollout]
    ) -> dict[str, Array]:
        """Return [P] the accuracy of both models at each prompt, and 1 at prompts with an answer;
        empty without tasks."""
        if not self.tasks:
            return {}
        columns = {ANSWERED: np.array([float(p.prompt_id in self.references) for p in prompts])}
        for prefix, rollouts in ((PREFIX, student), (TEACHER_PREFIX, teacher)):
            groups: dict[str, list[Rollout]] = {p.prompt_id: [] for p in prompts}
            for rollout in rollouts:
                groups[rollout.prompt_id].append(rollout)
            rows = [self.accuracy(group) for group in groups.values()]
            for name in self.tasks:
                columns[prefix + name] = np.array([row[name] or 0.0 for row in rows])
        return columns


def with_tasks(figures: Iterable[str], *columns: Iterable[str]) -> list[str]:
    """Return the names of the task accuracies in ``columns``, followed by ``figures``: the order of
    figures in tables."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [*(name for name in names if name.startswith((PREFIX, TEACHER_PREFIX))), *figures]


def check_tasks(tasks: Mapping[str, TaskConfig], references: Mapping[str, Sequence[str]]) -> None:
    """Raise DataError if no held-out prompt has an answer, or if an answer has no result."""
    if tasks and not references:
        raise DataError(
            "evaluation.tasks: no held-out prompt has an answer. Set data.reference_key to the "
            "column of the answers, or evaluation.tasks to {}."
        )
    for name, task in tasks.items():
        for answer in (answer for answers in references.values() for answer in answers):
            if result(answer, task.pattern) is None:
                raise DataError(
                    f"evaluation.tasks.{name}.pattern: {task.pattern!r} does not match the answer "
                    f"{answer[:80]!r} to a held-out prompt. Change the pattern, or set "
                    "data.reference_key to the column of the answers."
                )
