"""The runs of a comparison as they leave their directories; always the same."""

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
"""Learner tokens, which some run spends in fewer steps than another."""
METHODS = {
    "sft": ["sampler=dataset", "objective={kind: sft}"],
    "token_forward_kl": ["sampler=teacher", "objective={kind: token_forward_kl}"],
    "rao_blackwell": ["objective.normalization=rate"],
    "default": [],
}
OFFSETS = (0.0, 0.01, -0.17, 0.12, 0.2, 0.02, -0.05, 0.3, -0.2, 0.1, -0.11, 0.04, 0.15)
"""What each method ends above the first, in nats per token."""
SHARED = np.random.default_rng(7).normal(0, 0.25, PROMPTS)
"""What makes one prompt harder than another, for every method."""


def write_comparison(parent, methods=METHODS, seeds=(0, 1, 2), missing=(), **changes):
    """A comparison and its entries; every run is finished but those of ``missing``, (method, seed)
    each."""
    base = configuration("base", extra_terms=[], **changes).model_dump(mode="json")
    (parent / "base.yaml").write_text(yaml.safe_dump(base))
    given = {
        "name": "study",
        "config": "base.yaml",
        "budget": {"kind": "learner_tokens", "amount": AMOUNT},
        "seeds": list(seeds),
        "methods": methods,
        "runs_dir": str(parent / "runs"),
    }
    file = parent / "study.yaml"
    file.write_text(yaml.safe_dump(given, sort_keys=False))
    comparison = plan.load(file)
    entries = plan.entries(comparison, file)
    for entry in entries:
        if (entry.method, entry.seed) not in missing:
            write_entry(entry, list(methods).index(entry.method))
    return comparison, entries


def write_entry(entry, index):
    """The run of one method and seed, finished by its budget."""
    random = np.random.default_rng([index, entry.seed])
    directory = entry.directory
    directory.mkdir(parents=True)
    rows = [row(random, step, OFFSETS[index]) for step in range(STEPS)]
    spent = np.cumsum([of[entry.config.budget.kind] for of in rows])
    steps = 1 + int(np.argmax(spent >= entry.config.budget.amount))
    rows = rows[:steps]
    files = {
        "config.yaml": dump(entry.config),
        "metrics.jsonl": "".join(json.dumps(of) + "\n" for of in rows),
        "evaluation.json": json.dumps(evaluation(random, OFFSETS[index], steps)),
        "environment.json": json.dumps(ENVIRONMENT),
        "data.json": json.dumps({"held-out": {"prompts": PROMPTS, "digest": "d1"}}),
        "report.html": "<!DOCTYPE html>",
    }
    for name, text in files.items():
        (directory / name).write_text(text)


def evaluation(random, offset, steps):
    """evaluation.json with measurements on the way, and every figure prompt by prompt."""
    taken = {"initial": 0, "warmup": WARMUP}
    taken |= {f"step {s}": s for s in range(EVERY, steps, EVERY) if s != WARMUP} | {"main": steps}
    stages = sorted(taken, key=taken.get)
    luck = random.normal(0, 0.015)
    per_prompt = {s: ratios(random, taken[s], offset, luck) for s in stages}
    return {
        "prompts": PROMPTS,
        "interval": "95 % percentile bootstrap over prompts",
        "figures": {
            stage: {name: shown(**of) for name, of in found.items()}
            for stage, found in per_prompt.items()
        },
        "changes": {},
        "per_prompt": per_prompt,
        "examples": [example(random, *texts) for texts in TEXTS],
    }


def ratios(random, step, offset, luck):
    """By figure the two sums of each prompt."""
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
    """A mean as evaluation.json has it."""
    mean = sum(above) / sum(below)
    return {"mean": mean, "low": 0.95 * mean, "high": 1.05 * mean}


def write_evaluation(directory, name, figures):
    """What seqkd evaluate leaves: by model, by figure one number a prompt."""
    found = {
        model: {figure: {"above": list(v), "below": [1.0] * len(v)} for figure, v in of.items()}
        for model, of in figures.items()
    }
    file = directory / "evaluation" / name / "evaluation.json"
    file.parent.mkdir(parents=True)
    prompts = len(next(iter(next(iter(figures.values())).values())))
    file.write_text(json.dumps({"prompts": prompts, "figures": {}, "per_prompt": found}))
