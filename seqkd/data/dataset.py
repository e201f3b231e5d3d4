"""Reading of the training, held-out and plain-text data of a run into tables of prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pyarrow as pa

from seqkd.config.data import DataConfig
from seqkd.config.run import Config
from seqkd.config.samplers import SAMPLERS
from seqkd.data.chat_template import Renderer
from seqkd.data.corpus import read_corpus
from seqkd.data.formats import Conversation, Message, conversation, detect, digest, spread
from seqkd.data.prompt_table import CONVERSATION, PromptTable, batch_of, part_of
from seqkd.data.read_stats import BATCH, ReadStats
from seqkd.data.readers import Source
from seqkd.errors import DataError
from seqkd.types import Prompt


@dataclass(frozen=True)
class DataSets:
    """All data of a run."""

    train: Sequence[Prompt]
    heldout: Sequence[Prompt]
    corpus: Sequence[Prompt]
    references: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Reference answers of the data set to held-out prompts, by prompt id."""
    summaries: tuple[ReadStats, ...] = ()
    warnings: tuple[str, ...] = ()


def read_data(config: Config, tokenizer: Any, stop_ids: tuple[int, ...]) -> DataSets:
    """Read the training prompts, the held-out prompts and the plain text that the phases need.

    Raises:
        DataError: The message contains the file, the row and the fix.
    """
    data = config.data
    sources = [SAMPLERS[config.source(sampler)] for sampler in config.samplers]
    answers = any(source.from_data and not source.plain_text for source in sources)
    longest = config.rollout.max_tokens if answers else 0
    # The first stop id of a chat model may differ from the token that ends its turns.
    eos_id = stop_ids[0] if tokenizer.eos_token_id is None else tokenizer.eos_token_id
    wanted = config.evaluation.prompts
    train = Reader(Source("data.path", data.path, data.subset, data.split), data, tokenizer, eos_id,
                   longest)  # fmt: skip
    heldout = Reader(_heldout_source(data), data, tokenizer, eos_id, limit=wanted)
    if data.heldout_fraction:
        below = data.heldout_fraction * 2**64
        train.read(lambda conversation: heldout if conversation.identity < below else train)
        heldout.summary.format = train.summary.format
    else:
        train.read()
        if wanted:
            heldout.read()
    sides = [train, heldout] if wanted else [train]
    tables = [side.table() for side in sides]
    warnings = [line for side in sides for line in side.warnings()]
    if wanted:
        _refuse_leaks(train, heldout)
        if len(tables[1]) < wanted:
            warnings.append(
                f"{heldout.summary.source.field} has {len(tables[1])} prompts, fewer than "
                f"evaluation.prompts = {wanted}; all of them are used."
            )
    summaries = [side.summary for side in sides]
    corpus: Sequence[Prompt] = ()
    if any(source.plain_text for source in sources):
        corpus, summary = read_corpus(data, tokenizer, eos_id)
        summaries.append(summary)
        warnings += summary.losses(data, longest)
    prompts = tables[1] if wanted else ()
    return DataSets(tables[0], prompts, corpus, heldout.answers, tuple(summaries), tuple(warnings))


def _heldout_source(data: DataConfig) -> Source:
    key = "path" if data.heldout_path else "split" if data.heldout_split else "fraction"
    return Source(
        f"data.heldout_{key}",
        data.heldout_path or data.path,
        None if data.heldout_path else data.subset,
        data.heldout_split or ("train" if data.heldout_path else data.split),
    )


def _refuse_leaks(train: Reader, heldout: Reader) -> None:
    leaked = len(train.identities & heldout.identities)
    if leaked:
        source = heldout.summary.source
        raise DataError(
            f"{source.field}: {source}: {leaked} of {len(heldout.identities)} prompts are also in "
            f"data.path {train.summary.source}. Remove them from one of the two, or set "
            f"data.heldout_fraction instead of {source.field}."
        )


@dataclass(frozen=True, slots=True)
class _Draft:
    """A prompt before rendering: messages [start, stop) of a conversation."""

    conversation: Conversation
    stop: int
    where: str
    start: int = 0

    @property
    def messages(self) -> tuple[Message, ...]:
        return part_of(self.conversation.messages, self.start, self.stop)

    @property
    def answer(self) -> str | None:
        after = self.conversation.messages[self.stop : self.stop + 1]
        return after[0][1] if after else None

    def without_oldest(self) -> _Draft | None:
        """Return the draft without its oldest exchange. None if only one user message is left."""
        messages = self.conversation.messages
        users = [i for i in range(self.start, self.stop) if messages[i][0] == "user"]
        return replace(self, start=users[1]) if len(users) > 1 else None


class Reader:
    """Reader of the rows of one source into a table of distinct prompts, with statistics.

    If ``longest`` is above 0, every prompt has an answer of at most ``longest`` tokens, which ends
    with ``eos_id`` unless it is truncated. At most the first ``limit`` prompts are kept.
    """

    def __init__(
        self,
        source: Source,
        data: DataConfig,
        tokenizer: Any,
        eos_id: int,
        longest: int = 0,
        limit: int | None = None,
    ) -> None:
        self.data, self.tokenizer, self.eos_id = data, tokenizer, eos_id
        self.longest, self.limit = longest, limit
        self.render = Renderer(data, tokenizer)
        self.summary = ReadStats(source)
        self.identities: set[int] = set()
        """Identities of all conversations that were read."""
        self.answers: dict[str, list[str]] = {}
        """Reference answers of the data set, by prompt id. Filled only if there is a limit."""
        self._seen: set[bytes] = set()
        self._pending: list[_Draft] = []
        self._prompts: list[pa.RecordBatch] = []
        self._conversations: list[pa.Array] = []

    def read(self, side: Callable[[Conversation], Reader] | None = None) -> Reader:
        """Read the source. Every conversation is added to the reader that ``side`` returns for it,
        by default to this one."""
        form, where = None, ""
        for where, whole in self.summary.source.rows(self.data.rows, self.data.streaming):
            for row in spread(whole, self.data):
                form = form or detect(row, self.data, where)
                parsed = conversation(row, form, self.data, where)
                (side(parsed) if side else self).add(parsed, where)
        if not where:
            name = f"{self.summary.source.field}: {self.summary.source}"
            raise DataError(f"{name}: has no rows. Set it to a source with rows.")
        self.summary.format = form
        return self

    def add(self, conversation: Conversation, where: str) -> None:
        """Add the turns of a conversation."""
        self.summary.conversations += 1
        self.identities.add(conversation.identity)
        if self.limit is not None and self.summary.prompts >= self.limit:
            return
        for stop in conversation.turns(self.data.turns):
            draft = _Draft(conversation, stop, where)
            if self.longest and draft.answer is None:
                self.summary.unanswered += 1
            else:
                self._pending.append(draft)
        if len(self._pending) >= BATCH:
            self._flush()

    def table(self) -> PromptTable:
        """Return the prompts. Raises DataError if there are none."""
        self._flush()
        if not self.summary.prompts:
            name = f"{self.summary.source.field}: {self.summary.source}"
            raise DataError(f"{name}: {self._nothing_left()}")
        self.summary.special = frozenset(self.render.content.encoded)
        return PromptTable(self._prompts, self._conversations)

    def warnings(self) -> list[str]:
        """Return warnings about dropped and truncated texts and about the chat template."""
        lines = self.summary.losses(self.data, self.longest)
        return [*lines, self.summary.mismatch] if self.summary.mismatch else lines

    def _nothing_left(self) -> str:
        counts = self.summary
        if not counts.conversations:
            return (
                f"has no conversations with data.heldout_fraction {self.data.heldout_fraction:g}. "
                "Change the fraction, or read more rows."
            )
        if counts.format and counts.unanswered and not counts.long_prompts + counts.long_answers:
            column = f" in column {counts.format.answer!r}" if counts.format.answer else ""
            return (
                f"none of the {counts.unanswered} prompts has an answer{column}. Set "
                "data.reference_key to the column of the answers, or sampler to student or teacher."
            )
        limits = f"data.max_prompt_tokens = {self.data.max_prompt_tokens}"
        if counts.long_answers:
            limits += f" or rollout.max_tokens = {self.longest} (the answer)"
        return (
            f"all {counts.long_prompts + counts.long_answers} prompts are longer than {limits}. "
            "Raise the limit (up to the models' context length) or shorten the prompts."
        )

    def _flush(self) -> None:
        drafts, self._pending = self._pending, []
        if self.longest and self.data.chat and not self._prompts:
            checks = (
                self.render.difference(d.messages, d.answer or "", self.eos_id, d.where)
                for d in drafts[:3]
            )
            self.summary.mismatch = next(filter(None, checks), None)
        fitting = self._fit(drafts)
        conversations: list[Conversation] = []
        rows = []
        base = sum(map(len, self._conversations))
        for (draft, ids), (reference, cut) in zip(fitting, self._answers(fitting), strict=True):
            if self.longest and reference is None:
                continue
            # the same prompt with another answer is not a duplicate
            prompt_id = digest(repr(tuple(ids)).encode())
            row_id = prompt_id + digest(repr(reference).encode())
            new = row_id not in self._seen
            if new and len(self._seen) == self.limit:
                continue
            if self.limit is not None and draft.answer is not None:
                self.answers.setdefault(prompt_id.hex(), []).append(draft.answer)
            if not new:
                self.summary.duplicates += 1
                continue
            self._seen.add(row_id)
            if not conversations or conversations[-1] is not draft.conversation:
                conversations.append(draft.conversation)
            self.summary.truncated_prompts += draft.start > 0
            self.summary.cut_answers += cut
            rows.append(
                (prompt_id.hex(), ids, reference, cut, draft.conversation.tag,
                 base + len(conversations) - 1, draft.start, draft.stop)
            )  # fmt: skip
        self.summary.prompts += len(rows)
        self._prompts.append(batch_of(rows))
        messages = [[{"role": r, "content": c} for r, c in f.messages] for f in conversations]
        self._conversations.append(pa.array(messages, CONVERSATION))

    def _fit(self, drafts: list[_Draft]) -> list[tuple[_Draft, list[int]]]:
        """Tokenize drafts, truncate or drop those that are too long, and keep their order."""
        fitting: dict[int, tuple[_Draft, list[int]]] = {}
        trying = dict(enumerate(drafts))
        while trying:
            shorter = {}
            tokens = self.render.encode([self.render(d.messages, d.where) for d in trying.values()])
            for (index, draft), ids in zip(trying.items(), tokens, strict=True):
                if len(ids) <= self.data.max_prompt_tokens:
                    fitting[index] = draft, ids
                elif self.data.too_long == "drop":
                    self.summary.long_prompts += 1
                elif not self.data.chat:
                    fitting[index] = self._last_tokens(draft, ids)
                    self.summary.truncated_prompts += 1
                elif next_try := draft.without_oldest():
                    shorter[index] = next_try
                else:
                    self.summary.long_prompts += 1
            trying = shorter
        return [fitting[index] for index in sorted(fitting)]

    def _last_tokens(self, draft: _Draft, ids: list[int]) -> tuple[_Draft, list[int]]:
        """Remove the first tokens of plain text, but keep the beginning-of-sequence token."""
        begin = ids[:1] if ids[0] == self.tokenizer.bos_token_id else []
        kept = begin + ids[len(ids) - self.data.max_prompt_tokens + len(begin) :]
        text = self.tokenizer.decode(kept, skip_special_tokens=True)
        answer = draft.conversation.messages[draft.stop : draft.stop + 1]
        shorter = replace(draft.conversation, messages=(("user", text), *answer))
        return _Draft(shorter, 1, draft.where), kept

    def _answers(
        self, fitting: list[tuple[_Draft, list[int]]]
    ) -> Iterator[tuple[list[int] | None, bool]]:
        """Yield the answer's tokens (None without an answer or if it is too long), and True if they
        were truncated."""
        if not self.longest:
            yield from ((None, False) for _ in fitting)
            return
        texts = [draft.answer or "" for draft, _ in fitting]
        for ids in self.render.content.content(texts):
            if len(ids) < self.longest:
                yield [*ids, self.eos_id], False
            elif self.data.too_long == "truncate":
                yield ids[: self.longest], True
            else:
                self.summary.long_answers += 1
                yield None, False
