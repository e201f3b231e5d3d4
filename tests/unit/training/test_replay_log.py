"""What a start of a run keeps of the completions and scores of earlier starts."""

from __future__ import annotations

import pytest

from seqkd.storage.run_directory import Resumption
from seqkd.training import replay_log


@pytest.mark.parametrize(
    ("resumption", "kept"),
    [
        (Resumption(found=False), []),
        (Resumption(found=True), ["heldout", "samples", "teacher"]),
        (Resumption(found=True, course=("learner.lr",)), ["heldout"]),
    ],
)
def test_only_samples_of_the_same_student_are_kept(tmp_path, resumption, kept):
    for name in ("samples", "teacher", "heldout"):
        (tmp_path / "journal" / name).mkdir(parents=True)
    replay_log.discard(tmp_path / "journal", resumption)
    assert sorted(path.name for path in tmp_path.glob("journal/*")) == kept
