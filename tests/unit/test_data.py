"""Reading prompts: what a row may be, and what is said when it is not."""

from __future__ import annotations

import json

import pytest

from seqkd.config import JsonlData
from seqkd.data import PromptStream, read_corpus, read_prompts
from seqkd.errors import DataError
from seqkd.types import Prompt


def read(tmp_path, tokenizer, rows, max_reference=0, **options):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    data = JsonlData(path=str(file), **options)
    return read_prompts(data, str(file), "data.path", tokenizer, 0, max_reference)


def test_a_prompt_is_rendered_with_the_chat_template(tmp_path, tokenizer):
    (prompt,), _ = read(tmp_path, tokenizer, [{"prompt": "hi"}], system="be brief")
    assert (
        tokenizer.decode(prompt.token_ids)
        == "<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"
    )
    assert prompt.reference_ids is None


def test_plain_text(tmp_path, tokenizer):
    (prompt,), _ = read(tmp_path, tokenizer, [{"prompt": "hi"}], chat=False)
    assert tokenizer.decode(prompt.token_ids) == "hi"


def test_answers_end_with_end_of_sequence(tmp_path, tokenizer):
    (prompt,), _ = read(
        tmp_path, tokenizer, [{"prompt": "hi", "reference": "yes"}], max_reference=16
    )
    assert tokenizer.decode(prompt.reference_ids) == "yes<|end|>"


def test_answers_beyond_the_longest_completion_are_left_out_and_counted(tmp_path, tokenizer):
    rows = [{"prompt": "a", "reference": "b" * 15}, {"prompt": "c", "reference": "d" * 16}]
    prompts, too_long = read(tmp_path, tokenizer, rows, max_reference=16)
    assert (len(prompts[0].reference_ids), len(prompts), too_long) == (16, 1, 1)


def test_equal_prompts_are_read_once_and_long_ones_counted(tmp_path, tokenizer):
    rows = [{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b" * 50}]
    prompts, too_long = read(tmp_path, tokenizer, rows, max_prompt_tokens=20)
    assert (len(prompts), too_long) == (1, 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        (["", "  "], "no rows"),
        ([{"prompt": "x" * 99}], "all 1 rows are longer than data.max_prompt_tokens = 20"),
        ([{"question": "x"}], "rows.jsonl:1: has no column 'prompt'; it has 'question'"),
        ([{"prompt": "a"}, {"prompt": 3}], "rows.jsonl:2: 'prompt' is 3, not text"),
        ([{"prompt": " "}], "not text"),
        (["{"], "rows.jsonl:1: is not JSON"),
        (["[1]"], "not a JSON object"),
    ],
)
def test_bad_rows_name_the_file_and_line(tmp_path, tokenizer, rows, message):
    with pytest.raises(DataError) as caught:
        read(tmp_path, tokenizer, rows, max_prompt_tokens=20)
    assert message in str(caught.value)


def test_line_separators_within_a_string_do_not_end_a_row(tmp_path, tokenizer):
    prompts, _ = read(tmp_path, tokenizer, ['{"prompt": "a\u2028b"}'])
    assert [p.text for p in prompts] == ["a\u2028b"]


def test_a_missing_answer(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no column 'reference'"):
        read(tmp_path, tokenizer, [{"prompt": "a"}], max_reference=16)


def test_a_missing_file(tmp_path, tokenizer):
    with pytest.raises(DataError, match="no such file"):
        read_prompts(JsonlData(path="x"), str(tmp_path / "x"), "data.path", tokenizer, 0, False)


def stream(seed=0):
    return PromptStream([Prompt(str(i), (i,), "") for i in range(10)], seed)


def test_an_epoch_has_every_prompt_once_and_the_next_another_order():
    s = stream()
    first, second = s.take(10), s.take(10)
    assert {p.prompt_id for p in first} == {p.prompt_id for p in second} == set(map(str, range(10)))
    assert first != second


def test_the_position_can_be_restored():
    a, b = stream(), stream()
    a.take(7)
    b.position = a.position
    assert a.take(9) == b.take(9)
    assert stream(1).take(5) != stream(0).take(5)


def test_a_corpus_is_cut_into_pieces(tmp_path, tokenizer):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"text": "abcdefgh"}\n{"text": "x"}\n')
    data = JsonlData(path="unused", corpus_path=str(file), corpus_tokens=4)
    pieces = read_corpus(data, tokenizer, 0)
    read = [tokenizer.decode((*p.token_ids, *p.reference_ids)) for p in pieces]
    assert read == ["abcd", "efgh", "x<|end|>"]
    assert len({p.prompt_id for p in pieces}) == 3


def test_a_corpus_without_text(tmp_path, tokenizer):
    file = tmp_path / "texts.jsonl"
    file.write_text('{"body": "abc"}\n')
    data = JsonlData(path="unused", corpus_path=str(file))
    with pytest.raises(DataError, match=r"data\.corpus_path: .*:1: has no column 'text'"):
        read_corpus(data, tokenizer, 0)


def test_several_answers_to_one_prompt_are_all_kept(tmp_path, tokenizer):
    rows = [{"prompt": "a", "reference": r} for r in ("b", "c", "b")]
    prompts, _ = read(tmp_path, tokenizer, rows, max_reference=16)
    assert [tokenizer.decode(p.reference_ids) for p in prompts] == ["b<|end|>", "c<|end|>"]
    assert len({p.prompt_id for p in prompts}) == 1


def test_a_template_that_refuses_a_system_message(tmp_path, tokenizer, monkeypatch):
    template = "{{ raise_exception('no system role') }}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(DataError, match=r"refuses the prompt: no system role\. Set data\.system"):
        read(tmp_path, tokenizer, [{"prompt": "a"}], system="be brief")
