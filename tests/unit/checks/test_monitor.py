"""Schedule of the probe, saved batches of skipped steps, rollback of caches after a fault."""

from __future__ import annotations

import json
from dataclasses import asdict

import pyarrow as pa
import pytest
import torch
from safetensors.torch import load_file

from seqkd.checks.alarms import StepAlarms
from seqkd.checks.monitor import Monitor
from seqkd.config.run import Config
from seqkd.errors import LearningFault
from seqkd.protocols import Part
from seqkd.storage.arrow_store import ArrowStore
from seqkd.teachers.cache import TeacherCache
from seqkd.types import Counts, PartResult, Rollout, StepResult, TeacherScore, rollout_from
from tests.unit.config.test_config import MINIMAL


class Canary:
    def __init__(self):
        self.calls, self.held = [], 0

    def begin(self, first):
        pass

    def hold(self):
        self.held += 1

    def ask(self, version):
        return version

    def check(self, asked, moved):
        self.calls.append(moved)


def watch(tmp_path, interval=1, caches=()):
    lines = []
    steps = StepAlarms(Config.model_validate(MINIMAL), 1000)
    monitor = Monitor(Canary(), steps, interval, lines.append, tmp_path / "skipped", list(caches))
    monitor.rewind([], {})
    monitor.lines = lines
    return monitor


def rollout(name, logprobs=(-0.5, -1 / 3)):
    return Rollout("p", name, (1, 2), (3, 4), logprobs, "student", 0, "stop")


@pytest.mark.parametrize(
    ("interval", "expected"), [(1, [3, 5, 7, 9]), (2, [3, 5, 7, 9]), (3, [3, 7]), (0, [])]
)
def test_the_probe_is_scored_at_the_first_draw_after_the_interval(tmp_path, interval, expected):
    monitor, checked = watch(tmp_path, interval), []
    for step in (3, 5, 7, 9):
        before = len(monitor.canary.calls)
        monitor.after_sampling(step, monitor.probe(step, 5))
        checked += [step] * (len(monitor.canary.calls) - before)
    assert checked == expected


def test_the_canary_receives_whether_steps_must_have_changed_the_weights(tmp_path):
    monitor, part = watch(tmp_path), Part([rollout("a")], {}, Counts(1, 2), ())
    result = PartResult({"sequences": 1, "tokens": 2}, trained=("a",))
    monitor.after_sampling(0, monitor.probe(0, 5))
    monitor.after_step(0, [part], StepResult(1.0, 1.0, (result,)), lr=0.1)
    monitor.after_sampling(1, monitor.probe(1, 5))
    monitor.after_sampling(2, monitor.probe(2, 5))
    monitor.after_step(2, [part], StepResult(1.0, 0.0, (result,)), lr=0.1)
    monitor.after_sampling(3, monitor.probe(3, 5))
    assert monitor.canary.calls == [False, True, False, False]
    with pytest.raises(LearningFault, match="1 of 1 completions were not trained on"):
        monitor.after_step(3, [part], StepResult(1.0, 1.0, (PartResult(),)), lr=0.1)


def test_the_batch_of_a_skipped_step_is_kept(tmp_path):
    """Two completions may share one tensor."""
    monitor, states = watch(tmp_path), torch.randn(2, 3)
    rollouts = [rollout("a"), rollout("b", None)]
    scores = {r.sample_id: TeacherScore(r.sample_id, hidden=states) for r in rollouts}
    part = Part(rollouts, scores, Counts(2, 4), ())
    monitor.after_step(
        7, [part], StepResult(float("nan"), 1.0, (PartResult(),), skipped=True), lr=0.1
    )
    folder = tmp_path / "skipped" / "step-00000007"
    lines = (folder / "rollouts.jsonl").read_text().splitlines()
    assert [rollout_from(json.loads(line)) for line in lines] == rollouts
    kept = load_file(folder / "scores.safetensors")
    assert torch.equal(kept["a hidden"], states) and torch.equal(kept["b hidden"], states)
    assert "step 7 was skipped" in monitor.lines[0]
    monitor.after_sampling(8, monitor.probe(8, 5))
    assert monitor.canary.calls == [False]


def test_a_fault_rolls_back_cache_entries_since_the_last_good_probe(tmp_path):
    cache = TeacherCache(tmp_path / "cache", "float32")
    monitor = watch(tmp_path, caches=[cache])

    def score(address):
        cache.add_scores([(address, TeacherScore(address, logprobs=torch.tensor([-1.0])))])

    score("right")
    monitor.after_sampling(0, monitor.probe(0, 5))
    score("garbage")
    monitor.rollback()
    assert "right" in cache.scores and "garbage" not in cache.scores
    again = TeacherCache(tmp_path / "cache", "float32").scores
    assert "right" in again and "garbage" not in again


def test_a_rollout_survives_json_and_arrow():
    for r in (rollout("a"), rollout("b", None)):
        assert rollout_from(json.loads(json.dumps(asdict(r)))) == r
        (row,) = pa.Table.from_pylist([asdict(r)]).to_pylist()
        assert rollout_from(row) == r


def test_a_rollback_keeps_entries_of_other_processes(tmp_path):
    schema = pa.schema([("address", pa.string())])
    mine, other = ArrowStore(tmp_path, schema), ArrowStore(tmp_path, schema)
    mine.append([{"address": "mine"}])
    other.append([{"address": "other"}])
    mine.rollback()
    assert set(ArrowStore(tmp_path, schema).places) == {"other"}
