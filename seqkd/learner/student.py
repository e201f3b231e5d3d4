"""The student in the learner: hidden states of token ids, and per-token statistics of states."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from seqkd.errors import ModelError
from seqkd.learner import batching
from seqkd.learner.teacher_distribution import FullTeacher, KnownTeacher, TopTeacher
from seqkd.learner.token_stats import token_loss, token_stats
from seqkd.models.output_head import OutputHead, head_of
from seqkd.types import Divergence, EndStat, Rollout, Stat, TokenStats, TrainBatch


def last_hidden(
    model: nn.Module,
    input_ids: Tensor,
    attention_mask: Tensor,
    position_ids: Tensor | None = None,
) -> Tensor:
    """Compute the input of the output head, the last hidden states after the final norm,
    [B, S] -> [B, S, H]."""
    body: Any = model.base_model
    positions = {} if position_ids is None else {"position_ids": position_ids}
    hidden: Tensor = body(
        input_ids=input_ids, attention_mask=attention_mask, use_cache=False, **positions
    ).last_hidden_state
    return hidden


def states_of(model: nn.Module, batch: TrainBatch) -> Tensor:
    """Compute the states before every completion token, [N, H]."""
    attention = batch.attention_mask
    if batch.segment is not None:
        attention = prefix_shared_mask(batch.segment, attention, next(model.parameters()).dtype)
    hidden = last_hidden(model, batch.input_ids, attention, batch.position_ids)
    return hidden[batch.state_row[:, None], batch.state_index][batch.loss_mask]


def prefix_shared_mask(segment: Tensor, attention_mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Build the [R, 1, S, S] additive attention mask of a :class:`seqkd.types.TrainBatch` with
    several completions per row.

    A token attends to earlier tokens of the prompt and of its own completion. A padding token
    attends to itself, so that no row of the mask is empty.
    """
    size = segment.shape[1]
    query, key = segment[:, :, None], segment[:, None, :]
    before = torch.ones(size, size, dtype=torch.bool, device=segment.device).tril()
    seen = before & ((key == query) | (key == 0)) & attention_mask[:, None, :].bool()
    seen |= torch.eye(size, dtype=torch.bool, device=segment.device)
    lowest = torch.finfo(dtype).min
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, lowest)[:, None]


class StudentModel(nn.Module):
    """A causal language model whose forward pass returns per-token statistics instead of logits."""

    def __init__(self, model: nn.Module, fused: bool = False) -> None:
        """Wrap ``model``. For ``fused`` see :func:`seqkd.learner.token_stats.token_stats`."""
        super().__init__()
        self.model, self.fused = model, fused

    def forward(
        self,
        batch: TrainBatch,
        names: tuple[Stat, ...],
        teacher_head: OutputHead | None,
        objective: Callable[[dict[Stat, Tensor]], Tensor] | None = None,
    ) -> tuple[Tensor | None, dict[Stat, Tensor]]:
        """Compute the loss and the statistics, [B, T] float32 for each name, 0 on padding.

        With an objective, only the loss is differentiable. Without an objective, the loss is None
        and the statistics are differentiable. See :func:`seqkd.learner.token_stats.token_loss` and
        ``token_stats``.
        """
        mask = batch.loss_mask
        read: dict[Stat, Tensor] = (
            {"teacher_logprob": batch.teacher_logprobs}
            if batch.teacher_logprobs is not None
            else {}
        )

        def laid_out(values: Mapping[Stat, Tensor]) -> dict[Stat, Tensor]:
            return read | {
                name: torch.zeros(mask.shape, device=value.device).masked_scatter(mask, value)
                for name, value in values.items()
            }

        work = (
            states_of(self.model, batch),
            head_of(self.model),
            batch.target_ids[mask],
            tuple(name for name in names if name not in read),
            known_teacher(batch, teacher_head),
        )
        if objective is None:
            return None, laid_out(token_stats(*work, fused=self.fused))
        row, position = mask.nonzero(as_tuple=True)
        loss, values = token_loss(
            *work,
            lambda values: objective(laid_out(values)),
            position,
            batch.group[row],
            fused=self.fused,
        )
        return loss, laid_out(values)


def known_teacher(batch: TrainBatch, head: OutputHead | None) -> KnownTeacher | None:
    """Return the teacher's distributions that the batch contains."""
    if batch.teacher_hidden is not None:
        assert head is not None
        return FullTeacher(batch.teacher_hidden, head)
    if batch.teacher_top_ids is not None:
        assert batch.teacher_top_logprobs is not None
        return TopTeacher(batch.teacher_top_ids, batch.teacher_top_logprobs)
    return None


def as_token_stats(
    batch: TrainBatch,
    stats: Mapping[Stat, Tensor],
    divergence: Divergence | None = None,
    weight: Tensor | None = None,
) -> TokenStats:
    """Convert the statistics of :class:`StudentModel` to the record that objectives read."""
    named = {
        name.name if isinstance(name, EndStat) else name: value
        for name, value in stats.items()
        if not isinstance(name, Divergence)
    }
    return TokenStats(
        loss_mask=batch.loss_mask,
        group=batch.group,
        divergence=None if divergence is None else stats[divergence],
        rollout_logprob=batch.rollout_logprobs,
        weight=weight,
        **named,
    )


def check_head(model: nn.Module, field: str) -> None:
    """Raise ModelError if head(body(x)) differs from the model's logits.

    Otherwise a model with an unknown logit transform would silently be trained with wrong logits.
    """
    config: Any = model.config
    ids = torch.arange(8, device=next(model.parameters()).device)[None] % config.vocab_size
    mask = torch.ones_like(ids)
    with torch.no_grad():
        expected = model(input_ids=ids, attention_mask=mask).logits.float()
        head = head_of(model)
        computed = head.finish(head.raw(last_hidden(model, ids, mask)[0]))
    gap = (computed - expected[0]).abs().max().item()
    if not gap <= 1e-2 * expected.abs().max().item():
        raise ModelError(
            f"{field}: models of type {config.model_type!r} are not supported: the logits differ "
            f"from the output head applied to the last hidden state (by up to {gap:.3g}). Set it "
            "to a model of another type."
        )


def prefix_sharing_factor(model: nn.Module) -> int:
    """Return :attr:`seqkd.learner.batching.Layout.sharing` for a causal language model.

    A matrix element costs one multiplication per token. A pair of tokens costs twice the hidden
    size. The result is 0 if the model does not separate the completions of a row, because of
    sliding windows, recurrent layers, or position ids that the model computes itself.
    """
    config: Any = model.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    windows = ("sliding_window", "window_size", "attention_window")
    if kinds != {"full_attention"} or any(getattr(config, name, None) for name in windows):
        return 0
    prompt, ends = (1, 2, 3), ((4, 5, 6), (7, 8, 9, 10))
    pair = [Rollout("", str(ids), prompt, ids, None, "dataset", 0, "length") for ids in ends]
    device = next(model.parameters()).device
    together, alone = (
        batching.to_device(batching.pack(pair, {}, pair[0], layout), device)
        for layout in (batching.Layout(1, sharing=10**9), batching.Layout(1))
    )
    try:
        with torch.no_grad():
            shared, separate = (states_of(model, batch).float() for batch in (together, alone))
    except (TypeError, ValueError, RuntimeError):  # the mask or position_ids are not supported
        return 0
    allowed = 1e-4 if next(model.parameters()).dtype == torch.float32 else 3e-2
    if not (shared - separate).abs().max() <= allowed * separate.abs().max():
        return 0
    body: Any = model.base_model
    embedding = body.get_input_embeddings().weight
    matrices = sum(p.numel() for p in body.parameters()) - embedding.numel()
    return int(matrices / config.num_hidden_layers / (2 * config.hidden_size))
