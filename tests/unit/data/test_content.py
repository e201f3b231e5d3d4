"""The text of a special token in content is text, for three kinds of tokenizers."""

from __future__ import annotations

import pytest
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from scripts.tiny_models import tiny_tokenizer
from seqkd.config.data import DataConfig
from seqkd.data.chat_template import Renderer
from seqkd.data.content import BEGIN, HOLD, ContentTokenizer, unmarked
from seqkd.data.corpus import read_corpus
from seqkd.data.dataset import Reader
from seqkd.data.readers import Source
from seqkd.errors import DataError
from tests.unit.data.test_data import jsonl

TEXTS = ["Hello there, what is rain for?", "It is for the fields. Ünïcode: 你好, \n\n  spaces."]
CHATML = (
    "{% if false %}<think></think>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content | trim }}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
INST = (
    "<s>{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)


def chatml():
    """Byte-level BPE with added tokens behind its vocabulary, as Qwen; <think> is not special."""
    inner = Tokenizer(models.BPE())
    inner.normalizer = normalizers.NFC()
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        TEXTS, trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    inner.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    plain = ("<think>", "</think>", "rain", "\n\n")
    inner.add_tokens([AddedToken(text, normalized=False) for text in plain])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token="<|im_end|>", pad_token="<|endoftext|>"
    )
    tokenizer.chat_template = CHATML
    return tokenizer


def metaspace():
    """Unigram with a prepended space, and special tokens in its vocabulary, as SentencePiece."""
    inner = Tokenizer(models.Unigram())
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    inner.decoder = decoders.Metaspace(prepend_scheme="first")
    inner.train_from_iterator(
        [*TEXTS, "[INST] <s> </s> <unk>"],
        trainers.UnigramTrainer(
            vocab_size=120, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>",
            show_progress=False,
        ),
    )  # fmt: skip
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", pad_token="</s>",
        unk_token="<unk>",
    )  # fmt: skip
    tokenizer.chat_template = INST
    return tokenizer


@pytest.fixture(params=[tiny_tokenizer, chatml, metaspace], ids=lambda make: make.__name__)
def tokenizer(request):
    return request.param()


def every_token(tokenizer):
    return sorted(ContentTokenizer(tokenizer).tokens)


def test_content_without_added_tokens_is_tokenized_as_before(tokenizer):
    content = ContentTokenizer(tokenizer)
    for special in (False, True):
        expected = tokenizer(TEXTS, add_special_tokens=special).input_ids
        assert content.content(TEXTS, special=special) == expected
    assert content.content([]) == content.rendered([]) == []


def test_the_copy_splits_text_like_the_tokenizer(tokenizer):
    """It is used only for texts with added tokens, but agrees on all others."""
    content = ContentTokenizer(tokenizer)
    for text in TEXTS:
        assert content._encode(text) == tokenizer(text, add_special_tokens=False).input_ids


def test_no_field_of_content_becomes_a_special_token(tokenizer):
    special = set(tokenizer.get_added_vocab().values()) - {tokenizer.unk_token_id}
    content = ContentTokenizer(tokenizer)
    for token in every_token(tokenizer):
        text = f"before {token} after{token}"
        assert (
            special & set(tokenizer(text, add_special_tokens=False).input_ids) or token == "<unk>"
        )
        (ids,) = content.content([text])
        assert not special & set(ids), token
        (whole,) = content.content([text], special=True)
        first, last = content.around
        assert whole == [*first, *ids, *last]
        assert [*first, *last] == tokenizer("").input_ids


def test_only_the_markers_of_the_template_are_tokens_of_a_prompt(tokenizer):
    render = Renderer(DataConfig(path="-"), tokenizer)
    special = set(tokenizer.get_added_vocab().values()) - {tokenizer.unk_token_id}
    plain = (("user", "before A after"), ("assistant", "so"), ("user", "why"))
    (expected,) = render.encode([render(plain, "")])
    for token in every_token(tokenizer):
        messages = tuple((role, text.replace("A", token)) for role, text in plain)
        rendered = render(messages, "")
        assert unmarked(rendered) == render(plain, "").replace("A", token)
        (ids,) = render.encode([rendered])
        markers = [[i for i in row if i in special] for row in (ids, expected)]
        assert markers[0] == markers[1] != [], token


def test_a_prompt_with_the_text_of_a_token_still_reads_the_same():
    tokenizer = tiny_tokenizer()
    render = Renderer(DataConfig(path="-"), tokenizer)
    (ids,) = render.encode([render((("user", "a<|end|>b"),), "")])
    assert tokenizer.decode(ids) == "<|user|>a<|end|>b<|end|><|assistant|>"
    assert ids.count(tokenizer.eos_token_id) == 1


def test_added_tokens_that_are_neither_special_nor_in_the_template_are_text():
    tokenizer = chatml()
    assert every_token(tokenizer) == [
        "</think>", "<think>", "<|endoftext|>", "<|im_end|>", "<|im_start|>"
    ]  # fmt: skip
    rain, feeds = (tokenizer.convert_tokens_to_ids(text) for text in ("rain", "\n\n"))
    (ids,) = ContentTokenizer(tokenizer).content(["<|im_end|>\n\nrain"])
    assert ids[-2:] == [feeds, rain]


def test_allowed_tokens_are_tokens():
    tokenizer = chatml()
    think = tokenizer.convert_tokens_to_ids("<think>")
    content = ContentTokenizer(tokenizer, ("<think>",))
    (ids,) = content.content(["<think>so</think><|im_end|>"])
    assert ids[0] == think
    assert not {tokenizer.convert_tokens_to_ids(t) for t in ("</think>", "<|im_end|>")} & set(ids)
    with pytest.raises(DataError, match=r"content_tokens: '<thunk>' is not an added token"):
        ContentTokenizer(tokenizer, ("<thunk>",))


def test_a_template_that_interprets_a_token_is_reported():
    tokenizer = chatml()
    tokenizer.chat_template = CHATML.replace("| trim", "| replace('<think>', '') | trim")
    messages = (("user", "a <think> b"),)
    with pytest.raises(DataError, match=r"row 3: .* interprets <think> in a message.*Remove"):
        Renderer(DataConfig(path="-"), tokenizer)(messages, "row 3")
    allowed = DataConfig(path="-", content_tokens=("<think>",))
    assert "<think>" not in Renderer(allowed, tokenizer)(messages, "row 3")


def test_a_noncharacter_alone_does_not_hide_the_markers_of_the_template():
    tokenizer = tiny_tokenizer()
    render = Renderer(DataConfig(path="-"), tokenizer)
    (ids,) = render.encode([render((("user", f"a{BEGIN}b"),), "")])
    markers = [tokenizer.convert_tokens_to_ids(t) for t in ("<|user|>", "<|end|>", "<|assistant|>")]
    assert [i for i in ids if i in markers] == markers


def test_noncharacters_are_rejected():
    render = Renderer(DataConfig(path="-"), tiny_tokenizer())
    with pytest.raises(DataError, match="row 3: has a Unicode noncharacter"):
        render((("user", f"<|end|>{HOLD}0{HOLD}"),), "row 3")


@pytest.mark.parametrize("chat", [True, False])
def test_prompts_answers_and_plain_text_of_a_file(tmp_path, chat):
    tokenizer = tiny_tokenizer()
    eos = tokenizer.eos_token_id
    row = {"prompt": "a<|end|>b", "reference": "c<|end|>d<|user|>", "text": "e<|end|>f"}
    file = jsonl(tmp_path / "rows.jsonl", [row])
    data = DataConfig(path=file, chat=chat, corpus_path=file)
    reader = Reader(Source("data.path", file), data, tokenizer, eos, longest=64).read()
    (prompt,) = reader.table()
    assert any("contain <|end|> <|user|>, which is encoded" in line for line in reader.warnings())
    assert prompt.token_ids.count(eos) == chat
    assert prompt.reference_ids.index(eos) == len(prompt.reference_ids) - 1
    assert tokenizer.decode(prompt.reference_ids) == "c<|end|>d<|user|><|end|>"
    pieces, summary = read_corpus(data, tokenizer, eos)
    assert [piece.reference_ids.count(eos) for piece in pieces] == [1]
    assert "contain <|end|>, which" in summary.losses(data, 0)[0]
