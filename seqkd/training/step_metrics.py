"""Metrics of one optimizer step."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import xxhash

from seqkd.config.phases import PhaseConfig
from seqkd.config.run import Config
from seqkd.config.samplers import SAMPLERS
from seqkd.evaluation.text import repetition
from seqkd.protocols import Part
from seqkd.types import PartResult, Rollout, StepResult


def step_metrics(
    config: Config,
    name: str,
    phase: PhaseConfig,
    version: int,
    lr: float,
    parts: Sequence[Part],
    result: StepResult,
) -> dict[str, Any]:
    """Return the metrics of one step, without times. Divergences are in nats, lengths in tokens.
    Metrics of a sampler other than the phase's own have the sampler's name as a prefix."""
    row: dict[str, Any] = {
        "phase": name,
        "sampler": phase.sampler,
        "objective": phase.objective.kind,
        "policy_version": version,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "skipped": result.skipped,
        "lr": lr,
    }
    for sampler, part, statistics in zip(phase.by_sampler, parts, result.parts, strict=True):
        prefix = "" if sampler == phase.sampler else f"{sampler}/"
        described = _describe_part(config, part, statistics)
        drawn = described["rollout_policy_version"]
        if SAMPLERS[sampler].on_student and drawn != version:
            # For samples of an older student the gap measures training progress, not a fault.
            described = {k: v for k, v in described.items() if not k.startswith("logprob_gap")}
        row |= {prefix + key: value for key, value in described.items()}
    return row


def _digest(rollouts: Sequence[Rollout]) -> str:
    """Return a digest of completions that does not depend on their order."""
    texts = sorted(f"{r.sample_id} {r.completion_ids}" for r in rollouts)
    return xxhash.xxh3_64_hexdigest("\n".join(texts).encode())


def _describe_part(config: Config, part: Part, result: PartResult) -> dict[str, Any]:
    counts, rollouts = part.counts, part.rollouts
    cut = len(part.masked) + sum(r.finish_reason == "length" for r in rollouts)
    row: dict[str, Any] = {
        "samples": _digest(rollouts),
        "rollout_policy_version": max(r.policy_version for r in rollouts),
        "sequences": counts.sequences,
        "tokens": counts.tokens,
        "length": counts.tokens / counts.sequences,
        "eos_rate": sum(r.finish_reason == "stop" for r in rollouts) / len(rollouts),
        "truncation_rate": cut / (len(rollouts) + len(part.masked)),
        "repetition": repetition(rollouts),
    }
    if any(term.objective.running for term in part.terms):
        row |= {"rate": counts.rate, "expected_length": counts.length}
    row |= {f"teacher_{name}": number for name, number in part.usage.items()}
    # Not by usage, which is empty while completions are read from the replay log.
    if any(teacher.endpoint for teacher in config.teachers.values()):
        drawn = len(rollouts) + len(part.masked) + part.skipped
        row["teacher_skipped_share"] = part.skipped / drawn
    if part.teacher_fraction is not None:
        weight, squared = result.sums["weight"], result.sums["weight_squared"]
        row |= {
            "teacher_samples": sum(r.source == "teacher" for r in rollouts),
            "mean_weight": weight / counts.sequences,
            "effective_sample_size": weight**2 / squared if squared else 0.0,
        }
    for stat in ("reverse_kl", "forward_kl", "entropy", "student_logprob", "teacher_logprob"):
        mean = result.per_token(stat)
        if mean is not None:
            row[f"{stat}_per_token"] = mean
    # With temperature or top-p the sampling distribution differs from the model's, so the gap would
    # not indicate a fault.
    if "logprob_gap" in result.sums and config.rollout.temperature == config.rollout.top_p == 1:
        row |= {
            "logprob_gap_mean": result.per_token("logprob_gap"),
            "logprob_gap_max": result.logprob_gap_max,
        }
    return row | _describe_ratios(result.sums)


def _describe_ratios(sums: Mapping[str, float]) -> dict[str, float]:
    """Return statistics of the ratio of the current student to the sampling student. k1 and k3 are
    estimates of their divergence per token. The importance ratio is per sequence."""
    row: dict[str, float] = {}
    if tokens := sums.get("ratio_tokens"):
        row |= {f"{name}_per_token": sums[name] / tokens for name in ("k1", "k3")}
    if sequences := sums.get("ratio_sequences"):
        ratio, squared = sums["ratio"], sums["ratio_squared"]
        row |= {
            "ratio_mean": ratio / sequences,
            "ratio_effective_sample_size": ratio**2 / squared / sequences if squared else 0.0,
        }
    return row
