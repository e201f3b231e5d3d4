"""Whether two models mean the same by a token: tokenizers, ends of completions, chat templates."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from jinja2 import TemplateError

from seqkd.config.data import DataConfig
from seqkd.errors import ModelError

PROBES = (
    "The quick brown fox jumps over the lazy dog.",
    "  two  spaces\n\n\tand a tab",
    "naïve café, 東京, Привет, 🙂",
    "f(x) = 3.14159e-10; return [i for i in range(1000)]",
)
"""Texts for tokenizers that do not tell how they work."""
ANSWER = "Paris."
CONVERSATION = (
    {"role": "user", "content": "What is the capital of France?"},
    {"role": "assistant", "content": ANSWER},
    {"role": "user", "content": "And of Italy?"},
)
SYSTEM = {"role": "system", "content": "Answer in one short sentence."}
DIFF_LINES = 12


# --- tokenizers


def check_same_tokenizer(student: Any, teacher: Any, field: str, plain_text: bool) -> None:
    """ModelError unless token ids mean the same to both models: vocabulary, merges, special
    tokens and every rule by which a text is split. With ``plain_text`` also the special tokens
    around a text; a chat template puts its own."""
    difference = next(_differences(student, teacher), None)
    if difference is None and plain_text:
        student_ids, teacher_ids = (t("a").input_ids for t in (student, teacher))
        if student_ids != teacher_ids:
            difference = (
                f"the text 'a' is {student_ids} to the student, {teacher_ids} to the teacher"
            )
    if difference:
        fix = (
            "Choose models with the same tokenizer."
            if field == "teacher.model"
            else "Scores are of the same tokens: set teacher.scores to none and sampler to teacher."
        )
        raise ModelError(
            f"{field}: its tokenizer differs from that of student.model: {difference}. {fix}"
        )


def _differences(student: Any, teacher: Any) -> Iterator[str]:
    """What differs, the gravest first, each with an example."""
    student_vocabulary, teacher_vocabulary = student.get_vocab(), teacher.get_vocab()
    if student_vocabulary != teacher_vocabulary:
        differing = [
            t
            for t in student_vocabulary.keys() | teacher_vocabulary.keys()
            if student_vocabulary.get(t) != teacher_vocabulary.get(t)
        ]
        example = min(differing)
        yield (
            f"{len(differing)} tokens of the vocabulary, such as {example!r} (student "
            f"{student_vocabulary.get(example)}, teacher {teacher_vocabulary.get(example)})"
        )
    if student.is_fast and teacher.is_fast:
        student_rules, teacher_rules = _rules(student), _rules(teacher)
        for part in dict.fromkeys((*student_rules, *teacher_rules)):
            if student_rules.get(part) != teacher_rules.get(part):
                yield f"{part} ({_example(student_rules.get(part), teacher_rules.get(part))})"
    for text in PROBES:
        student_ids, teacher_ids = (
            t(text, add_special_tokens=False).input_ids for t in (student, teacher)
        )
        if student_ids != teacher_ids:
            yield f"they split {text!r} differently"


def _rules(tokenizer: Any) -> dict[str, Any]:
    """The parts of a fast tokenizer that decide which ids a text gets, the vocabulary aside."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    options = {k: v for k, v in model.items() if k not in ("vocab", "merges")}
    # Whether a token counts as special decides what a decoded text shows, not which ids it has.
    added = [{k: v for k, v in t.items() if k != "special"} for t in state["added_tokens"]]
    return {
        "merges": model.get("merges"),
        "normalizer": state["normalizer"],
        "pre-tokenizer": state["pre_tokenizer"],
        "special and added tokens": added,
        "options of the model": options,
    }


def _example(student: Any, teacher: Any) -> str:
    where = ""
    if isinstance(student, list) and isinstance(teacher, list):
        pairs = enumerate(zip_longest(student, teacher))
        where, (student, teacher) = next((f"number {i}: ", p) for i, p in pairs if p[0] != p[1])
    return f"{where}student {_short(student)}, teacher {_short(teacher)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:119] + "…"


# --- ends of completions


def check_stop_ids(ids: tuple[int, ...], tokenizer: Any, vocabulary: int, field: str) -> None:
    """ModelError unless each is a token of the tokenizer and of the model's ``vocabulary`` rows."""
    token_ids = set(tokenizer.get_vocab().values())
    for i in ids:
        if i not in token_ids or i >= vocabulary:
            raise ModelError(
                f"{field}: end-of-sequence id {i} is no token of its tokenizer ({len(token_ids)} "
                f"tokens) and model ({vocabulary} output rows). Correct eos_token_id in its "
                "generation_config.json."
            )


def check_same_stop_ids(
    student: tuple[int, ...], teacher: tuple[int, ...], tokenizer: Any
) -> str | None:
    """ModelError where the teacher ends with a token at which completions do not stop: the
    student's stop ids end both models' completions. A warning for the harmless reverse."""
    if missing := [i for i in teacher if i not in student]:
        raise ModelError(
            f"teacher.model: ends with {_named(missing, tokenizer)}, but completions stop only at "
            f"the student's {_named(student, tokenizer)}; they would run on to "
            f"rollout.max_tokens. {_fix(student, missing)}"
        )
    if extra := [i for i in student if i not in teacher]:
        return (
            f"student.model: completions also stop at {_named(extra, tokenizer)}, with which the "
            f"teacher does not end ({_named(teacher, tokenizer)}). If that is not meant, leave it "
            "out of eos_token_id in the student's generation_config.json."
        )
    return None


def check_turn_end(tokenizer: Any, stop_ids: tuple[int, ...]) -> None:
    """ModelError where the student's chat template ends an answer with a special token that does
    not stop a completion, as a base model's end of sequence under a chat template does not."""
    rendered = _render(tokenizer, CONVERSATION[:2], add_generation_prompt=False)
    if rendered is None or ANSWER not in rendered:
        return
    rest = rendered[rendered.rindex(ANSWER) + len(ANSWER) :]
    ids = tokenizer(rest, add_special_tokens=False).input_ids
    added = set(tokenizer.added_tokens_decoder)
    end = [i for i in ids if i in added]
    if end and not set(end) & set(stop_ids):
        raise ModelError(
            f"student.model: its chat template ends an answer with {_named(end[:1], tokenizer)}, "
            f"but completions stop only at {_named(stop_ids, tokenizer)}; they would run on to "
            f"rollout.max_tokens. {_fix(stop_ids, end[:1])}"
        )


def _fix(stop_ids: tuple[int, ...], missing: list[int]) -> str:
    ids = list(dict.fromkeys((*stop_ids, *missing)))
    return f"Set eos_token_id in the student's generation_config.json to {ids}."


def _named(ids: Any, tokenizer: Any) -> str:
    return ", ".join(f"{i} {tokenizer.convert_ids_to_tokens(i)!r}" for i in ids)


# --- chat templates


def check_same_template(
    student: Any, teacher: Any, allow_template_mismatch: bool, data: DataConfig
) -> str | None:
    """ModelError with a diff where the two chat templates render a prompt differently; only a
    warning with ``teacher.allow_template_mismatch``. Both models get the student's rendering, so a
    teacher with another one would judge and write in a form that it was not trained on.

    What a template says by itself where there is no system message does not matter to a run that
    has one.
    """
    bare = [CONVERSATION] if data.system is None else []
    prompts = [(SYSTEM, *CONVERSATION), *bare]
    for messages in prompts:
        student_text, teacher_text = _render(student, messages), _render(teacher, messages)
        if (
            student_text is None or student_text == teacher_text
        ):  # a prompt that the student's refuses is never rendered
            continue
        fix = (
            "Copy the teacher's chat template into the student's directory, or set "
            "teacher.allow_template_mismatch to true to continue anyway."
        )
        text = "teacher.model: has another chat template than the student, whose prompts it gets."
        diff = _diff(
            student_text,
            "(no chat template, or it refuses)" if teacher_text is None else teacher_text,
        )
        if allow_template_mismatch:
            return f"{text}\n{diff}"
        raise ModelError(f"{text} {fix}\n{diff}")
    return None


def _render(tokenizer: Any, messages: Any, add_generation_prompt: bool = True) -> str | None:
    """A conversation as text; None where there is no template or it refuses."""
    if tokenizer.chat_template is None:
        return None
    try:
        rendered: str = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=add_generation_prompt, tokenize=False
        )
    except TemplateError:
        return None
    return rendered


def _diff(student: str, teacher: str) -> str:
    """A unified diff of two renderings, its lines indented, with line ends shown."""
    before, after = ([repr(line)[1:-1] for line in t.splitlines(True)] for t in (student, teacher))
    lines = list(difflib.unified_diff(before, after, "student", "teacher", n=1, lineterm=""))
    lines = [*lines[:DIFF_LINES], *(["…"] if len(lines) > DIFF_LINES else [])]
    return "\n".join(f"    {line}" for line in lines)
