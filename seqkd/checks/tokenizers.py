"""Compatibility of two models: tokenizers, end-of-sequence tokens, chat templates."""

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
"""Texts that compare tokenizers whose rules cannot be read."""
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
    """Raise ModelError unless both models have the same tokenizer: vocabulary, merges, special
    tokens and all rules that split a text. With ``plain_text``, also compare the special tokens
    that the tokenizer adds around a text. A chat template adds its own."""
    difference = next(_differences(student, teacher), None)
    if difference is None and plain_text:
        student_ids, teacher_ids = (t("a").input_ids for t in (student, teacher))
        if student_ids != teacher_ids:
            difference = (
                f"the text 'a' has ids {student_ids} in the student, {teacher_ids} in the teacher"
            )
    if difference:
        fix = (
            "Choose models with the same tokenizer."
            if field == "teacher.model"
            else "Scores require the same tokens. Set teacher.scores to none and sampler to "
            "teacher."
        )
        raise ModelError(
            f"{field}: its tokenizer differs from that of student.model: {difference}. {fix}"
        )


def _differences(student: Any, teacher: Any) -> Iterator[str]:
    """Yield differences, the most serious first, with an example for each."""
    student_vocabulary, teacher_vocabulary = student.get_vocab(), teacher.get_vocab()
    if student_vocabulary != teacher_vocabulary:
        differing = [
            t
            for t in student_vocabulary.keys() | teacher_vocabulary.keys()
            if student_vocabulary.get(t) != teacher_vocabulary.get(t)
        ]
        example = min(differing)
        yield (
            f"{len(differing)} tokens of the vocabulary, such as {example!r} (student id "
            f"{student_vocabulary.get(example)}, teacher id {teacher_vocabulary.get(example)})"
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
    """Return the parts of a fast tokenizer that determine the ids of a text, except the
    vocabulary."""
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    model = state["model"]
    options = {k: v for k, v in model.items() if k not in ("vocab", "merges")}
    # "special" affects only the decoding of a token, not the ids of a text.
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
        where, (student, teacher) = next((f"entry {i}: ", p) for i, p in pairs if p[0] != p[1])
    return f"{where}student {_short(student)}, teacher {_short(teacher)}"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:119] + "…"


# --- end-of-sequence tokens


def check_stop_ids(ids: tuple[int, ...], tokenizer: Any, vocabulary: int, field: str) -> None:
    """Raise ModelError unless each id is a token of the tokenizer and of the model's ``vocabulary``
    rows."""
    token_ids = set(tokenizer.get_vocab().values())
    for i in ids:
        if i not in token_ids or i >= vocabulary:
            raise ModelError(
                f"{field}: end-of-sequence id {i} is not a token of both the tokenizer "
                f"({len(token_ids)} tokens) and the model ({vocabulary} output rows). Correct "
                "eos_token_id in the model's generation_config.json."
            )


def check_same_stop_ids(
    student: tuple[int, ...], teacher: tuple[int, ...], tokenizer: Any
) -> str | None:
    """Return a warning if the student has stop ids that the teacher lacks, which is harmless.
    Raises ModelError if the teacher has stop ids that the student lacks, because the student's stop
    ids end the completions of both models."""
    if missing := [i for i in teacher if i not in student]:
        raise ModelError(
            f"teacher.model: its end-of-sequence token is {_named(missing, tokenizer)}, but "
            f"completions stop only at the student's {_named(student, tokenizer)}. Completions "
            f"would always run to rollout.max_tokens. {_fix(student, missing)}"
        )
    if extra := [i for i in student if i not in teacher]:
        return (
            f"student.model: completions also stop at {_named(extra, tokenizer)}, which does not "
            f"end the teacher's completions ({_named(teacher, tokenizer)}). If this is not "
            "intended, remove it from eos_token_id in the student's generation_config.json."
        )
    return None


def check_turn_end(tokenizer: Any, stop_ids: tuple[int, ...]) -> None:
    """Raise ModelError if the student's chat template ends an answer with a special token that is
    not a stop id. This happens when a base model is used with a chat template."""
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
            f"but completions stop only at {_named(stop_ids, tokenizer)}. Completions would always "
            f"run to rollout.max_tokens. {_fix(stop_ids, end[:1])}"
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
    """Raise ModelError with a diff if the two chat templates render a prompt differently, or return
    it as a warning with ``teacher.allow_template_mismatch``.

    Both models receive the student's rendering, so a teacher with another template would score and
    generate in a format that it was not trained on. A default system message in a template is
    ignored if the run sets a system message.
    """
    bare = [CONVERSATION] if data.system is None else []
    prompts = [(SYSTEM, *CONVERSATION), *bare]
    for messages in prompts:
        student_text, teacher_text = _render(student, messages), _render(teacher, messages)
        if student_text is None or student_text == teacher_text:
            continue  # the run never renders a prompt that the student's template rejects
        fix = (
            "Copy the teacher's chat template into the student's directory, or set "
            "teacher.allow_template_mismatch to true to continue anyway."
        )
        text = (
            "teacher.model: its chat template differs from the student's, which renders the "
            "prompts of both models."
        )
        diff = _diff(
            student_text,
            "(no chat template, or a template error)" if teacher_text is None else teacher_text,
        )
        if allow_template_mismatch:
            return f"{text}\n{diff}"
        raise ModelError(f"{text} {fix}\n{diff}")
    return None


def _render(tokenizer: Any, messages: Any, add_generation_prompt: bool = True) -> str | None:
    """Return a conversation as text, or None if there is no template or it raises an error."""
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
    """Return a unified diff of two renderings, indented and with visible line ends."""
    before, after = ([repr(line)[1:-1] for line in t.splitlines(True)] for t in (student, teacher))
    lines = list(difflib.unified_diff(before, after, "student", "teacher", n=1, lineterm=""))
    lines = [*lines[:DIFF_LINES], *(["…"] if len(lines) > DIFF_LINES else [])]
    return "\n".join(f"    {line}" for line in lines)
