"""A run that waits for its turn before each step (see scripts.benchmarks.turns):
python -m scripts.benchmarks.ours DIRECTORY CONFIG [key=value ...]"""

from __future__ import annotations

import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

from actors import build, placement
from scripts.benchmarks.turns import wait_for_turn
from seqkd.checks import preflight
from seqkd.config import run as configuration
from seqkd.evaluation.heldout import Measurement
from seqkd.models.export import materialize_student
from seqkd.training import recovery, setup
from seqkd.training.control import Control
from seqkd.training.recorder import Recorder


class Turn:
    """In place of the evaluation, which comes between steps, when no draw is under way."""

    def measure(self) -> Measurement:
        """Nothing; but the next step does not begin before its turn."""
        wait_for_turn()
        return Measurement({}, (), ())


def main(directory: Path, file: str, overrides: list[str]) -> None:
    """The run's records are left in ``directory``."""
    config = configuration.load(file, [*overrides, "evaluation.every_steps=1"])
    checked = preflight.check(config)
    student = materialize_student(config.student, config.learner.precision, directory / "student")
    roles, control = placement.needed(config), Control()
    evaluation: Any = Turn()
    with (
        build.connect(config, verbose=False),
        closing(Recorder(directory, config, sys.stderr)) as recorder,
        build.workers(config, student, checked, roles, control) as workers,
    ):
        run = setup.prepare(directory, config, checked, workers, roles, {}, recorder, control)
        recovery.finish(replace(run, evaluation=evaluation, publish=lambda measured: None))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
