"""``seqkd train --dry-run``, and the memory estimate that ``seqkd train`` prints, too."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import torch

from actors import placement
from seqkd.checks.memory import check_memory, estimate, gpu_memory, host_memory
from seqkd.checks.preflight import Checked
from seqkd.config.run import Config, dump
from seqkd.console import print_message, show
from seqkd.errors import SeqkdError
from seqkd.storage import run_directory
from seqkd.training import trackers
from seqkd.training.setup import check


def dry_run(config: Config, resume: bool) -> int:
    """Print the configuration, the plan and all findings without starting an actor. Return 2 if
    there are errors, else 0."""
    directory, errors, warnings = run_directory.locate(config), list[str](), list[str]()
    resumed: Path | None = None
    plan = placement.plan(config)
    show(dump(config), "plan:")
    for actor in plan.actors:
        gpus = f", {actor.gpus:g} GPUs" if actor.gpus else ""
        name = f"{actor.role} {actor.teacher}".strip()
        show(f"  {name} {actor.index}: {actor.threads} threads{gpus}, bundle {actor.bundle}")
    show(f"  bundles ({config.placement}): {[dict(b) for b in plan.bundles]}")
    show(f"  run directory: {directory}")

    def check_directory() -> None:
        nonlocal resumed
        resumption = run_directory.resumption(directory, config, resume)
        resumed = directory if resumption.exists else None
        show(*(f"  changed: {line}" for line in resumption.changes))

    def check_models_and_data() -> None:
        nonlocal config
        config, _, checked = check(config, resumed)
        warnings.extend(checked.warnings)
        show(f"  {len(checked.train)} training prompts, {len(checked.heldout)} held-out prompts")
        show(*(f"    {line}" for line in checked.sources))
        warnings.extend(memory_warnings(config, checked, verbose=True))

    for step in (
        check_directory,
        lambda: trackers.check(config.trackers),
        check_models_and_data,
        lambda: check_machine(config),
    ):
        try:
            step()
        except SeqkdError as error:
            errors.append(str(error))
    show("findings:" if errors or warnings else "findings: none")
    for level, texts in (("error", errors), ("warning", warnings)):
        for text in texts:
            print_message(level, text, indent="  ", file=sys.stdout)
    return 2 if errors else 0


def on_this_machine(config: Config) -> bool:
    """Return whether the run starts its own cluster on this machine."""
    return config.cluster is None and "RAY_ADDRESS" not in os.environ


def check_machine(config: Config) -> None:
    """Raise ResourceError if the run starts its own cluster and this machine has too few cores or
    GPUs."""
    if on_this_machine(config):
        have = os.cpu_count() or 1, torch.cuda.device_count()
        placement.plan(config).check(*have, "this machine")


def memory_warnings(config: Config, checked: Checked, verbose: bool = False) -> list[str]:
    """Compare the estimated memory of the plan with this machine's memory, and return warnings.
    ``verbose`` prints the estimate."""
    needs = estimate(config, checked.student, checked.teachers, placement.needed(config))
    if verbose:
        show("  estimated memory in GiB (processes x GiB per process):")
        show(*(f"    {need}" for need in needs))
    if not on_this_machine(config):
        return []
    warning = check_memory(needs, host_memory(), gpu_memory())
    return [warning] if warning else []
