"""What a run tells: metrics.jsonl, TensorBoard, and one line a step for the person watching."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from seqkd.config import Config, Phase
from seqkd.protocols import Part
from seqkd.types import PartResult, StepResult

STAGES = ("sync", "sample", "score", "learn")


class Clock:
    """Seconds of each stage of one step."""

    def __init__(self) -> None:
        self.start = time.perf_counter()
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextmanager
    def __call__(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[stage] += time.perf_counter() - start

    def total(self) -> float:
        """Seconds since the step began."""
        return time.perf_counter() - self.start


class Recorder:
    """Writes a run's metrics as they come; closed by the caller."""

    def __init__(self, directory: Path, config: Config, out: TextIO = sys.stdout) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.out, self.live = out, out.isatty()
        self.steps = sum(phase.steps for _, phase in config.phases)
        self.done = 0
        self.stage_seconds = dict.fromkeys((*STAGES, "other"), 0.0)
        self.file = (directory / "metrics.jsonl").open("a", encoding="utf-8")
        self.board: Any = SummaryWriter(str(directory / "tensorboard"))

    def note(self, text: str) -> None:
        """A line for the person watching."""
        self._line(text, keep=True)

    def begin(self, name: str, phase: Phase) -> None:
        """Announce a phase."""
        self.recent: list[float] = []
        terms = " + ".join(
            f"{'' if term.weight == 1 else f'{term.weight:g} '}{term.objective.kind} "
            f"({term.sampler} samples)"
            for term in phase.terms
        )
        self.note(f"{name}: {phase.steps} steps, {terms}")

    def step(self, step: int, row: dict[str, Any], clock: Clock) -> None:
        """Record one optimizer step, ``row`` from :func:`describe`."""
        total = clock.total()
        self.stage_seconds["other"] += total - sum(clock.seconds.values())
        for stage, seconds in clock.seconds.items():
            self.stage_seconds[stage] += seconds
        row = row | {f"time_{stage}_s": seconds for stage, seconds in clock.seconds.items()}
        row |= {"time_step_s": total, "tokens_per_s": row["tokens"] / total}
        self.file.write(json.dumps({"step": step, **row}) + "\n")
        self.file.flush()
        for key, value in row.items():
            if isinstance(value, (int, float)):
                self.board.add_scalar(key, value, step)
        self.done += 1
        self.recent = [*self.recent[-9:], total]
        self._line(self._progress(row), keep=self.done == self.steps)

    def close(self) -> None:
        """Flush and close every file."""
        self.file.close()
        self.board.close()

    def _progress(self, row: dict[str, Any]) -> str:
        filled = round(16 * self.done / self.steps)
        left = (self.steps - self.done) * sum(self.recent) / len(self.recent)
        parts = [
            f"{row['phase']:<6} {self.done:>3}/{self.steps} [{'#' * filled}{'.' * (16 - filled)}]",
            f"loss {row['loss']:<8.4g}",
            *(
                f"{label} {row[key]:<6.4g}"
                for key, label in (
                    ("reverse_kl_per_token", "reverse KL/token"),
                    ("forward_kl_per_token", "forward KL/token"),
                )
                if key in row
            ),
            f"length {row['length']:<5.3g}",
            f"{row['tokens_per_s']:.0f} tokens/s",
            f"{row['time_step_s']:.1f} s/step",
            f"ETA {int(left // 60)}:{int(left % 60):02d}",
        ]
        return "  ".join(parts)

    def _line(self, text: str, keep: bool) -> None:
        if self.live:
            self.out.write("\r\033[K" + text + ("\n" if keep else ""))
        else:
            self.out.write(text + "\n")
        self.out.flush()


def describe(
    config: Config,
    name: str,
    phase: Phase,
    version: int,
    lr: float,
    parts: Sequence[Part],
    result: StepResult,
) -> dict[str, Any]:
    """The metrics of one step, without times. Divergences in nats, lengths in tokens. Those of the
    phase's own sampler have plain names, those of the others the sampler's name before them."""
    row: dict[str, Any] = {
        "phase": name,
        "sampler": phase.sampler,
        "objective": phase.objective.kind,
        "policy_version": version,
        "loss": result.loss,
        "grad_norm": result.grad_norm,
        "lr": lr,
    }
    for sampler, part, learnt in zip(phase.by_sampler, parts, result.parts, strict=True):
        prefix = "" if sampler == phase.sampler else f"{sampler}/"
        described = _describe_part(config, part, learnt)
        drawn = described["rollout_policy_version"]
        if sampler in ("student", "mixture") and drawn != version:
            # Of an older student the gap is how far training has gone, not a fault.
            described = {k: v for k, v in described.items() if not k.startswith("logprob_gap")}
        row |= {prefix + key: value for key, value in described.items()}
    return row


def _describe_part(config: Config, part: Part, result: PartResult) -> dict[str, Any]:
    counts, rollouts = part.counts, part.rollouts
    row: dict[str, Any] = {
        "rollout_policy_version": max(r.policy_version for r in rollouts),
        "sequences": counts.sequences,
        "tokens": counts.tokens,
        "length": counts.tokens / counts.sequences,
        "eos_rate": sum(r.finish_reason == "stop" for r in rollouts) / len(rollouts),
    }
    if any(term.objective.running for term in part.terms):
        row |= {"rate": counts.rate, "expected_length": counts.length}
    row |= {f"teacher_{name}": number for name, number in part.usage.items()}
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
    # Log-probs of a tempered or cut distribution are no one's but the sampler's.
    if "logprob_gap" in result.sums and config.rollout.temperature == config.rollout.top_p == 1:
        row |= {
            "logprob_gap_mean": result.per_token("logprob_gap"),
            "logprob_gap_max": result.logprob_gap_max,
        }
    return row
