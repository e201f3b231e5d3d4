"""Checkpoints of a run: only its own, with a complete state."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from seqkd.config.lifecycle import CheckpointsConfig
from seqkd.errors import CheckpointError
from seqkd.storage import checkpoint_dir
from seqkd.training.checkpoint import Checkpoints, Progress


class Learner:
    policy_version, is_consistent = 0, True

    def save(self, directory):
        pass

    def restore(self, directory, policy_version):
        self.policy_version = policy_version


def checkpoints(directory, run="a"):
    """Return the checkpoints of a run without caches or a replay log."""
    positions = SimpleNamespace(
        restore=lambda position: None, current=dict, forget_before=lambda position: None
    )
    control = SimpleNamespace(saved=lambda: None)
    return Checkpoints(directory, run, CheckpointsConfig(), Learner(), positions, control)


def save(of_run, step):
    of_run.learner.policy_version = step
    assert of_run.save(Progress(step), {})


def test_a_checkpoint_of_another_run_is_not_restored(tmp_path):
    save(checkpoints(tmp_path), 3)
    save(checkpoints(tmp_path, run="b"), 7)
    restored = checkpoints(tmp_path).restore()
    assert restored.progress.step == 3
    (line,) = restored.skipped
    assert "step-00000007: belongs to another run. Remove it." in line
    with pytest.raises(CheckpointError, match=r"another run(.|\n)*no checkpoint is intact"):
        checkpoints(tmp_path, run="c").restore()


@pytest.mark.parametrize("key", ["run", "policy_version", "running", "measured", "baseline"])
def test_a_state_without_a_key_is_damaged(tmp_path, key):
    save(checkpoints(tmp_path), 3)
    save(checkpoints(tmp_path), 7)
    state = json.loads((tmp_path / "step-00000007" / "state.json").read_text())
    del state[key]
    checkpoint_dir.save(tmp_path, 7, lambda folder: None, state, keep_last=2)
    restored = checkpoints(tmp_path).restore()
    assert restored.progress.step == 3
    assert f"state.json is damaged: no {key!r}." in restored.skipped[0]
