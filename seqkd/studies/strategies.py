"""The strategy task, where the future of a sequence decides: a prompt has two correct kinds of
completions, of which the student can carry out only one.

The prompt is K digits modulo M. The teacher answers with the sum at once (``direct 3``, the hard
strategy) or by partial sums (``steps 4 1 3``, the easy strategy). Both end with the same result. A
student of small capacity adds one digit at a time, but cannot compute the sum of K digits at once.

A token-level objective takes the states as they are and copies the teacher's choice of the first
word. A sequence-level objective charges the first word for the divergence that follows: at its
optimum, q(word) = p(word) exp(-F(word)) / Z with the divergence F that follows the word.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from seqkd.config.objectives import (
    GJSDConfig,
    ObjectiveConfig,
    SampledTokenConfig,
    SequenceForwardKLConfig,
    SequenceReverseKLConfig,
    SFTConfig,
    TokenForwardKLConfig,
    TokenReverseKLConfig,
)
from seqkd.learner.running_costs import RunningCosts
from seqkd.objectives import DIVERGENCES, OBJECTIVES
from seqkd.types import TokenStats

SPECIAL = ("<|end|>", "<|pad|>", "<|unknown|>", "<|user|>", "<|assistant|>")
END, PAD, UNKNOWN, USER, ASSISTANT = SPECIAL
END_ID, PAD_ID = 0, 1
DIRECT, STEPS = "direct", "steps"
TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
HEAD_DIM = 32
"""A head size that vLLM's attention supports on a CPU."""


@dataclass(frozen=True)
class Task:
    """Dials of the task."""

    digits: int = 4
    """Digits K of a prompt. The easy strategy takes K - 1 additions."""
    modulus: int = 5
    """Modulus M. There are M^K prompts."""
    hard_share: float = 0.7
    """Share of the teacher's completions that use the hard strategy."""
    heldout_share: float = 0.25
    """Share of the prompts on which the student is measured and not trained."""

    @cached_property
    def words(self) -> tuple[str, ...]:
        """The vocabulary, in the order of the token ids."""
        return (*SPECIAL, *map(str, range(self.modulus)), DIRECT, STEPS)

    @cached_property
    def numbers(self) -> Tensor:
        """[P, K] digits of all prompts, in an order that does not depend on the seed of a run."""
        combinations = torch.tensor(list(product(range(self.modulus), repeat=self.digits)))
        return combinations[
            torch.randperm(len(combinations), generator=torch.Generator().manual_seed(0))
        ]

    @cached_property
    def prompts(self) -> Tensor:
        """[P, S] token ids of all prompts, rendered by :data:`TEMPLATE`."""
        ids = {word: i for i, word in enumerate(self.words)}
        count = (len(self.numbers), 1)
        column = {word: torch.full(count, ids[word]) for word in (USER, END, ASSISTANT)}
        digits = self.numbers + ids["0"]
        return torch.cat([column[USER], digits, column[END], column[ASSISTANT]], 1)

    @cached_property
    def sums(self) -> Tensor:
        """[P, K - 1] token ids of the partial sums of two to K digits."""
        return self.numbers.cumsum(1)[:, 1:] % self.modulus + len(SPECIAL)

    @property
    def heldout(self) -> int:
        """Number of held-out prompts, which are the last."""
        return round(len(self.numbers) * self.heldout_share)

    def completions(self, places: Tensor, hard: Tensor) -> Tensor:
        """Return [B, K + 1] the correct completions, padded, of the prompts ``places`` with the
        strategies ``hard``."""
        sums, end = self.sums[places], torch.full((len(places), 1), END_ID)
        easy = torch.cat([sums, end], 1)
        direct = torch.cat([sums[:, -1:], end, torch.full_like(sums[:, 1:], PAD_ID)], 1)
        first = torch.where(hard, self.words.index(DIRECT), self.words.index(STEPS))
        return torch.cat([first[:, None], torch.where(hard[:, None], direct, easy)], 1)

    def correct(self, places: Tensor, completions: Tensor) -> Tensor:
        """Return [B] True where a completion ends, and the word before the end is the sum."""
        ended = completions == END_ID
        last = ended.int().argmax(1).sub(1).clamp(min=0)
        results = completions.gather(1, last[:, None])[:, 0]
        return ended.any(1) & (results == self.sums[places, -1])

    def rows(self) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
        """Return the training and the held-out rows in the data format of a run."""
        rows = [
            {"prompt": " ".join(map(str, numbers)), "answer": str(sum(numbers) % self.modulus)}
            for numbers in self.numbers.tolist()
        ]
        return rows[: -self.heldout], rows[-self.heldout :]


@dataclass(frozen=True)
class Size:
    """Size of a model."""

    layers: int
    hidden: int
    mlp: int

    def __str__(self) -> str:
        return f"{self.layers} x {self.hidden} ({self.mlp})"


TEACHER, STUDENT = Size(3, 128, 256), Size(1, 32, 48)
"""Sizes of the comparison's models. The student adds one digit at a time and does not learn more
than chance at the hard strategy."""


def tokenizer(task: Task) -> Any:
    """Return a tokenizer of words with the chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(task.words)}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=words,
        eos_token=END,
        pad_token=PAD,
        unk_token=UNKNOWN,
        additional_special_tokens=[USER, ASSISTANT],
    )
    fast.chat_template = TEMPLATE
    return fast


def model(task: Task, size: Size, seed: int) -> Any:
    """Return a Llama with random weights."""
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(task.words),
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.hidden // HEAD_DIM,
        num_key_value_heads=size.hidden // HEAD_DIM,
        head_dim=HEAD_DIM,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        initializer_range=0.1,
        eos_token_id=END_ID,
        pad_token_id=PAD_ID,
        bos_token_id=None,
        dtype="float32",
    )
    llama = LlamaForCausalLM(config)
    llama.generation_config = GenerationConfig(eos_token_id=END_ID, pad_token_id=PAD_ID)
    return llama


def save(directory: Path, task: Task, models: dict[str, Any]) -> None:
    """Write the models in transformers' format, and train.jsonl and heldout.jsonl."""
    for name, llama in models.items():
        llama.save_pretrained(directory / name)
        tokenizer(task).save_pretrained(directory / name)
    for name, rows in zip(("train", "heldout"), task.rows(), strict=True):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(text, encoding="utf-8")


def train_teacher(
    task: Task, seed: int, steps: int = 1000, batch: int = 128, start: Any = None
) -> Any:
    """Return a teacher trained on the correct completions of all prompts, whose first word is hard
    with probability ``task.hard_share``. It starts as a copy of ``start``, or from scratch."""
    torch.manual_seed(seed)
    teacher = model(task, TEACHER, seed) if start is None else copied(start).requires_grad_(True)
    for _ in _steps(teacher, steps, 1e-3):
        places = torch.randint(len(task.prompts), (batch,))
        y = task.completions(places, torch.rand(batch) < task.hard_share)
        logits = _logits(teacher, task.prompts[places], y)
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), y.flatten(), ignore_index=PAD_ID)
        loss.backward()
    return teacher.requires_grad_(False)


METHODS: dict[str, tuple[bool, ObjectiveConfig]] = {
    "sft": (False, SFTConfig()),
    "sequence-forward-kl": (False, SequenceForwardKLConfig()),
    "token-forward-kl": (False, TokenForwardKLConfig()),
    "token-reverse-kl": (True, TokenReverseKLConfig()),
    "gjsd": (True, GJSDConfig()),
    "sampled-token": (True, SampledTokenConfig()),
    "minillm": (True, SequenceReverseKLConfig(normalization="minillm")),
    "total": (True, SequenceReverseKLConfig(normalization="total")),
    "rate": (True, SequenceReverseKLConfig(normalization="rate")),
    "neutral": (True, SequenceReverseKLConfig(normalization="neutral")),
}
"""Objectives by name, with True if they train on the student's samples."""


def warm_up(student: Any, teacher: Any, task: Task, seed: int, steps: int = 500) -> None:
    """Train the student with token-level forward KL on teacher samples."""
    method = METHODS["token-forward-kl"]
    train(student, teacher, task, method, seed, steps, prompts=256, samples=1, lr=3e-3)


def train(
    student: Any,
    teacher: Any,
    task: Task,
    method: tuple[bool, ObjectiveConfig],
    seed: int,
    steps: int = 80,
    prompts: int = 64,
    samples: int = 4,
    lr: float = 2e-3,
) -> None:
    """Train the student, as a run of seqkd does, on one process."""
    torch.manual_seed(seed)
    on_student, objective = method
    divergence = objective.divergence()
    running = RunningCosts()
    for _ in _steps(student, steps, lr):
        drawn = torch.randperm(len(task.prompts) - task.heldout)[:prompts]
        places = drawn.repeat_interleave(samples)
        y = sample(student if on_student else teacher, task, places)
        read = _stats(student, teacher, task, places, y, samples, divergence and divergence[:2])
        assert read.reverse_kl is not None
        sums = read.reverse_kl.detach().sum(0), read.loss_mask.float().sum(0)
        if not running.known:
            running.update(*sums)
        counts = running.counts_of(len(places), int(read.loss_mask.sum()))
        OBJECTIVES[objective.kind](read, counts, **objective.options()).backward()
        running.update(*sums)


@dataclass(frozen=True)
class Outcome:
    """Figures of a student on the held-out prompts, means over prompts and samples."""

    accuracy: float
    hard: float
    """Probability of the hard strategy among the two, q(direct)."""
    optimum: float
    """p(direct) exp(-F(direct)) / Z with the student's own divergences F."""
    reverse_kl: float
    """Nats per sequence."""
    forward_kl: float
    """Nats per sequence."""
    length: float
    """Tokens."""


@torch.no_grad()
def describe(student: Any, teacher: Any, task: Task, samples: int = 8) -> Outcome:
    """Measure the student on the held-out prompts with ``samples`` completions each."""
    torch.manual_seed(0)
    first = len(task.prompts) - task.heldout
    places = torch.arange(first, len(task.prompts)).repeat_interleave(samples)
    y = sample(student, task, places)
    own = _stats(student, teacher, task, places, y, samples)
    text = sample(teacher, task, places)
    other = _stats(student, teacher, task, places, text, samples)
    assert own.reverse_kl is not None and other.forward_kl is not None
    words = [task.words.index(word) for word in (DIRECT, STEPS)]
    log_q, log_p = (
        _logits(llama, task.prompts[places], y[:, :1])[:, 0].log_softmax(-1)[:, words]
        for llama in (student, teacher)
    )
    future = []
    for word in words:
        forced = sample(student, task, places, word)
        cost = _stats(student, teacher, task, places, forced, samples).reverse_kl
        assert cost is not None
        future.append(cost[:, 1:].sum(1).view(-1, samples).mean(1).repeat_interleave(samples))
    optimum = (log_p - torch.stack(future, 1)).softmax(1)
    return Outcome(
        accuracy=task.correct(places, y).float().mean().item(),
        hard=log_q.softmax(1)[:, 0].mean().item(),
        optimum=optimum[:, 0].mean().item(),
        reverse_kl=own.reverse_kl.sum(1).mean().item(),
        forward_kl=other.forward_kl.sum(1).mean().item(),
        length=own.loss_mask.sum(1).float().mean().item(),
    )


@torch.no_grad()
def sample(llama: Any, task: Task, places: Tensor, first: int | None = None) -> Tensor:
    """Return [B, T] one completion of at most K + 4 tokens for each of the prompts ``places``,
    padded. ``first`` is the first word, if it is not sampled."""
    inputs, cache, tokens = task.prompts[places], None, []
    ended = torch.zeros(len(places), dtype=torch.bool)
    for t in range(task.digits + 4):
        output = llama(input_ids=inputs, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        drawn = torch.multinomial(output.logits[:, -1].softmax(-1), 1)[:, 0]
        if t == 0 and first is not None:
            drawn = torch.full_like(drawn, first)
        tokens.append(drawn.where(~ended, PAD_ID))
        ended |= drawn == END_ID
        inputs = drawn[:, None]
        if ended.all():
            break
    return torch.stack(tokens, 1)


def copied(llama: Any) -> Any:
    """Return a copy of a model."""
    return copy.deepcopy(llama)


def _steps(llama: Any, steps: int, lr: float) -> Iterator[int]:
    """Yield before each backward pass, and take a step of AdamW after it. Gradients are clipped to
    norm 5, and the learning rate decays to a tenth."""
    optimizer = torch.optim.AdamW(llama.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps, lr / 10)
    for step in range(steps):
        optimizer.zero_grad()
        yield step
        nn.utils.clip_grad_norm_(llama.parameters(), 5.0)
        optimizer.step()
        schedule.step()


def _logits(llama: Any, prompts: Tensor, completions: Tensor) -> Tensor:
    """Return [B, T, V] logits before each completion token."""
    inputs = torch.cat([prompts, completions], 1)
    logits: Tensor = llama(input_ids=inputs, use_cache=False).logits
    return logits[:, prompts.shape[1] - 1 : -1]


def _stats(
    student: Any,
    teacher: Any,
    task: Task,
    places: Tensor,
    completions: Tensor,
    samples: int,
    divergence: tuple[str, float | None] | None = None,
) -> TokenStats:
    """Return the statistics of completions, ``samples`` of each prompt in a row. A sampled padding
    token counts only before the end."""
    ended = (completions == END_ID).cumsum(1)
    mask = (ended == 0) | ((ended == 1) & (completions == END_ID))
    log_q = _logits(student, task.prompts[places], completions).log_softmax(-1)
    with torch.no_grad():
        log_p = _logits(teacher, task.prompts[places], completions).log_softmax(-1)

    def sampled(table: Tensor) -> Tensor:
        return table.gather(-1, completions[..., None])[..., 0] * mask

    wanted = None
    if divergence is not None:
        kind, coefficient = divergence
        options = () if coefficient is None else (coefficient,)
        wanted = DIVERGENCES[kind](log_q, log_p, *options) * mask
    return TokenStats(
        loss_mask=mask,
        group=torch.arange(len(places)) // samples,
        student_logprob=sampled(log_q),
        teacher_logprob=sampled(log_p),
        reverse_kl=DIVERGENCES["token_reverse_kl"](log_q, log_p) * mask,
        forward_kl=DIVERGENCES["token_forward_kl"](log_q, log_p) * mask,
        divergence=wanted,
    )
