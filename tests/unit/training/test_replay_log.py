"""Completions and scores that a start of a run keeps from earlier starts."""

from __future__ import annotations

import pytest

from seqkd.storage.run_directory import Resumption
from seqkd.training import replay_log


@pytest.mark.parametrize(
    ("resumption", "kept"),
    [
        (Resumption(exists=False), []),
        (Resumption(exists=True), ["heldout", "samples", "teacher"]),
        (Resumption(exists=True, trajectory=("learner.lr",)), ["heldout"]),
    ],
)
def test_only_samples_of_the_same_student_are_kept(tmp_path, resumption, kept):
    for name in ("samples", "teacher", "heldout"):
        (tmp_path / "replay_log" / name).mkdir(parents=True)
    replay_log.discard(tmp_path / "replay_log", resumption)
    assert sorted(path.name for path in tmp_path.glob("replay_log/*")) == kept
