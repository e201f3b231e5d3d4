"""``seqkd train --dry-run``, and the estimate of memory that a run shows too."""

from __future__ import annotations

import os

import torch

from actors import placement
from seqkd.checks.memory import check_memory, estimate, gpu_memory, host_memory
from seqkd.checks.preflight import Checked
from seqkd.config.run import Config, dump
from seqkd.console import print_message
from seqkd.errors import SeqkdError
from seqkd.storage import run_directory
from seqkd.training import trackers
from seqkd.training.setup import check


def dry_run(config: Config, resume: bool) -> int:
    """Print everything that can be known without starting an actor; return 2 if there are
    errors, else 0."""
    directory, errors, warnings = run_directory.locate(config), list[str](), list[str]()
    print(dump(config))
    plan = placement.plan(config)
    print("plan:")
    for actor in plan.actors:
        gpus = f", {actor.gpus:g} GPUs" if actor.gpus else ""
        name = f"{actor.role} {actor.teacher}".strip()
        print(f"  {name} {actor.index}: {actor.threads} threads{gpus}, bundle {actor.bundle}")
    print(f"  bundles ({config.placement}): {[dict(b) for b in plan.bundles]}")
    print(f"  run directory: {directory}")

    def check_directory() -> None:
        changes = run_directory.resumption(directory, config, resume).changes
        print("".join(f"  changed: {line}\n" for line in changes), end="")

    def check_models_and_data() -> None:
        nonlocal config
        config, _, checked = check(config)
        warnings.extend(checked.warnings)
        print(f"  {len(checked.train)} training prompts, {len(checked.heldout)} held-out prompts")
        print("".join(f"    {line}\n" for line in checked.sources), end="")
        warnings.extend(memory_warnings(config, checked, show=True))

    def check_resources() -> None:
        if on_this_machine(config):
            plan.check(os.cpu_count() or 1, torch.cuda.device_count(), "this machine")

    for step in (
        check_directory,
        lambda: trackers.check(config.trackers),
        check_models_and_data,
        check_resources,
    ):
        try:
            step()
        except SeqkdError as error:
            errors.append(str(error))
    print("findings:" if errors or warnings else "findings: none")
    for level, texts in (("error", errors), ("warning", warnings)):
        for text in texts:
            print_message(level, text, indent="  ")
    return 2 if errors else 0


def on_this_machine(config: Config) -> bool:
    """Return whether the run starts its own cluster on this machine."""
    return config.cluster is None and "RAY_ADDRESS" not in os.environ


def memory_warnings(config: Config, checked: Checked, show: bool = False) -> list[str]:
    """Estimate the memory of the plan and compare it with this machine's; ``show`` prints the
    estimate."""
    needs = estimate(config, checked.student, checked.teachers, placement.needed(config))
    if show:
        print("  memory by estimate, GiB (processes x each):")
        for need in needs:
            print(f"    {need}")
    if not on_this_machine(config):
        return []
    warning = check_memory(needs, host_memory(), gpu_memory())
    return [warning] if warning else []
