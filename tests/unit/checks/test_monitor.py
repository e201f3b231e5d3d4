"""When a known text is scored, what is kept of a step that was skipped, what a fault takes back."""

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


def watch(tmp_path, every=1, caches=()):
    said = []
    steps = StepAlarms(Config.model_validate(MINIMAL), 1000)
    made = Monitor(Canary(), steps, every, said.append, tmp_path / "skipped", list(caches))
    made.rewind([], {})
    made.said = said
    return made


def rollout(name, logprobs=(-0.5, -1 / 3)):
    return Rollout("p", name, (1, 2), (3, 4), logprobs, "student", 0, "stop")


@pytest.mark.parametrize(
    ("every", "checked"), [(1, [3, 5, 7, 9]), (2, [3, 5, 7, 9]), (3, [3, 7]), (0, [])]
)
def test_the_known_text_is_scored_at_draws_whatever_their_steps(tmp_path, every, checked):
    made, found = watch(tmp_path, every), []
    for step in (3, 5, 7, 9):
        before = len(made.canary.calls)
        made.after_sampling(step, made.probe(step, 5))
        found += [step] * (len(made.canary.calls) - before)
    assert found == checked


def test_it_is_told_of_steps_that_must_have_moved_the_weights(tmp_path):
    made, part = watch(tmp_path), Part([rollout("a")], {}, Counts(1, 2), ())
    learnt = PartResult({"sequences": 1, "tokens": 2}, trained=("a",))
    made.after_sampling(0, made.probe(0, 5))
    made.after_step(0, [part], StepResult(1.0, 1.0, (learnt,)), lr=0.1)
    made.after_sampling(1, made.probe(1, 5))
    made.after_sampling(2, made.probe(2, 5))
    made.after_step(2, [part], StepResult(1.0, 0.0, (learnt,)), lr=0.1)
    made.after_sampling(3, made.probe(3, 5))
    assert made.canary.calls == [False, True, False, False]
    with pytest.raises(LearningFault, match="1 were not trained on"):
        made.after_step(3, [part], StepResult(1.0, 1.0, (PartResult(),)), lr=0.1)


def test_the_batch_of_a_skipped_step_is_kept(tmp_path):
    """Also where two completions share one tensor."""
    made, states = watch(tmp_path), torch.randn(2, 3)
    rollouts = [rollout("a"), rollout("b", None)]
    scores = {r.sample_id: TeacherScore(r.sample_id, hidden=states) for r in rollouts}
    part = Part(rollouts, scores, Counts(2, 4), ())
    made.after_step(7, [part], StepResult(float("nan"), 1.0, (PartResult(),), skipped=True), lr=0.1)
    folder = tmp_path / "skipped" / "step-00000007"
    lines = (folder / "rollouts.jsonl").read_text().splitlines()
    assert [rollout_from(json.loads(line)) for line in lines] == rollouts
    kept = load_file(folder / "scores.safetensors")
    assert torch.equal(kept["a hidden"], states) and torch.equal(kept["b hidden"], states)
    assert "step 7 was skipped" in made.said[0]
    made.after_sampling(8, made.probe(8, 5))
    assert made.canary.calls == [False]


def test_a_fault_takes_back_what_the_teachers_wrote_since_they_were_last_right(tmp_path):
    cache = TeacherCache(tmp_path / "cache", "float32")
    made = watch(tmp_path, caches=[cache])

    def score(address):
        cache.add_scores([(address, TeacherScore(address, logprobs=torch.tensor([-1.0])))])

    score("right")
    made.after_sampling(0, made.probe(0, 5))
    score("garbage")
    made.rollback()
    assert "right" in cache.scores and "garbage" not in cache.scores
    again = TeacherCache(tmp_path / "cache", "float32").scores
    assert "right" in again and "garbage" not in again


def test_a_rollout_is_the_same_after_json_and_arrow():
    for r in (rollout("a"), rollout("b", None)):
        assert rollout_from(json.loads(json.dumps(asdict(r)))) == r
        (row,) = pa.Table.from_pylist([asdict(r)]).to_pylist()
        assert rollout_from(row) == r


def test_what_another_process_added_is_not_taken_back(tmp_path):
    schema = pa.schema([("address", pa.string())])
    mine, other = ArrowStore(tmp_path, schema), ArrowStore(tmp_path, schema)
    mine.append([{"address": "mine"}])
    other.append([{"address": "other"}])
    mine.rollback()
    assert set(ArrowStore(tmp_path, schema).places) == {"other"}
