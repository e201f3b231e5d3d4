"""Reading of prompts: accepted rows, the student's input, and error messages."""

from __future__ import annotations

import copy
import json

import datasets
import pyarrow as pa
import pytest
from pydantic import ValidationError
from tokenizers import processors

from seqkd.config.data import DataConfig
from seqkd.config.run import Config
from seqkd.data.corpus import read_corpus
from seqkd.data.dataset import Reader, read_data
from seqkd.data.readers import Source
from seqkd.data.stream import PromptStream
from seqkd.errors import DataError
from seqkd.training.rollouts import reference_rollout
from seqkd.types import Prompt
from tests.unit.config.test_config import MINIMAL

EOS = 0
TURNS = ["q1", "a1", "q2", "a2"]
THINKING_TEMPLATE = (  # like Qwen3's: earlier thinking is removed, and it can be turned off
    "{% for m in messages %}<|{{ m['role'] }}|>"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'].split('</think>')[-1] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and enable_thinking is false %}<think>\n\n</think>\n\n"
    "{% endif %}{% endif %}"
)


def chat(*contents, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def jsonl(path, rows):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return str(path)


@pytest.fixture
def reader(tmp_path, tokenizer):
    """Function that reads rows and returns the reader."""

    def read(rows, longest=0, **options):
        path = jsonl(tmp_path / "rows.jsonl", rows)
        source = Source("data.path", path)
        return Reader(source, DataConfig(path=path, **options), tokenizer, EOS, longest).read()

    return read


@pytest.fixture
def shown(reader, tokenizer):
    """Function that reads rows and returns prompts and answers as text, in order."""

    def read(rows, longest=0, **options):
        return [
            (tokenizer.decode(p.token_ids), p.reference_ids and tokenizer.decode(p.reference_ids))
            for p in reader(rows, longest, **options).table()
        ]

    return read


# --- the student's input


def test_a_prompt_is_rendered_with_the_chat_template(shown):
    ((prompt, reference),) = shown([{"prompt": "hi"}], system="be brief")
    assert prompt == "<|system|>be brief<|end|><|user|>hi<|end|><|assistant|>"
    assert reference is None


def test_plain_text(shown):
    assert shown([{"prompt": "hi"}], chat=False) == [("hi", None)]


def test_answers_end_with_end_of_sequence(shown):
    assert shown([{"prompt": "hi", "reference": "yes"}], 16)[0][1] == "yes<|end|>"


def test_every_turn_of_a_conversation_is_a_prompt_and_its_answer(shown):
    row = {"prompt": "q1", "prompt_id": "f00", "messages": chat(*TURNS)}  # as in UltraChat 200k
    first = "<|user|>q1<|end|><|assistant|>"
    second = f"{first}a1<|end|><|user|>q2<|end|><|assistant|>"
    both = [(first, "a1<|end|>"), (second, "a2<|end|>")]
    assert shown([row], 16) == both
    assert shown([row], 16, turns="first") == both[:1]
    assert shown([row], 16, turns="last") == both[1:]
    assert shown([row], 16, format="prompt", reference_key="prompt_id") == [(first, "f00<|end|>")]


def test_unanswered_conversations(reader, tokenizer):
    rows = [{"messages": chat("q1", "a1", "q2")}, {"messages": chat("q3", "")}]
    prompts = list(reader(rows).table())
    assert [p.text for p in prompts] == ["q1", "q2", "q3"]
    assert all(p.reference_ids is None for p in prompts)
    read = reader(rows, longest=16)
    assert [p.text for p in read.table()] == ["q1"]
    assert read.warnings() == ["data.path: 2 prompts dropped: they have no answer."]


@pytest.mark.parametrize(
    ("row", "prompt", "answer"),
    [
        ({"instruction": "add", "input": "1, 2", "output": "3", "text": "x"}, "add\n\n1, 2", "3"),
        ({"instruction": "sing", "input": "", "output": "la", "text": "x"}, "sing", "la"),
        (
            {"instruction": "who", "context": "Ann", "response": "Ann", "category": "qa"},
            "who\n\nAnn",
            "Ann",
        ),
        ({"prompt": "a", "completion": "b"}, "a", "b"),
        ({"prompt": chat("a"), "completion": chat("b", first="assistant")}, "a", "b"),
    ],
    ids=["alpaca", "alpaca without input", "dolly", "prompt/completion", "conversational"],
)
def test_published_formats(shown, row, prompt, answer):
    assert shown([row], 16) == [(f"<|user|>{prompt}<|end|><|assistant|>", f"{answer}<|end|>")]


def test_only_the_completion_of_a_conversational_prompt_is_trained_on(shown):
    row = {"prompt": chat("q1", "a1", "q2"), "completion": chat("a2", first="assistant")}
    ((prompt, answer),) = shown([row], 16)
    assert (prompt.count("a1"), answer) == (1, "a2<|end|>")


def test_a_conversation_keeps_its_own_system_message(reader):
    own, blank = ({"role": "system", "content": text} for text in ("own", ""))
    rows = [[own, *chat("q", "a")], chat("q", "a"), [blank, *chat("q2", "a")]]
    prompts = reader([{"messages": row} for row in rows], system="ours").table()
    assert [p.messages[0][1] for p in prompts] == ["own", "ours", "ours"]
    assert [[text for _, text in p.messages[1:]] for p in prompts] == [["q"], ["q"], ["q2"]]


def test_other_roles_are_passed_to_the_template(shown):
    messages = [*chat("q", "call"), {"role": "tool", "content": "42"}, *chat("a")]
    messages[-1]["role"] = "assistant"
    assert shown([{"messages": messages}], 16)[1] == (
        "<|user|>q<|end|><|assistant|>call<|end|><|tool|>42<|end|><|assistant|>",
        "a<|end|>",
    )


def test_thinking(shown, tokenizer, monkeypatch):
    monkeypatch.setattr(tokenizer, "chat_template", THINKING_TEMPLATE)
    rows = [{"messages": chat("q1", "<think>hm</think>a1", "q2", "a2")}]
    history = "<|user|>q1<|end|>\n<|assistant|>a1<|end|>\n<|user|>q2<|end|>\n<|assistant|>"
    assert shown(rows, 32, thinking=True)[1] == (history, "a2<|end|>")
    assert shown(rows, 32)[1] == (history, "a2<|end|>")
    without = shown(rows, 32, thinking=False)
    assert without[1] == (history + "<think>\n\n</think>\n\n", "a2<|end|>")


def test_a_template_without_thinking_is_rejected(reader):
    with pytest.raises(DataError, match=r"data\.thinking: is false, .* no option enable_thinking"):
        reader([{"prompt": "a"}], thinking=False)


def test_a_template_that_renders_answers_differently_is_a_warning(reader, tokenizer, monkeypatch):
    rows = [{"prompt": "q", "reference": "a"}]
    monkeypatch.setattr(tokenizer, "chat_template", THINKING_TEMPLATE)

    def warnings(**options):
        read = reader(rows, 16, **options)
        read.table()
        return read.warnings()

    (warning,) = warnings()
    assert "|assistant|><think>" in warning.split("is trained on")[0]
    assert "|assistant|>a<|end|>'" in warning.split("is trained on")[1]
    assert warning.endswith("Set data.thinking.")
    assert warnings(thinking=False) == []  # the text before the answer is part of the prompt
    for end in ("<|end|>bye", "<|pad|>"):
        changed = THINKING_TEMPLATE.replace("<|end|>\n", end)
        monkeypatch.setattr(tokenizer, "chat_template", changed)
        (warning,) = warnings(thinking=False)
        assert f"{end}', but" in warning
    assert "is trained on '/think>\\n\\na<|end|>'" in warning


def test_a_template_that_rejects_a_system_message(reader, tokenizer, monkeypatch):
    template = "{{ raise_exception('no system role') }}"
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(DataError, match=r"rejects the prompt: no system role\. Set data\.system"):
        reader([{"prompt": "a"}], system="be brief").table()


def test_the_row_that_the_template_rejects_is_reported(reader, tokenizer, monkeypatch):
    template = (
        "{% for m in messages %}{% if loop.index0 % 2 != (m['role'] == 'assistant') %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}{{ m['content'] }}{% endfor %}"
    )
    monkeypatch.setattr(tokenizer, "chat_template", template)
    rows = [{"messages": chat(*TURNS)}, {"messages": [*chat("a"), *chat("b", "c")]}]
    with pytest.raises(DataError, match=r"rows\.jsonl:2: .* alternate\. Fix or remove the row"):
        reader(rows).table()


def test_prompts_keep_their_messages_for_a_teacher_with_another_template(reader):
    prompts = reader([{"messages": chat(*TURNS)}]).table()
    assert prompts[1].messages == (("user", "q1"), ("assistant", "a1"), ("user", "q2"))
    assert prompts[1].text == "q2"


def test_tags(reader):
    rows = [{"prompt": "a", "category": "qa"}]
    assert reader(rows, tag_key="category").table()[0].tag == "qa"
    with pytest.raises(DataError, match="'kind' is None, not text"):
        reader(rows, tag_key="kind")


@pytest.fixture
def with_begin(tokenizer):
    """Tokenizer of a model whose sequences begin with a special token."""
    begin = copy.deepcopy(tokenizer)
    begin.bos_token = "<|system|>"
    begin.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|system|> $A", special_tokens=[("<|system|>", begin.bos_token_id)]
    )
    return begin


def test_plain_text_gets_a_beginning_of_sequence_token_and_chats_do_not(tmp_path, with_begin):
    path = jsonl(tmp_path / "rows.jsonl", [{"prompt": "abcdef", "reference": "x"}])

    def shown(**options):
        data = DataConfig(path=path, **options)
        (prompt,) = Reader(Source("data.path", path), data, with_begin, EOS, 8).read().table()
        return [with_begin.decode(ids) for ids in (prompt.token_ids, prompt.reference_ids)]

    assert shown() == ["<|user|>abcdef<|end|><|assistant|>", "x<|end|>"]
    assert shown(chat=False) == ["<|system|>abcdef", "x<|end|>"]
    cut = shown(chat=False, max_prompt_tokens=4, too_long="truncate")
    assert cut == ["<|system|>def", "x<|end|>"]


# --- long rows, duplicate rows


def test_long_prompts_and_answers_are_dropped_and_counted_separately(reader):
    rows = [
        {"prompt": "a", "reference": "b" * 15},
        {"prompt": "c", "reference": "d" * 16},
        {"prompt": "e" * 99, "reference": "f"},
    ]
    read = reader(rows, longest=16, max_prompt_tokens=64)
    (prompt,) = read.table()
    assert len(prompt.reference_ids) == 16
    assert read.warnings() == [
        "data.path: 1 prompts dropped: longer than data.max_prompt_tokens = 64.",
        "data.path: 1 prompts dropped: their answers are longer than rollout.max_tokens = 16.",
    ]


def test_a_truncated_answer_has_no_end_of_sequence(reader, tokenizer):
    rows = [{"prompt": "a", "reference": "b" * 15}, {"prompt": "c", "reference": "d" * 20}]
    read = reader(rows, longest=16, too_long="truncate")
    whole, cut = (reference_rollout(prompt, "dataset") for prompt in read.table())
    assert tokenizer.decode(whole.completion_ids) == "b" * 15 + "<|end|>"
    assert tokenizer.decode(cut.completion_ids) == "d" * 16
    assert (whole.finish_reason, cut.finish_reason) == ("stop", "length")
    assert read.warnings() == [
        "data.path: 1 answers truncated to rollout.max_tokens = 16, without an end-of-sequence "
        "token."
    ]


def test_a_truncated_prompt_loses_its_oldest_exchanges(reader, tokenizer):
    messages = [{"role": "system", "content": "s"}, *chat("q" * 30, "a", "q2", "b", "q3", "c")]
    read = reader([{"messages": messages}], longest=8, max_prompt_tokens=20, too_long="truncate")
    table = read.table()
    assert [tokenizer.decode(p.token_ids) for p in table] == [
        "<|system|>s<|end|><|user|>q2<|end|><|assistant|>",
        "<|system|>s<|end|><|user|>q2<|end|><|assistant|>b<|end|><|user|>q3<|end|><|assistant|>",
    ]
    assert [tokenizer.decode(p.reference_ids) for p in table] == ["b<|end|>", "c<|end|>"]
    assert table[1].messages == (
        ("system", "s"), ("user", "q2"), ("assistant", "b"), ("user", "q3")
    )  # fmt: skip
    assert read.summary.truncated_prompts == 2
    assert read.summary.long_prompts == 1, "the first turn does not fit by itself"


def test_truncated_plain_text_loses_its_first_tokens(reader, tokenizer):
    row = {"prompt": "abcdefgh", "reference": "x"}
    read = reader([row], longest=8, max_prompt_tokens=3, too_long="truncate", chat=False)
    (prompt,) = read.table()
    assert tokenizer.decode(prompt.token_ids) == prompt.text == "fgh"
    assert tokenizer.decode(prompt.reference_ids) == "x<|end|>"
    assert read.summary.truncated_prompts == 1


def test_duplicate_prompts_are_dropped_and_counted(reader):
    read = reader([{"prompt": "a"}, {"prompt": "a"}, {"prompt": "b"}])
    assert [p.text for p in read.table()] == ["a", "b"]
    assert "1 prompts dropped: duplicates" in read.warnings()[0]


def test_several_answers_to_one_prompt_are_all_kept(reader, tokenizer):
    rows = [{"prompt": "a", "reference": r} for r in ("b", "c", "b")]
    prompts = reader(rows, longest=16).table()
    assert [tokenizer.decode(p.reference_ids) for p in prompts] == ["b<|end|>", "c<|end|>"]
    assert len({p.prompt_id for p in prompts}) == 1


def test_a_row_with_several_instances_or_answers_is_split(reader, shown):
    """SelfInst's instances, and a list of answers."""
    both = [{"input": "one", "output": "1"}, {"input": "two", "output": ["2", "II"]}]
    row = {"instruction": "Write a number.", "instances": both}
    chat = {"longest": 99, "chat": False}
    assert [(prompt, answer[: -len("<|end|>")]) for prompt, answer in shown([row], **chat)] == [
        ("Write a number.\n\none", "1"),
        ("Write a number.\n\ntwo", "2"),
        ("Write a number.\n\ntwo", "II"),
    ]
    several = reader([{"prompt": "b", "answer": ["x", "y"]}], longest=99)
    assert len(several.table()) == 2


def test_held_out_answers_are_kept_as_text_by_prompt(tmp_path, tokenizer):
    rows = [
        {"prompt": "a", "answer": "1"},
        {"prompt": "b", "answer": ["x", "y"]},
        {"prompt": "c"},
        {"prompt": "a", "answer": "one"},
        {"prompt": "d", "answer": "z"},
    ]
    path = jsonl(tmp_path / "rows.jsonl", rows)
    source = Source("data.heldout_path", path)
    heldout = Reader(source, DataConfig(path=path), tokenizer, EOS, limit=3).read()
    assert [(p.text, heldout.answers.get(p.prompt_id)) for p in heldout.table()] == [
        ("a", ["1", "one"]), ("b", ["x", "y"]), ("c", None)
    ]  # fmt: skip
    assert len(heldout.answers) == 2


def test_the_table_is_a_sequence_over_batches(reader, monkeypatch):
    whole = list(reader([{"messages": chat(f"q{i}", "a", "b", "c")} for i in range(9)]).table())
    monkeypatch.setattr("seqkd.data.dataset.BATCH", 4)
    table = reader([{"messages": chat(f"q{i}", "a", "b", "c")} for i in range(9)]).table()
    assert len(table.columns["tag"].chunks) > 3
    assert list(table) == whole
    assert len(whole) == len(table) == 18
    assert (table[-1], table[3:5]) == (whole[-1], whole[3:5])
    assert list(table.lengths("token_ids")) == [len(p.token_ids) for p in whole]
    with pytest.raises(IndexError):
        table[18]


# --- invalid rows


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        (["", "  "], "no rows"),
        ([{"prompt": "x" * 99}], "all 1 prompts are longer than data.max_prompt_tokens = 20"),
        (
            [{"question": "x"}],
            "rows.jsonl:1: has no column 'messages' or 'instruction' or 'prompt'; it has "
            "'question'. Set data.messages_key",
        ),
        ([{"prompt": "a"}, {"prompt": 3}], "rows.jsonl:2: 'prompt' is 3, not text"),
        ([{"prompt": "a"}, {"b": 3}], "rows.jsonl:2: has no column 'prompt'; it has 'b'"),
        ([{"prompt": "a"}, {}], "rows.jsonl:2: has no column 'prompt'; it has none"),
        ([{"prompt": " "}], "not text"),
        (["{"], "rows.jsonl:1: is not valid JSON"),
        (["[1]"], "not a JSON object"),
        ([{"messages": []}], "rows.jsonl:1: 'messages' is [], not a list of messages"),
        ([{"messages": "hi"}], "'messages' is 'hi', not a list of messages"),
        ([{"messages": [{"from": "human", "value": "hi"}]}], "message 1 of 'messages' is {'from'"),
        ([{"messages": chat("a", "", "b", "c")}], "message 2 of 'messages': 'content' is ''"),
        ([{"messages": chat("")}], "message 1 of 'messages': 'content' is ''"),
        ([{"messages": [{"role": "user", "content": [{"type": "image"}]}]}], "not text"),
        ([{"messages": chat("a", first="assistant")}], "'messages' has no user message"),
        (
            [{"messages": [*chat("a"), {"role": "assistant", "content": "", "tool_calls": [1]}]}],
            "message 2 of 'messages' has tool_calls",
        ),
    ],
)
def test_invalid_rows_are_reported_with_file_and_line(reader, rows, message):
    with pytest.raises(DataError) as caught:
        reader(rows, max_prompt_tokens=20).table()
    assert message in str(caught.value)


def test_line_separators_within_a_string_do_not_end_a_row(reader):
    rows = ['{"prompt": "a\u2028b"}', '{"prompt":\r"c"}']
    assert [p.text for p in reader(rows).table()] == ["a\u2028b", "c"]


def test_missing_answers_are_reported(reader):
    with pytest.raises(DataError, match=r"none of the 1 prompts has .* Set data\.reference_key"):
        reader([{"prompt": "a"}], longest=16).table()
    with pytest.raises(DataError, match=r"1 prompts has an answer in column 'gold'\. Set data"):
        reader([{"prompt": "a"}], longest=16, reference_key="gold").table()
    rows = [{"prompt": "a", "output": ""}, {"prompt": "b"}, {"prompt": "c", "output": "d"}]
    read = reader(rows, longest=16)
    assert [p.text for p in read.table()] == ["c"]
    assert read.summary.unanswered == 2


# --- held-out prompts


@pytest.fixture
def split(tmp_path, tokenizer):
    def read(train, heldout=None, wanted=4, **options):
        if heldout is not None:
            options["heldout_path"] = jsonl(tmp_path / "heldout.jsonl", heldout)
        data = {"path": jsonl(tmp_path / "train.jsonl", train), **options}
        config = {**MINIMAL, "data": data, "evaluation": {"prompts": wanted}}
        return read_data(Config.model_validate(config), tokenizer, (EOS,))

    return read


def test_the_training_split_does_not_apply_to_a_held_out_file(tmp_path, tokenizer):
    rows = datasets.DatasetDict({"sft": datasets.Dataset.from_list([{"prompt": "a"}])})
    rows.save_to_disk(tmp_path / "saved")
    data = {
        "path": str(tmp_path / "saved"),
        "split": "sft",
        "heldout_path": jsonl(tmp_path / "heldout.jsonl", [{"prompt": "b"}]),
    }
    config = {**MINIMAL, "data": data, "evaluation": {"prompts": 1}}
    sides = read_data(Config.model_validate(config), tokenizer, (EOS,))
    assert [[p.messages[0][1] for p in side] for side in (sides.train, sides.heldout)] == [
        ["a"],
        ["b"],
    ]


def conversations(count):
    return [{"messages": chat(f"question {i}", "a", f"more {i}", "b")} for i in range(count)]


def test_a_fraction_keeps_each_conversation_on_one_side(split):
    data = split(conversations(400), wanted=1000, heldout_fraction=0.2)
    sides = [{p.messages[0][1] for p in side} for side in (data.train, data.heldout)]
    assert not sides[0] & sides[1]
    assert len(sides[0] | sides[1]) == 400
    assert 50 <= len(sides[1]) <= 110
    assert len(data.heldout) == 2 * len(sides[1])
    assert len(data.train) == 2 * len(sides[0])


def test_the_split_does_not_depend_on_row_order_or_added_rows(split):
    few = split(conversations(100), wanted=1000, heldout_fraction=0.3)
    many = split(conversations(200)[::-1], wanted=1000, heldout_fraction=0.3)
    for a, b in ((few.train, many.train), (few.heldout, many.heldout)):
        assert {p.prompt_id for p in a} <= {p.prompt_id for p in b}


def test_conversations_with_the_same_beginning_are_on_the_same_side(split):
    pairs = ((f"Ask  {i} ", f"ask {i}") for i in range(40))
    rows = [{"messages": chat(text, "a")} for pair in pairs for text in pair]
    data = split(rows, wanted=1000, heldout_fraction=0.5)
    sides = [{p.text.lower().split()[1] for p in side} for side in (data.train, data.heldout)]
    assert all(sides)
    assert not sides[0] & sides[1]


def test_held_out_conversations_are_never_trained_on(split):
    """Also if there is no evaluation."""
    evaluated = split(conversations(50), wanted=1000, heldout_fraction=0.3)
    unevaluated = split(conversations(50), wanted=0, heldout_fraction=0.3)
    assert list(unevaluated.train) == list(evaluated.train)
    assert len(unevaluated.heldout) == 0


def test_a_fraction_without_held_out_conversations_is_rejected(split):
    with pytest.raises(DataError, match=r"no conversations with data\.heldout_fraction 0\.001"):
        split(conversations(3), heldout_fraction=0.001)


def test_two_files_that_share_a_conversation_are_rejected(split):
    heldout = [{"messages": chat("Question  3", "another answer")}, {"messages": chat("new", "x")}]
    with pytest.raises(DataError, match=r"1 of 2 prompts are also in data\.path .*train\.jsonl"):
        split(conversations(5), heldout)
    assert len(split(conversations(3), heldout).heldout) == 2


def test_held_out_prompts_beyond_the_limit_are_checked_but_not_kept(split):
    rows = [{"prompt": f"h{i}"} for i in range(6)]
    assert [p.text for p in split([{"prompt": "a"}], rows, wanted=3).heldout] == ["h0", "h1", "h2"]
    with pytest.raises(DataError, match="1 of 6 prompts"):
        split([{"prompt": "h5"}], rows, wanted=3)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heldout_fraction": 0.1, "heldout_path": "b"}, "Set only one of them"),
        ({"heldout_fraction": 0.1, "heldout_split": "test"}, "Set only one of them"),
        ({"heldout_split": "train"}, "'train' is also the training split"),
        ({"streaming": True}, "rows is not set. Set rows"),
        ({"thinking": False, "chat": False}, "Remove thinking, or set chat to true"),
    ],
)
def test_incompatible_options_are_rejected(options, message):
    with pytest.raises(ValidationError, match=message):
        DataConfig(path="a", **options)


@pytest.mark.parametrize(
    "options",
    [{"heldout_path": "b"}, {"heldout_split": "test"}, {"heldout_fraction": 0.1}],
)
def test_evaluation_needs_held_out_prompts(options):
    assert Config.model_validate({**MINIMAL, "data": {"path": "a", **options}})
    with pytest.raises(ValidationError, match="no prompts are held out"):
        Config.model_validate({**MINIMAL, "data": {"path": "a"}})


# --- the prompt stream


def stream(seed=0):
    return PromptStream([Prompt(str(i), (i,), "") for i in range(10)], seed)


def test_epochs_contain_every_prompt_once_in_different_orders():
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


def test_a_stream_over_a_table(reader):
    table = reader(conversations(10)).table()
    a, b = PromptStream(table, 0), PromptStream(table, 0)
    assert a.take(15) + a.take(15) == b.take(30)


# --- plain text


def corpus(tmp_path, tokenizer, rows, **options):
    data = DataConfig(path="unused", corpus_path=jsonl(tmp_path / "texts.jsonl", rows), **options)
    return read_corpus(data, tokenizer, EOS)


def test_a_corpus_is_cut_into_pieces(tmp_path, tokenizer):
    rows = [{"text": "abcdefgh"}, {"text": ""}, {"text": "x"}]
    pieces, summary = corpus(tmp_path, tokenizer, rows, corpus_tokens=4)
    read = [tokenizer.decode((*p.token_ids, *p.reference_ids)) for p in pieces]
    assert read == ["abcd", "efgh", "x<|end|>"]
    assert len({p.prompt_id for p in pieces}) == 3
    reasons = [reference_rollout(p, "corpus").finish_reason for p in pieces]
    assert reasons == ["length", "length", "stop"]
    assert (summary.conversations, summary.prompts, summary.blank) == (2, 3, 1)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"body": "abc"}, r"data\.corpus_path: .*:1: has no column 'text'; .* Set data\.text_key"),
        ({"text": 3}, "'text' is 3, not text"),
        ({"text": " "}, "has no rows with text"),
    ],
)
def test_a_corpus_without_text_is_rejected(tmp_path, tokenizer, row, message):
    with pytest.raises(DataError, match=message):
        corpus(tmp_path, tokenizer, [row])


def test_tokens_are_stored_as_32_bit_integers(reader):
    table = reader([{"prompt": "a"}], 0).table()
    assert table.columns["token_ids"].type.value_type == pa.int32()
