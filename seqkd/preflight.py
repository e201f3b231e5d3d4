"""Every check that needs no training step: models, tokenizers, data, lengths, run directory.

:func:`check` raises on the first thing that makes the run impossible and returns what the run
needs, with warnings beside it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from seqkd.config import Config
from seqkd.data import read_prompts
from seqkd.errors import DataError, ModelError
from seqkd.models import end_of_sequence_ids, load_config, load_tokenizer
from seqkd.types import Prompt


@dataclass(frozen=True)
class Checked:
    """What the checks had to load anyway."""

    tokenizer: Any
    stop_ids: tuple[int, ...]
    train: list[Prompt]
    heldout: list[Prompt]
    max_model_len: int
    warnings: tuple[str, ...]


def check(config: Config) -> Checked:
    """Raises ModelError or DataError, naming the field, the value and the mend."""
    warnings: list[str] = []
    student = load_config(config.student.model, "student.model")
    teacher = load_config(config.teacher.model, "teacher.model")
    tokenizer = load_tokenizer(config.student.model, "student.model")
    _same_tokenizer(tokenizer, load_tokenizer(config.teacher.model, "teacher.model"), config)
    if student.vocab_size != teacher.vocab_size:
        warnings.append(
            f"student.model has {student.vocab_size} output rows, teacher.model "
            f"{teacher.vocab_size}: divergences use the first "
            f"{min(student.vocab_size, teacher.vocab_size)}, the rest is padding."
        )
    stop_ids = end_of_sequence_ids(config.student.model, tokenizer)
    max_model_len = config.data.max_prompt_tokens + config.rollout.max_tokens
    for field, model in (("student.model", student), ("teacher.model", teacher)):
        context = getattr(model, "max_position_embeddings", None)
        if context and max_model_len > context:
            raise ModelError(
                f"{field}: data.max_prompt_tokens {config.data.max_prompt_tokens} + "
                f"rollout.max_tokens {config.rollout.max_tokens} = {max_model_len} is beyond its "
                f"context of {context}. Lower one of the two."
            )
    train, heldout = _prompts(config, tokenizer, stop_ids[0], warnings)
    return Checked(tokenizer, stop_ids, train, heldout, max_model_len, tuple(warnings))


def _prompts(
    config: Config, tokenizer: Any, eos_id: int, warnings: list[str]
) -> tuple[list[Prompt], list[Prompt]]:
    data = config.data
    references = any(phase.sampler == "dataset" for _, phase in config.phases)
    train, too_long = read_prompts(data, data.path, "data.path", tokenizer, eos_id, references)
    if too_long:
        warnings.append(f"data.path: {too_long} prompts left out, longer than max_prompt_tokens.")
    if not config.evaluation.prompts or data.heldout_path is None:
        return train, []
    heldout, _ = read_prompts(
        data, data.heldout_path, "data.heldout_path", tokenizer, eos_id, references=False
    )
    seen = {prompt.prompt_id for prompt in train}
    leaked = sum(prompt.prompt_id in seen for prompt in heldout)
    if leaked:
        raise DataError(
            f"data.heldout_path: {data.heldout_path}: {leaked} of {len(heldout)} prompts are also "
            f"in data.path {data.path}. Remove them from one of the two."
        )
    if len(heldout) < config.evaluation.prompts:
        warnings.append(
            f"data.heldout_path has {len(heldout)} prompts, fewer than evaluation.prompts = "
            f"{config.evaluation.prompts}; all of them are used."
        )
    return train, heldout[: config.evaluation.prompts]


def _same_tokenizer(student: Any, teacher: Any, config: Config) -> None:
    """Token ids must mean the same to both models: same pieces, merges and special tokens."""
    ours, theirs = student.get_vocab(), teacher.get_vocab()
    problem = None
    if ours != theirs:
        differing = [t for t in ours.keys() | theirs.keys() if ours.get(t) != theirs.get(t)]
        example = min(differing)
        problem = (
            f"{len(differing)} tokens differ, such as {example!r} (student "
            f"{ours.get(example)}, teacher {theirs.get(example)})"
        )
    elif student.eos_token_id != teacher.eos_token_id:
        problem = (
            f"end-of-sequence is {student.eos_token!r} for the student, "
            f"{teacher.eos_token!r} for the teacher"
        )
    elif (text := _first_difference(student, teacher)) is not None:
        problem = f"they split {text!r} differently"
    if problem:
        raise ModelError(
            f"teacher.model: the tokenizers of {config.teacher.model!r} and of student.model "
            f"{config.student.model!r} differ: {problem}. Choose models with the same tokenizer."
        )


PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces\n\n\tand a tab",
    "naïve café, 東京, Привет, 🙂",
    "f(x) = 3.14159e-10; return [i for i in range(1000)]",
)


def _first_difference(student: Any, teacher: Any) -> str | None:
    return next((t for t in PROBES if student(t).input_ids != teacher(t).input_ids), None)
