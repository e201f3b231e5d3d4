"""The catalog of metrics: label, unit and better direction of every reported metric.

Names are the keys of metrics.jsonl, of a run's evaluation.json (``heldout/`` in TensorBoard), and
of the evaluation.json that ``seqkd evaluate`` writes. Definitions: docs/metrics.md and
docs/evaluation.md.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

Better = Literal["lower", "higher", "teacher", ""]
"""The better direction: lower, higher, closer to the teacher's value, or none."""


class Metric(NamedTuple):
    """Label, unit and better direction of one metric."""

    label: str
    unit: str = ""
    better: Better = ""


CATALOG: dict[str, Metric] = {
    # divergences
    "reverse_kl_per_token": Metric("reverse KL per token", "nats", "lower"),
    "reverse_kl_per_sequence": Metric("reverse KL per sequence", "nats", "lower"),
    "forward_kl_per_token": Metric("forward KL per token", "nats", "lower"),
    "forward_kl_per_sequence": Metric("forward KL per sequence", "nats", "lower"),
    "nll_per_token": Metric("NLL of the teacher's text", "nats per token", "lower"),
    "perplexity": Metric("perplexity of the teacher's text", "", "lower"),
    "teacher_nll_per_token": Metric(
        "teacher's NLL of the completions", "nats per token", "teacher"
    ),
    # completions
    "student_length": Metric("completion length", "tokens", "teacher"),
    "teacher_length": Metric("teacher's completion length", "tokens"),
    "student_eos_rate": Metric("EOS rate", "share", "teacher"),
    "teacher_eos_rate": Metric("teacher's EOS rate", "share"),
    "rouge1": Metric("ROUGE-1", "0 to 100", "higher"),
    "rouge2": Metric("ROUGE-2", "0 to 100", "higher"),
    "rougeL": Metric("ROUGE-L", "0 to 100", "higher"),
    "bartscore_f": Metric("BARTScore F", "nats per token", "higher"),
    "bartscore_precision": Metric("BARTScore precision", "nats per token", "higher"),
    "bartscore_recall": Metric("BARTScore recall", "nats per token", "higher"),
    "length": Metric("completion length", "tokens", "teacher"),
    "ended": Metric("EOS rate", "share", "teacher"),
    "eos_rate": Metric("EOS rate", "share", "teacher"),
    "truncation_rate": Metric("truncation rate", "share"),
    "repetition": Metric("repeated 4-grams", "share", "teacher"),
    "distinct1": Metric("distinct-1", "share", "teacher"),
    "distinct2": Metric("distinct-2", "share", "teacher"),
    "distinct3": Metric("distinct-3", "share", "teacher"),
    "self_bleu": Metric("self-BLEU", "0 to 100", "teacher"),
    "entropy_per_token": Metric("student's entropy", "nats per token"),
    "student_logprob_per_token": Metric("student's log-prob", "nats per token"),
    "teacher_logprob_per_token": Metric("teacher's log-prob", "nats per token"),
    "samples": Metric("digest of the completions"),
    "sequences": Metric("completions", "count"),
    "tokens": Metric("completion tokens", "tokens"),
    "rate": Metric("running divergence rate", "nats per token", "lower"),
    "expected_length": Metric("running completion length", "tokens"),
    "teacher_samples": Metric("teacher's samples", "count"),
    "mean_weight": Metric("mean importance weight", "1 in expectation"),
    "effective_sample_size": Metric("effective sample size", "sequences", "higher"),
    # optimizer steps
    "step": Metric("optimizer step"),
    "phase": Metric("phase"),
    "sampler": Metric("sampler"),
    "objective": Metric("objective"),
    "policy_version": Metric("student version", "steps"),
    "rollout_policy_version": Metric("version of the sampling student", "steps"),
    "loss": Metric("loss", "of the objective"),
    "grad_norm": Metric("gradient norm", "before clipping"),
    "skipped": Metric("skipped step", "0 or 1"),
    "lr": Metric("learning rate"),
    # sampling student compared with current student
    "logprob_gap_mean": Metric("log-prob gap, mean", "nats per token", "lower"),
    "logprob_gap_max": Metric("log-prob gap, largest", "nats", "lower"),
    "k1_per_token": Metric("policy lag, k1 estimate", "nats per token"),
    "k3_per_token": Metric("policy lag, k3 estimate", "nats per token"),
    "ratio_mean": Metric("mean importance ratio", "1 in expectation"),
    "ratio_effective_sample_size": Metric("effective share of sequences", "share", "higher"),
    # time and cost
    "time_sync_s": Metric("sync", "s"),
    "time_sample_s": Metric("sample", "s"),
    "time_score_s": Metric("score", "s"),
    "time_watch_s": Metric("watch", "s"),
    "time_learn_s": Metric("learn", "s"),
    "time_ahead_s": Metric("sampled ahead", "s"),
    "time_step_s": Metric("whole step", "s"),
    "prompts": Metric("prompts", "count"),
    "sampled_tokens": Metric("sampled tokens", "tokens"),
    "learner_tokens": Metric("trained tokens", "tokens"),
    "teacher_tokens": Metric("teacher tokens", "tokens"),
    "tokens_per_s": Metric("throughput", "tokens per second"),
    "teacher_requests": Metric("endpoint requests", "count"),
    "teacher_unreadable": Metric("unreadable endpoint responses", "count", "lower"),
    "teacher_refused": Metric("refused endpoint responses", "count", "lower"),
    "teacher_skipped": Metric("skipped requests", "count", "lower"),
    "teacher_skipped_share": Metric("share of skipped completions", "share", "lower"),
    "teacher_prompt_tokens": Metric("endpoint prompt tokens", "tokens"),
    "teacher_completion_tokens": Metric("endpoint completion tokens", "tokens"),
}


def metric(name: str) -> Metric:
    """Return the entry of a name, with or without a prefix such as ``dataset/``. An unknown name
    is its own label. ``task_NAME`` is the accuracy at a task (:mod:`seqkd.evaluation.tasks`)."""
    last = name.rpartition("/")[2]
    if (task := last.removeprefix("teacher_")).startswith("task_"):
        label = f"accuracy, {task.removeprefix('task_')}"
        own = Metric(label, "share", "higher")
        return own if task == last else Metric(f"teacher's {label}", "share")
    return CATALOG.get(last, Metric(name))


def limits(name: str) -> tuple[float, float]:
    """Return the smallest and the largest possible value of a held-out figure."""
    largest = {"share": 1.0, "0 to 100": 100.0}.get(metric(name).unit, math.inf)
    return (-math.inf if name.startswith("bartscore") else 0.0), largest


def title(name: str) -> str:
    """Return the label as a heading: "Reverse KL per token"."""
    label = metric(name).label
    return label[:1].upper() + label[1:]


def labeled(name: str) -> str:
    """Return the label with its unit: "reverse KL per token (nats)"."""
    label, unit, _ = metric(name)
    return f"{label} ({unit})" if unit else label
