"""Run directories of a comparison with generated, reproducible content."""

from __future__ import annotations

import json
import math

import numpy as np
import yaml

from seqkd.comparison import plan
from seqkd.config.run import dump
from tests.report_runs import ENVIRONMENT, MAIN, TEXTS, WARMUP, configuration, example, row

PROMPTS = 64
STEPS = WARMUP + MAIN
EVERY = 15
AMOUNT = 25000
"""Budget in learner tokens, which runs use up after different numbers of steps."""
METHODS = {
    "sft": ["sampler=dataset", "objective={kind: sft}"],
    "token_forward_kl": ["sampler=teacher", "objective={kind: token_forward_kl}"],
    "rao_blackwell": ["objective.normalization=rate"],
    "default": [],
}
OFFSETS = (0.0, 0.01, -0.17, 0.12, 0.2, 0.02, -0.05, 0.3, -0.2, 0.1, -0.11, 0.04, 0.15)
"""Final divergence of each method relative to the first, nats per token."""
SHARED = np.random.default_rng(7).normal(0, 0.25, PROMPTS)
"""Difficulty of each prompt, the same for every method."""


def write_comparison(parent, methods=METHODS, seeds=(0, 1, 2), missing=(), **changes):
    """Write a comparison; return it with its entries. All runs are finished except ``missing``,
    which are (method, seed) pairs."""
    base = configuration("base", extra_terms=[], **changes).model_dump(mode="json")
    (parent / "base.yaml").write_text(yaml.safe_dump(base))
    plan_file = {
        "name": "study",
        "config": "base.yaml",
        "budget": {"kind": "learner_tokens", "amount": AMOUNT},
        "seeds": list(seeds),
        "methods": methods,
        "runs_dir": str(parent / "runs"),
    }
    file = parent / "study.yaml"
    file.write_text(yaml.safe_dump(plan_file, sort_keys=False))
    comparison = plan.load(file)
    entries = plan.entries(comparison, file)
    for entry in entries:
        if (entry.method, entry.seed) not in missing:
            write_entry(entry, list(methods).index(entry.method))
    return comparison, entries


def write_entry(entry, index):
    """Write the run of one method and seed, which ends when its budget is used up."""
    random = np.random.default_rng([index, entry.seed])
    directory = entry.directory
    directory.mkdir(parents=True)
    rows = [row(random, step, OFFSETS[index]) for step in range(STEPS)]
    spent = np.cumsum([line[entry.config.budget.kind] for line in rows])
    steps = 1 + int(np.argmax(spent >= entry.config.budget.amount))
    rows = rows[:steps]
    files = {
        "config.yaml": dump(entry.config),
        "metrics.jsonl": "".join(json.dumps(line) + "\n" for line in rows),
        "evaluation.json": json.dumps(evaluation(random, OFFSETS[index], steps)),
        "environment.json": json.dumps(ENVIRONMENT),
        "data.json": json.dumps({"held-out": {"prompts": PROMPTS, "digest": "d1"}}),
        "report.html": "<!DOCTYPE html>",
    }
    for name, text in files.items():
        (directory / name).write_text(text)


def evaluation(random, offset, steps):
    """Return evaluation.json with measurements during training and sums of each prompt."""
    taken = {"initial": 0, "warmup": WARMUP}
    taken |= {f"step {s}": s for s in range(EVERY, steps, EVERY) if s != WARMUP} | {"main": steps}
    stages = sorted(taken, key=taken.get)
    luck = random.normal(0, 0.015)
    per_prompt = {s: ratios(random, taken[s], offset, luck) for s in stages}
    return {
        "prompts": PROMPTS,
        "interval": "95 % jackknife interval over prompts",
        "figures": {
            stage: {name: shown(**sums) for name, sums in figures.items()}
            for stage, figures in per_prompt.items()
        },
        "changes": {},
        "per_prompt": per_prompt,
        "examples": [example(random, *texts) for texts in TEXTS],
    }


def ratios(random, step, offset, luck):
    """Return the two sums of each prompt by figure."""
    progress = math.exp(-step / 18)
    end = (1 - progress) * (offset + luck)
    lengths = np.maximum(1, np.round(30 + 16 * progress + 40 * end + random.normal(0, 6, PROMPTS)))
    teacher = np.maximum(1, np.round(32.7 + 20 * SHARED))
    reverse, forward = 0.8 + 1.4 * progress + end, 0.9 + 2.6 * progress + 0.8 * end
    ended = np.clip(0.75 - 0.65 * progress - end, 0.02, 0.98)

    def noisy(mean):
        return mean + SHARED + random.normal(0, 0.08, PROMPTS)

    ones = np.ones(PROMPTS)
    pairs = {
        "reverse_kl_per_token": (noisy(reverse) * lengths, lengths),
        "reverse_kl_per_sequence": (noisy(reverse) * lengths, ones),
        "forward_kl_per_token": (noisy(forward) * teacher, teacher),
        "forward_kl_per_sequence": (noisy(forward) * teacher, ones),
        "nll_per_token": (noisy(forward + 1.1) * teacher, teacher),
        "student_length": (lengths, ones),
        "teacher_length": (teacher, ones),
        "student_eos_rate": ((random.random(PROMPTS) < ended).astype(float), ones),
        "teacher_eos_rate": ((SHARED < 0.12).astype(float), ones),
    }
    return {n: {"above": a.tolist(), "below": b.tolist()} for n, (a, b) in pairs.items()}


def shown(above, below):
    """Return a mean with its interval as in evaluation.json."""
    mean = sum(above) / sum(below)
    return {"mean": mean, "low": 0.95 * mean, "high": 1.05 * mean}


def write_evaluation(directory, name, figures):
    """Write the output of seqkd evaluate. ``figures``: one number per prompt by model and
    figure."""
    per_prompt = {
        model: {figure: {"above": list(v), "below": [1.0] * len(v)} for figure, v in values.items()}
        for model, values in figures.items()
    }
    file = directory / "evaluation" / name / "evaluation.json"
    file.parent.mkdir(parents=True)
    prompts = len(next(iter(next(iter(figures.values())).values())))
    file.write_text(json.dumps({"prompts": prompts, "figures": {}, "per_prompt": per_prompt}))
