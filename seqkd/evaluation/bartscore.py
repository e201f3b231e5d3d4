"""BARTScore (Yuan et al. 2021, arXiv 2106.11520): the log-probability of one text given another
under an encoder-decoder model.

``log p(target | source)`` is the mean over the target's tokens in nats, special tokens included, as
in the authors' code. Definitions and limitations of the metric: docs/evaluation.md.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch

from seqkd.data.content import ContentTokenizer
from seqkd.errors import ModelError
from seqkd.evaluation.text import PerPrompt, column
from seqkd.models.loading import expand, first_line, load_tokenizer, read_config
from seqkd.models.model_files import model_files

FIELD = "--bart"
TOKENS = 1024
"""Maximum padded tokens of a batch, per side. With BART's vocabulary its logits are 200 MiB."""
Pair = tuple[tuple[int, ...], tuple[int, ...]]
"""Token ids of source and target."""


@dataclass(frozen=True)
class BartScore:
    """BARTScore in nats per token, at most 0. Higher (closer to 0) is better."""

    precision: PerPrompt
    """log p(sample | reference)."""
    recall: PerPrompt
    """log p(reference | sample)."""
    f: PerPrompt
    """Mean of precision and recall."""
    truncated: int
    """Number of distinct samples and references that were truncated to the model's maximum
    length."""


class BartScorer:
    """Encoder-decoder model with its tokenizer, in float32.

    Args:
        model: directory in transformers format (safetensors) or hub name.
        device: torch device of the model.

    Raises ModelError, whose message starts with ``--bart`` and the value.
    """

    def __init__(self, model: str, device: str = "cpu") -> None:
        config = read_config(model, FIELD)
        if not config.is_encoder_decoder:
            raise ModelError(
                f"{FIELD}: {model!r} has type {config.model_type!r}, which is not an "
                "encoder-decoder model. Set it to a BART checkpoint, such as "
                "facebook/bart-large-cnn."
            )
        model_files(model, FIELD)
        self.tokenizer = load_tokenizer(model, FIELD)
        if not self.tokenizer("").input_ids or self.tokenizer.pad_token_id is None:
            raise ModelError(
                f"{FIELD}: the tokenizer of {model!r} adds no end-of-text token or has no padding "
                "token. Set it to a BART checkpoint with its own tokenizer."
            )
        self.content = ContentTokenizer(self.tokenizer)
        limits = (getattr(config, "max_position_embeddings", None), self.tokenizer.model_max_length)
        self.max_length: int = min(limit for limit in limits if limit)
        """Maximum tokens of a text, special tokens included."""
        self.model = _load(model).to(device)

    def score(
        self,
        predictions: Sequence[Sequence[str]],
        references: Sequence[Sequence[str]],
        tokens: int = TOKENS,
    ) -> BartScore:
        """Compute the BARTScore of samples against references.

        Args:
            predictions: [P] samples of each prompt, at least one.
            references: [P] reference texts of each prompt, possibly none.
            tokens: see :data:`TOKENS`; does not change the result.

        Each sample is scored against the reference with the highest F. The score of a prompt is
        the mean over its samples. References of only white space are ignored, and prompts without
        references are skipped.
        """
        usable = [[text for text in texts if text.strip()] for texts in references]
        pairs = [
            (reference, sample)
            for samples, texts in zip(predictions, usable, strict=True)
            for reference, sample in product(texts, samples)
        ]
        encoded = {text: self._encode(text) for pair in dict.fromkeys(pairs) for text in pair}
        ids = [(encoded[reference][0], encoded[sample][0]) for reference, sample in pairs]
        precision = self.logprobs(ids, tokens)
        recall = self.logprobs([(sample, reference) for reference, sample in ids], tokens)
        by_pair = dict(zip(pairs, zip(precision, recall, strict=True), strict=True))

        def mean_of_best(samples: Sequence[str], texts: Sequence[str]) -> list[float]:
            best = [max((by_pair[text, sample] for text in texts), key=sum) for sample in samples]
            return [sum(column) / len(best) for column in zip(*best, strict=True)]

        both = zip(predictions, usable, strict=True)
        rows = [mean_of_best(samples, texts) if texts else None for samples, texts in both]
        return BartScore(
            precision=column(rows, 0),
            recall=column(rows, 1),
            f=column([row and [sum(row) / 2] for row in rows], 0),
            truncated=sum(cut for _, cut in encoded.values()),
        )

    @torch.no_grad()
    def logprobs(self, pairs: Sequence[Pair], tokens: int = TOKENS) -> list[float]:
        """Return the mean log-probability of the target's tokens given the source, per pair."""
        means: dict[Pair, float] = {}
        for batch in _batches(sorted(dict.fromkeys(pairs), key=_size), tokens):
            sources, source_mask = self._padded([source for source, _ in batch])
            targets, target_mask = self._padded([target for _, target in batch])
            labels = targets.masked_fill(~target_mask, -100)
            logits = self.model(
                input_ids=sources, attention_mask=source_mask.long(), labels=labels
            ).logits.float()
            chosen = logits.gather(-1, targets[..., None]).squeeze(-1) - logits.logsumexp(-1)
            mean = (chosen * target_mask).sum(-1) / target_mask.sum(-1)
            means.update(zip(batch, mean.tolist(), strict=True))
        return [means[pair] for pair in pairs]

    def _encode(self, text: str) -> tuple[tuple[int, ...], bool]:
        """Return token ids of at most the maximum length, and whether the text was truncated."""
        (ids,) = self.content.content([text], special=True)
        if len(ids) <= self.max_length:
            return tuple(ids), False
        last = self.content.around[1]
        return (*ids[: self.max_length - len(last)], *last), True

    def _padded(self, rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Pad [B][T_i] token ids to [B, T]; return them with the mask of real tokens."""
        width = max(map(len, rows))
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[*row, *[pad] * (width - len(row))] for row in rows])
        mask = torch.arange(width) < torch.tensor([[len(row)] for row in rows])
        return ids.to(self.model.device), mask.to(self.model.device)


def _load(model: str) -> Any:
    from transformers import AutoModelForSeq2SeqLM

    load: Any = AutoModelForSeq2SeqLM.from_pretrained
    try:
        loaded, info = load(
            expand(model),
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except (OSError, ValueError) as error:
        raise ModelError(
            f"{FIELD}: {model!r} cannot be loaded: {first_line(error)} Set it to an "
            "encoder-decoder checkpoint in safetensors format."
        ) from None
    if missing := sorted(info["missing_keys"]):
        raise ModelError(
            f"{FIELD}: {model!r} has no weights for {missing[0]} and {len(missing) - 1} other "
            "tensors, which would be random. Set it to a complete checkpoint."
        )
    return loaded.eval()


def _size(pair: Pair) -> int:
    return max(map(len, pair))


def _batches(pairs: Sequence[Pair], tokens: int) -> Iterator[list[Pair]]:
    """Yield batches of at most ``tokens`` padded tokens per side. ``pairs`` are sorted by size."""
    batch: list[Pair] = []
    for pair in pairs:
        if batch and (len(batch) + 1) * _size(pair) > tokens:
            yield batch
            batch = []
        batch.append(pair)
    if batch:
        yield batch
