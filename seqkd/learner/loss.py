"""Loss of a step: terms, importance weights, and reported statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from seqkd.config.phases import TermConfig
from seqkd.learner.student import as_token_stats
from seqkd.objectives import OBJECTIVES, mixture_weight
from seqkd.types import Counts, Divergence, EndStat, PartResult, Stat, TrainBatch


@dataclass(frozen=True)
class RankPart:
    """One rank's share of a :class:`seqkd.protocols.Part`."""

    micro_batches: list[TrainBatch]
    counts: Counts
    terms: tuple[TermConfig, ...]
    teacher_fraction: float | None

    def weight(self, batch: TrainBatch, stats: Mapping[Stat, Tensor]) -> Tensor | None:
        """Return the [B] importance weights of a mixture's sequences. None without a mixture."""
        if self.teacher_fraction is None:
            return None
        student_total, teacher_total = (
            (stats[name].detach() * batch.loss_mask).sum(1)
            for name in ("student_logprob", "teacher_logprob")
        )
        return mixture_weight(student_total, teacher_total, self.teacher_fraction)

    def loss(self, batch: TrainBatch, stats: Mapping[Stat, Tensor]) -> Tensor:
        """Return the weighted sum of all terms on a micro-batch, a scalar."""
        weight = self.weight(batch, stats)
        losses = []
        for term in self.terms:
            wanted = term.objective.divergence()
            read = as_token_stats(batch, stats, Divergence(*wanted) if wanted else None, weight)
            objective = OBJECTIVES[term.objective.kind]
            loss = objective(read, self.counts, **term.objective.options())
            losses.append(loss * term.weight * self._conversion(term))
        return torch.stack(losses).sum()

    def _conversion(self, term: TermConfig) -> float:
        """Return the factor from the objective's unit to the term's."""
        if term.loss_unit == term.objective.unit:
            return 1.0
        # The running estimate does not depend on the batch, but only some objectives maintain it.
        counts = self.counts
        length = counts.length if term.objective.running else counts.tokens / counts.sequences
        return length if term.loss_unit == "sequence" else 1 / length


def stat_names(
    batch: TrainBatch, terms: tuple[TermConfig, ...], ends: tuple[int, ...]
) -> tuple[Stat, ...]:
    """Return the statistics that the terms read, and all others that the teacher's scores allow.
    ``ends`` are the tokens that end a completion."""
    names: list[Stat] = ["student_logprob", "entropy"]
    for term in terms:
        wanted = term.objective.divergence()
        names += [*term.objective.stats(), *([Divergence(*wanted)] if wanted else [])]
        names += [EndStat(name, ends) for name in term.objective.end_stats()]
    if batch.teacher_hidden is not None or batch.teacher_logprobs is not None:
        names.append("teacher_logprob")
    if batch.teacher_hidden is not None or batch.teacher_top_ids is not None:
        names += ["reverse_kl", "forward_kl"]
    return tuple(dict.fromkeys(names))


def part_result(batch: TrainBatch, stats: dict[Stat, Tensor], weight: Tensor | None) -> PartResult:
    """Compute the reported statistics of a micro-batch."""
    mask = batch.loss_mask
    values = {n: v.detach() for n, v in stats.items() if isinstance(n, str)}
    sums = {name: (value * mask).sum().item() for name, value in values.items()}
    sums |= {"tokens": mask.sum().item(), "sequences": mask.any(1).sum().item()}
    weights = mask.any(1).float() if weight is None else weight * mask.any(1)
    sums |= {"weight": weights.sum().item(), "weight_squared": (weights.double() ** 2).sum().item()}
    gap = _logprob_gap(batch, values)
    if gap is not None:
        sums["logprob_gap"] = gap.sum().item()
    sums |= _ratios(batch, values["student_logprob"])
    cost = values.get("reverse_kl")
    if cost is None and "teacher_logprob" in values:
        cost = values["student_logprob"] - values["teacher_logprob"]
    return PartResult(
        sums,
        0.0 if gap is None else gap.max().item(),
        None if cost is None else (cost * mask * weights[:, None]).sum(0).cpu(),
        None if cost is None else (mask * weights[:, None]).sum(0).cpu(),
        batch.sample_ids,
    )


def _ratios(batch: TrainBatch, student_logprob: Tensor) -> dict[str, float]:
    """Compute importance ratios and KL estimates of the learner relative to the sampler, on the
    student's completions. k1 and k3 are defined in Schulman, Approximating KL divergence (2020)."""
    mask = batch.loss_mask & ~batch.by_teacher[:, None]
    if batch.rollout_logprobs is None or not mask.any():
        return {}
    log_ratio = (student_logprob.double() - batch.rollout_logprobs).where(mask, 0.0)
    ratio = log_ratio.sum(1)[mask.any(1)].exp()
    return {
        "ratio_tokens": mask.sum().item(),
        "k1": -log_ratio.sum().item(),
        "k3": (log_ratio.expm1() - log_ratio).sum().item(),
        "ratio_sequences": len(ratio),
        "ratio": ratio.sum().item(),
        "ratio_squared": (ratio**2).sum().item(),
    }


def _logprob_gap(batch: TrainBatch, stats: Mapping[str, Tensor]) -> Tensor | None:
    """Return the [B, T] absolute difference between the learner's and the sampler's log-prob of
    every token, for the model that sampled it. It is 0 where the learner's value is unknown."""
    if batch.rollout_logprobs is None:
        return None
    drawn = batch.by_teacher[:, None]
    here = torch.where(drawn, stats.get("teacher_logprob", torch.nan), stats["student_logprob"])
    gap = ((here - batch.rollout_logprobs) * batch.loss_mask).abs()
    return None if gap.isnan().all() else gap.nan_to_num(0.0)
