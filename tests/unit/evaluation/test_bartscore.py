"""BARTScore against a computation of one sequence at a time; unsupported models are refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict

import pytest
import torch

from seqkd.errors import ModelError
from seqkd.evaluation.bartscore import BartScorer

LIMIT = 48
REFERENCES = [
    ["The sky is blue.", "It is blue, as the sky on a clear day is."],
    [],
    ["no", " \n"],
    ["  "],
]
SAMPLES = [
    ["It is blue.", "Green, I should say, with a touch of grey."],
    ["never scored"],
    ["", "yes"],
    ["nor this"],
]


def write_bart(directory):
    """Write a random BART of hidden size 32 for 48 bytes, with <|end|> before and after each
    text."""
    from tokenizers.processors import TemplateProcessing
    from transformers import BartConfig, BartForConditionalGeneration

    from scripts.tiny_models import tiny_tokenizer

    torch.manual_seed(5)
    config = BartConfig(
        vocab_size=261,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=LIMIT,
        init_std=0.5,
        pad_token_id=1,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
        forced_eos_token_id=None,
    )
    BartForConditionalGeneration(config).save_pretrained(directory)
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|end|> $A <|end|>", special_tokens=[("<|end|>", 0)]
    )
    tokenizer.save_pretrained(directory)
    return str(directory)


@pytest.fixture(scope="module")
def bart(tmp_path_factory):
    return write_bart(tmp_path_factory.mktemp("bart"))


@pytest.fixture(scope="module")
def scorer(bart):
    return BartScorer(bart)


@pytest.fixture(scope="module")
def by_hand(bart):
    """Function for log p(target | source) per token, one pair at a time: no padding, no labels."""
    from transformers import AutoTokenizer, BartForConditionalGeneration

    tokenizer = AutoTokenizer.from_pretrained(bart)
    model = BartForConditionalGeneration.from_pretrained(bart).eval()

    def logprob(source, target):
        read = torch.tensor([tokenizer(source).input_ids])
        ids = tokenizer(target).input_ids
        with torch.no_grad():
            logits = model(
                input_ids=read, decoder_input_ids=torch.tensor([[0, *ids[:-1]]]), use_cache=False
            ).logits[0]
        rows = torch.log_softmax(logits, -1)
        return sum(rows[i, token].item() for i, token in enumerate(ids)) / len(ids)

    return logprob


def test_scores_are_mean_log_likelihoods_of_the_target(scorer, by_hand):
    reference, sample = "The sky is blue.", "Green?"
    result = scorer.score([[sample]], [[reference]])
    precision, recall = by_hand(reference, sample), by_hand(sample, reference)
    assert abs(precision - recall) > 0.05, "the two directions must differ"
    assert result.precision.values == pytest.approx([precision], abs=1e-5)
    assert result.recall.values == pytest.approx([recall], abs=1e-5)
    assert result.f.values == pytest.approx([(precision + recall) / 2], abs=1e-5)


def test_best_reference_by_f_and_mean_over_samples(scorer, by_hand):
    result = scorer.score(SAMPLES, REFERENCES)
    assert result.f.prompts == (0, 2)
    assert result.f.left_out == 2
    for place, prompt in enumerate(result.f.prompts):
        references = [text for text in REFERENCES[prompt] if text.strip()]
        best = [
            max(
                ((by_hand(r, sample), by_hand(sample, r)) for r in references),
                key=lambda both: both[0] + both[1],
            )
            for sample in SAMPLES[prompt]
        ]
        precision, recall = (sum(column) / len(best) for column in zip(*best, strict=True))
        assert result.precision.values[place] == pytest.approx(precision, abs=1e-5)
        assert result.recall.values[place] == pytest.approx(recall, abs=1e-5)
        assert result.f.values[place] == pytest.approx((precision + recall) / 2, abs=1e-5)


def test_best_reference_is_by_f_and_not_by_precision_or_recall(scorer, by_hand):
    samples, references = ["I cannot say", "yes"], [["no", "It is"], ["zebra crossing", "no"]]
    result = scorer.score([[sample] for sample in samples], references)
    others = []
    for i, sample in enumerate(samples):
        both = [(by_hand(text, sample), by_hand(sample, text)) for text in references[i]]
        best = max(both, key=sum)
        values = result.precision.values[i], result.recall.values[i]
        assert values == pytest.approx(best, abs=1e-5)
        others += [max(both, key=lambda b, side=side: b[side]) != best for side in (0, 1)]
    assert others == [True, False, False, True], "the examples must distinguish the three criteria"


@pytest.mark.parametrize("tokens", [1, 60, 100_000])
def test_batches_and_padding_change_nothing(scorer, tokens):
    whole = scorer.score(SAMPLES, REFERENCES)
    result = scorer.score(SAMPLES, REFERENCES, tokens=tokens)
    assert result.precision.values == pytest.approx(whole.precision.values, abs=1e-5)
    assert result.recall.values == pytest.approx(whole.recall.values, abs=1e-5)


def test_batches_respect_the_token_limit(scorer, monkeypatch):
    sizes = []
    forward = scorer.model.forward

    def watched(**inputs):
        sizes.append((inputs["input_ids"].numel(), inputs["labels"].numel(), len(inputs["labels"])))
        return forward(**inputs)

    monkeypatch.setattr(scorer.model, "forward", watched)
    scorer.score(SAMPLES, REFERENCES, tokens=60)
    assert max(rows for *_, rows in sizes) > 1
    assert all(max(read, ids) <= 60 or rows == 1 for read, ids, rows in sizes)


def test_long_texts_are_truncated_and_counted(scorer, by_hand):
    long, fits = "x" * (LIMIT - 1), "x" * (LIMIT - 2)
    assert scorer.score([[fits, "y"]], [["z"]]).truncated == 0
    result = scorer.score([[long, long, "y"]], [["z"]])
    assert result.truncated == 1
    # Truncation keeps the end token, so the result is the longest text that fits.
    assert result.f.values == pytest.approx(scorer.score([[fits, fits, "y"]], [["z"]]).f.values)


def test_no_prompt_has_a_reference(scorer):
    result = scorer.score([["a"], ["b"]], [[], []])
    assert result.f.interval() is None
    assert (result.f.left_out, result.truncated) == (2, 0)


def test_a_score_is_plain_data(scorer):
    result = scorer.score(SAMPLES, REFERENCES)
    assert json.loads(json.dumps(asdict(result), allow_nan=False))["f"]["prompts"] == [0, 2]


def refused(model):
    with pytest.raises(ModelError) as caught:
        BartScorer(str(model))
    message = str(caught.value)
    assert message.startswith(f"--bart: {str(model)!r}") or f"of {str(model)!r}" in message
    assert "Set it to a" in message and "\n" not in message
    return message


def test_other_models_are_refused(bart, tiny, tmp_path):
    assert "does not exist" in refused(tmp_path / "nothing")
    assert "has no config.json" in refused(tmp_path)
    assert "'llama', which is not an encoder-decoder" in refused(tiny["student"])
    assert "cannot be loaded" in refused("nobody/no-such-bart")


def copied(bart, directory):
    shutil.copytree(bart, directory)
    return directory


def test_missing_and_pickled_weights_are_refused(bart, tmp_path):
    from safetensors.torch import load_file, save_file

    partial = copied(bart, tmp_path / "partial")
    tensors = load_file(partial / "model.safetensors")
    (dropped,) = [name for name in tensors if name.endswith("decoder.layers.1.fc1.weight")]
    del tensors[dropped]
    save_file(tensors, partial / "model.safetensors", {"format": "pt"})
    assert "no weights for model.decoder.layers.1.fc1.weight" in refused(partial)

    pickled = copied(bart, tmp_path / "pickled")
    torch.save(load_file(pickled / "model.safetensors"), pickled / "pytorch_model.bin")
    (pickled / "model.safetensors").unlink()
    assert "safetensors" in refused(pickled)


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights_are_refused(bart, tmp_path, size):
    file = copied(bart, tmp_path / "truncated") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ModelError, match=f"--bart: {file} is not a complete safetensors file"):
        BartScorer(str(file.parent))


def test_custom_code_is_refused_without_a_prompt(bart, tmp_path, monkeypatch):
    own = copied(bart, tmp_path / "own")
    config = json.loads((own / "config.json").read_text())
    config |= {"model_type": "mine", "auto_map": {"AutoConfig": "mine.MyConfig"}}
    (own / "config.json").write_text(json.dumps(config))
    (own / "mine.py").write_text("raise SystemExit('was run')")
    monkeypatch.setattr("builtins.input", lambda text: pytest.fail("asked"))
    assert "cannot be loaded" in refused(own)


def test_tokenizer_without_an_end_token_is_refused(bart, tmp_path):
    from scripts.tiny_models import tiny_tokenizer

    bare = copied(bart, tmp_path / "bare")
    tiny_tokenizer().save_pretrained(bare)
    assert "adds no end-of-text token" in refused(bare)
