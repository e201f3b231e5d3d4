"""Probe texts of the checks at the start."""

from __future__ import annotations

from types import SimpleNamespace

from seqkd.checks.startup import _full_length
from seqkd.types import Prompt


def test_the_first_token_is_changed_also_with_a_tokenizer_of_few_words():
    """Such a tokenizer maps every English word to its unknown token."""
    checked = SimpleNamespace(
        tokenizer=lambda text, add_special_tokens: SimpleNamespace(input_ids=[2, 2, 2]),
        train=[Prompt("a", (2, 5), "a")],
        max_model_len=8,
    )
    full, again, changed = _full_length(5, checked)
    assert full.prompt_ids == again.prompt_ids == (2,) * 5
    assert changed.prompt_ids[0] != 2 and changed.prompt_ids[1:] == full.prompt_ids[1:]
    assert full.completion_ids == changed.completion_ids == (2,) * 3
