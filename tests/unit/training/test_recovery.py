"""Recovery of the training loop with fake actors. After a loss at any moment, a run has the same
result as an undisturbed run, and entries of the replay log are not requested again."""

from __future__ import annotations

import io
import json
import math
import random
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import xxhash

from seqkd.config.run import Config
from seqkd.errors import (
    ActorError,
    CheckpointError,
    LearnerLost,
    LearningFault,
    Stopped,
    StorageError,
)
from seqkd.storage.run_directory import Resumption
from seqkd.teachers.cache import TeacherCache
from seqkd.training import loop, recovery, replay_log, setup
from seqkd.training.checkpoint import Progress
from seqkd.training.control import Control
from seqkd.training.recorder import Recorder
from seqkd.types import PartResult, Prompt, Rollout, StepResult, TeacherScore, WeightVersion
from seqkd.workers import Workers
from tests.unit.config.test_config import MINIMAL

PROMPTS = [Prompt(f"p{i}", (i + 1, 9), f"prompt {i}") for i in range(60)]
HELDOUT = [Prompt("h", (77, 9), "held out")]
V = 1000


def unit(*values):
    """Return a number in (0, 1) that depends on ``values``."""
    return (xxhash.xxh3_64_intdigest(repr(values).encode()) + 1) / 2**64


class Crash(Exception):
    """Stand-in for a SIGKILL of the driver, caught by no code."""


class Lives:
    """Counter of calls that raises an error at a given call."""

    def __init__(self, at=None, error=None):
        self.calls, self.at, self.error = [], at, error

    def __call__(self, name):
        self.calls.append(name)
        if len(self.calls) - 1 == self.at:
            raise self.error


class Learner:
    """Learner whose weights are one number, which depends on all samples and scores."""

    def __init__(self, lives):
        self.lives, self.is_consistent, self.policy_version, self.weights = lives, True, 0, 0.5

    def step(self, parts, lr):
        self.is_consistent = False
        self.lives("step")
        results = []
        for part in parts:
            ids = [r.sample_id for r in part.rollouts]
            texts = [(r.sample_id, r.completion_ids, r.rollout_logprobs) for r in part.rollouts]
            scores = [part.scores[i].logprobs.tolist() for i in ids] if part.scores else []
            counts = (part.counts.rate, part.counts.length)
            self.weights = unit(self.weights, texts, scores, counts, lr)
            sums = {"tokens": part.counts.tokens, "sequences": part.counts.sequences,
                    "student_logprob": -1.0, "weight": 1.0, "weight_squared": 1.0}  # fmt: skip
            costs = torch.tensor([self.weights, 1.0])
            results.append(
                PartResult(sums, costs=costs, survival=torch.ones(2), trained=tuple(ids))
            )
        self.policy_version, self.is_consistent = self.policy_version + 1, True
        return StepResult(self.weights, self.weights, tuple(results))

    def measure(self, rollouts, scores, ends=()):
        self.lives("measure")
        return {
            r.sample_id: {
                "student_logprob": [-unit(self.weights, r.completion_ids)] * len(r.completion_ids),
                "teacher_logprob": [-unit("teacher", r.completion_ids)] * len(r.completion_ids),
            }
            for r in rollouts
        }

    def publish(self):
        self.lives("publish")
        return WeightVersion(self.policy_version, repr(self.weights), "", {})

    def save(self, directory):
        self.lives("save")
        (Path(directory) / "weights").write_text(repr(self.weights))

    def restore(self, directory, policy_version):
        self.weights = float((Path(directory) / "weights").read_text())
        self.policy_version = policy_version

    def export(self, directory):
        self.lives("export")
        Path(directory).write_text(repr(self.weights))

    def restart(self):
        self.__init__(self.lives)


class Sampler:
    texts = 1e6
    """Number of different completions."""

    def __init__(self, lives, asked, source):
        self.lives, self.asked, self.source = lives, asked, source
        self.policy_version, self.weights, self.requests = 0, 0.5, 0

    def load(self, version):
        self.lives("load")
        self.policy_version, self.weights = version.policy_version, float(version.path)

    def mark_stale(self):
        self.policy_version = None

    def logprobs(self, token_ids):
        ids = tuple(token_ids[2:])
        return [[0.0] * (len(token_ids) - 1 - len(ids)) + [-unit(self.weights, ids)] * len(ids)]

    def sample(self, prompts, samples, seed, temperature=1.0, top_p=1.0, finished=None):
        self.lives("sample")
        self.requests += 1
        self.asked.update((self.source, p.prompt_id, seed, self.weights) for p in prompts)
        places = [(place, i) for place, n in enumerate(samples) for i in range(n)]
        drawn = [
            Rollout(p.prompt_id, f"{p.prompt_id}/{self.source}/{seed}/{i}", p.token_ids,
                    (int(self.texts * unit(self.weights, p.prompt_id, seed, i)), 7),
                    (math.log(unit(self.weights, i)), -1.0), self.source, self.policy_version,
                    "length")
            for place, i in places
            for p in [prompts[place]]
        ]  # fmt: skip
        arrived = [(i, rollout) for (i, _), rollout in zip(places, drawn, strict=True)]
        random.shuffle(arrived)  # the order is a matter of chance
        for place, rollout in arrived if finished else []:
            finished(place, rollout)
        return drawn

    def usage(self):
        return {"requests": self.requests} if self.requests else {}


class Teacher:
    """Teacher whose scores depend on all sequences of a request, as the last bits of real scores
    do."""

    def __init__(self, lives, asked):
        self.lives, self.asked = lives, asked

    def score(self, rollouts):
        self.lives("score")
        scored = [r for r in rollouts if "canary" not in r.sample_id]
        self.asked.update(("score", r.sample_id) for r in scored)
        batch = 1e-3 * unit([(r.prompt_ids, r.completion_ids) for r in scored])
        return {
            r.sample_id: TeacherScore(
                r.sample_id,
                logprobs=torch.tensor(
                    [-batch - unit("teacher", r.completion_ids)] * len(r.completion_ids)
                ),
            )
            for r in rollouts
        }

    def usage(self):
        return {}


CONFIG = Config.model_validate(
    {
        **MINIMAL,
        "teacher": {"kind": "hf", "model": "b", "scores": "logprobs"},
        "objective": {"kind": "sequence_reverse_kl", "estimator": "reward_to_go",
                      "normalization": "rate"},
        "rollout": {"samples_per_prompt": 2},
        "warmup": {"sampler": "teacher", "steps": 3, "prompts_per_step": 2},
        "extra_terms": [{"sampler": "teacher", "unit": "token"}],
        "prompts_per_step": 3,
        "updates_per_rollout": 2,
        "steps": 7,
        "checkpoints": {"every_steps": 3, "keep_last": 2},
        "recovery": {"backoff_s": 0, "restarts": 1},
        "evaluation": {"prompts": 1},
    }
)  # fmt: skip


class Tokenizer:
    def __call__(self, text, add_special_tokens):
        return SimpleNamespace(input_ids=list(range(100, 150)))

    def decode(self, ids, skip_special_tokens=False):
        return " ".join(map(str, ids))


def checked(train=PROMPTS):
    return SimpleNamespace(
        train=train, heldout=HELDOUT, references={}, decode=str, corpus=[],
        tokenizer=Tokenizer(), vocabulary=V, max_model_len=512, stop_ids=(0,),
    )  # fmt: skip


class World:
    """All objects of a run that are not on disk."""

    def __init__(self, directory, at=None, error=None, config=CONFIG, train=PROMPTS):
        self.lives, self.asked = Lives(at, error), Counter()
        learner = Learner(self.lives)
        workers = Workers(
            student=Sampler(self.lives, self.asked, "student"),
            learner=learner,
            teachers={"": Teacher(self.lives, self.asked)},
            teacher_samplers={"": Sampler(self.lives, self.asked, "teacher")},
            teacher_of=config.teacher.choose,
            distribution=False,
        )
        self.out, directory = io.StringIO(), Path(directory)
        self.recorder = Recorder(directory, config, self.out)
        self.control = Control(config.recovery, self.recorder.note)
        caches = {}
        if config.teacher_cache:
            caches[""] = TeacherCache(directory / config.teacher_cache.path, "float32")
        roles = {"rollout", "teacher", "learner"}
        self.run = setup.prepare(
            directory, config, checked(train), workers, roles, caches, self.recorder, self.control
        )

    def finish(self):
        try:
            return recovery.finish(self.run)
        finally:
            self.recorder.close()


def left(directory):
    """Return the output of a run: metrics without times, and the student."""
    rows = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        for key in [
            k
            for k in row
            if k.startswith("time_")
            or k.endswith(("reused", "reused_scores", "requests"))
            or k == "tokens_per_s"
        ]:
            del row[key]
    return rows, (directory / "student").read_text()


@pytest.fixture(scope="module")
def quiet(tmp_path_factory):
    """Undisturbed run: its output, measurements, calls and requests."""
    directory = tmp_path_factory.mktemp("quiet")
    world = World(directory)
    measured = world.finish()
    rows, student = left(directory)
    assert [row["step"] for row in rows] == list(range(10))
    assert max(world.asked.values()) == 1
    return SimpleNamespace(left=(rows, student), measured=measured, world=world)


def test_a_run_whose_driver_is_killed_at_any_call_resumes_to_the_same(quiet, tmp_path):
    for at, call in enumerate(quiet.world.lives.calls):
        directory = tmp_path / str(at)
        directory.mkdir()
        first = World.__new__(World)
        with pytest.raises(Crash):
            World.__init__(first, directory, at, Crash())
            first.finish()
        second = World(directory)
        measured = second.finish()
        assert left(directory) == quiet.left, (at, call)
        for stage, measurement in quiet.measured.items():
            for name, values in measurement.sums.items():
                assert (measured[stage].sums[name] == values).all(), (at, call, stage, name)
        # Results of the interrupted call and the student's held-out samples are not logged.
        twice = {what for what in first.asked if second.asked[what] and "h" not in str(what[1])}
        assert call in ("sample", "score") or not twice, (at, call, twice)


SCORED = {"objective": {"kind": "token_reverse_kl"}}
HIDDEN = {"teacher": {"kind": "hf", "model": "b"}}
REPEATED = {
    "student": {},
    "teacher": {"sampler": "teacher", **SCORED, **HIDDEN},
    "endpoint": {
        "sampler": "teacher",
        "objective": {"kind": "sequence_forward_kl"},
        "teacher": {"kind": "openai", "model": "m", "base_url": "http://127.0.0.1/v1"},
    },
    "dataset": {"sampler": "dataset", **SCORED, **HIDDEN},
    "mixture": {"sampler": "mixture"},
    "several samplers": {"extra_terms": [{"sampler": "teacher", **SCORED}], **HIDDEN},
    "split": {
        "placement": "split",
        "data": {**MINIMAL["data"], "max_prompt_tokens": 8},
        "teacher": {"kind": "hf", "model": "b", "scores": "logprobs", "batch_tokens": 32},
    },
}


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("changes", REPEATED.values(), ids=REPEATED)
def test_a_run_with_repeated_prompts_is_exact_after_a_kill_at_any_call(
    tmp_path, monkeypatch, changes, cached
):
    """Prompts and completions recur within the reach of the replay log, so that its entries from
    other steps could take the place of a step's own scores."""
    monkeypatch.setattr(Sampler, "texts", 2)
    config = Config.model_validate(
        {
            **MINIMAL, "steps": 6, "prompts_per_step": 2,
            "teacher": {"kind": "hf", "model": "b", "scores": "logprobs"},
            "objective": {"estimator": "reward_to_go", "normalization": "rate"},
            "evaluation": {"prompts": 1},
            "rollout": {"samples_per_prompt": 2, "max_tokens": 8},
            "checkpoints": {"every_steps": 2, "keep_last": 2}, "recovery": {"backoff_s": 0},
            "teacher_cache": {"path": "cache"} if cached else None,
        } | changes
    )  # fmt: skip
    few = [replace(p, reference_ids=(p.token_ids[0], 5)) for p in PROMPTS[:4]]
    undisturbed = World(tmp_path, config=config, train=few)
    undisturbed.finish()
    expected = left(tmp_path)
    assert len(expected[0]) == 6
    for at, call in enumerate(undisturbed.lives.calls):
        if call == "measure":  # leaves the same files as the call before it
            continue
        directory = tmp_path / str(at)
        directory.mkdir()
        with pytest.raises(Crash):
            World(directory, at, Crash(), config, few).finish()
        World(directory, config=config, train=few).finish()
        assert left(directory) == expected, (at, call)


def test_a_learner_lost_at_any_call_is_restored_within_the_run(quiet, tmp_path):
    for at, call in enumerate(quiet.world.lives.calls):
        if call not in ("step", "measure", "publish", "save", "export"):
            continue
        directory = tmp_path / str(at)
        directory.mkdir()
        world = World(directory, at, LearnerLost(ActorError("learner died"), gone=True))
        world.finish()
        assert left(directory) == quiet.left, (at, call)
        assert "learner died Restarting the learner in 0 s" in world.out.getvalue()
        twice = {what for what, n in world.asked.items() if n > 1 and "h" not in str(what[1])}
        assert not twice, (at, call)


def test_a_phase_ends_with_a_checkpoint_and_can_be_extended(quiet, tmp_path):
    """This holds even if its number of steps is not a multiple of updates_per_rollout."""
    World(tmp_path).finish()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names[-1] == f"step-{len(quiet.left[0]):08d}"
    longer = CONFIG.model_copy(update={"steps": CONFIG.steps + 2})
    second = World(tmp_path, config=longer)
    second.finish()
    assert f"resuming after step {len(quiet.left[0])}" in second.out.getvalue()
    assert [row["step"] for row in left(tmp_path)[0]] == list(range(len(quiet.left[0]) + 2))
    drawn = [what[1] for what in second.asked if what[0] == "student" and what[1] != "h"]
    first = [what[1] for what in quiet.world.asked if what[0] in ("student", "teacher")]
    assert drawn and not set(drawn) & set(first), "the data continues after the first run's"


def test_a_signal_stops_the_run_at_the_next_draw(quiet, tmp_path):
    """The fakes never check for signals, like a learner in the middle of a step."""
    world = World(tmp_path)
    step = world.run.workers.learner.step

    def stopping(parts, lr):
        world.control.signal = signal.SIGTERM
        return step(parts, lr)

    world.run.workers.learner.step = stopping
    with pytest.raises(Stopped, match="SIGTERM"):
        world.finish()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000001"]
    World(tmp_path).finish()
    assert left(tmp_path) == quiet.left


def test_a_broken_learner_is_not_saved(tmp_path):
    world = World(tmp_path)
    world.run.workers.learner.measure = lambda rollouts, scores: {
        r.sample_id: {n: [math.nan] * len(r.completion_ids) for n in
                      ("student_logprob", "teacher_logprob")}
        for r in rollouts
    }  # fmt: skip
    world.run.monitor.interval = 0
    world.run.workers.learner.policy_version = 3
    with pytest.raises(LearningFault, match="the learner returned non-finite log-probs"):
        loop.save(world.run, Progress(step=3))
    assert not (tmp_path / "checkpoints").exists()


def test_a_run_with_only_damaged_checkpoints_does_not_start_over(tmp_path):
    World(tmp_path).finish()
    rows = (tmp_path / "metrics.jsonl").read_text()
    for state in tmp_path.glob("checkpoints/*/state.json"):
        state.write_text("{}")
    with pytest.raises(CheckpointError, match="no checkpoint is intact"):
        World(tmp_path).finish()
    assert (tmp_path / "metrics.jsonl").read_text() == rows


def test_a_stopped_run_is_saved_and_resumes_from_there(quiet, tmp_path):
    calls = quiet.world.lives.calls
    at = [i for i, name in enumerate(calls) if name == "sample"][-4]
    world = World(tmp_path, at, Stopped(signal.SIGTERM))
    with pytest.raises(Stopped):
        world.finish()
    steps = sum(name == "step" for name in calls[:at])
    assert (tmp_path / "checkpoints" / f"step-{steps:08d}").is_dir()
    second = World(tmp_path)
    second.finish()
    assert f"resuming after step {steps}" in second.out.getvalue()
    assert left(tmp_path) == quiet.left


def test_a_stop_in_the_middle_of_a_draw_resumes_from_the_replay_log(quiet, tmp_path):
    """No checkpoint is written in the middle of a draw."""
    calls = quiet.world.lives.calls
    last = [i for i, name in enumerate(calls) if name == "step"][6]  # second step of its draw
    world = World(tmp_path, last, Stopped(signal.SIGTERM))
    with pytest.raises(Stopped):
        world.finish()
    assert "the last checkpoint is at step" in world.out.getvalue()
    World(tmp_path).finish()
    assert left(tmp_path) == quiet.left


def test_an_exhausted_restart_budget_reports_the_first_cause(tmp_path):
    world = World(tmp_path, 30, LearnerLost(ActorError("first"), gone=True))
    world.control.recovery = CONFIG.recovery.model_copy(update={"restarts": 0})
    with pytest.raises(ActorError, match="first This was the first of 1 losses"):
        world.finish()


def test_an_error_that_a_new_learner_repeats_is_not_retried_forever(tmp_path):
    world = World(tmp_path)
    world.run.workers.learner.step = lambda parts, lr: (_ for _ in ()).throw(
        LearnerLost(ActorError("learner step failed: TypeError: no"), gone=False)
    )
    world.run.workers.learner.restart = lambda: None
    with pytest.raises(ActorError, match=r"^learner step failed: TypeError: no$"):
        world.finish()


def test_after_a_fault_neither_student_nor_samples_are_kept(tmp_path):
    world = World(tmp_path, 40, LearningFault("garbage"))
    with pytest.raises(LearningFault):
        world.finish()
    assert not list((tmp_path / "replay_log" / "samples").glob("*.arrow"))
    second = World(tmp_path)
    second.finish()
    assert left(tmp_path)[0][-1]["step"] == 9


def test_a_changed_student_does_not_train_on_old_samples(quiet, tmp_path):
    """After a change of the learning rate, the steps since the checkpoint are sampled again."""
    calls = quiet.world.lives.calls
    last = [i for i, name in enumerate(calls) if name == "step"][-1]
    with pytest.raises(Crash):
        World(tmp_path, last, Crash()).finish()
    changed = CONFIG.model_copy(update={"learner": CONFIG.learner.model_copy(update={"lr": 0.5})})
    replay_log.discard(tmp_path / "replay_log", Resumption(exists=True, trajectory=("learner.lr",)))
    second = World(tmp_path, config=changed)
    second.finish()
    assert any(what[0] == "student" and what[1] != "h" for what in second.asked)
    assert left(tmp_path)[1] != quiet.left[1]


def test_the_replay_log_stays_bounded(quiet, tmp_path):
    world = World(tmp_path)
    world.finish()
    shards = world.run.positions.log.samples
    oldest = CONFIG.steps + 3 - 2 * CONFIG.checkpoints.every_steps
    kept = {seed for row in _rows(shards) for seed in [int(row["sample_id"].as_py().split("/")[2])]}
    assert kept and min(kept) - 1_000_003 >= oldest - 2


def _rows(shards):
    for address, places in shards.places.items():
        yield from shards.rows(address, 0, len(places))


def test_samples_of_a_damaged_log_file_are_drawn_again(quiet, tmp_path):
    last = [i for i, name in enumerate(quiet.world.lives.calls) if name == "step"][-1]
    with pytest.raises(Crash):
        World(tmp_path, last, Crash()).finish()
    file = sorted((tmp_path / "replay_log" / "samples").glob("*.arrow"))[-1]
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    second = World(tmp_path)
    second.finish()
    assert f"warning: {file.name}" in second.out.getvalue()
    assert left(tmp_path) == quiet.left


def test_a_full_disk_loses_no_step(quiet, tmp_path, monkeypatch):
    world = World(tmp_path)
    write = world.recorder.step

    def full(step, row, *rest):
        if step == 5:
            raise StorageError("metrics.jsonl: cannot be written: No space left on device.")
        write(step, row, *rest)

    monkeypatch.setattr(world.recorder, "step", full)
    with pytest.raises(StorageError, match="No space left"):
        world.finish()
    World(tmp_path).finish()
    assert left(tmp_path) == quiet.left


def test_scores_beyond_the_size_limit_of_the_log_are_requested_again(quiet, tmp_path):
    last = [i for i, name in enumerate(quiet.world.lives.calls) if name == "step"][-1]
    none = CONFIG.model_copy(
        update={"checkpoints": CONFIG.checkpoints.model_copy(update={"replay_log_gib": 0.0})}
    )
    with pytest.raises(Crash):
        World(tmp_path, last, Crash(), none).finish()
    second = World(tmp_path, config=none)
    second.finish()
    assert any(what[0] == "score" for what in second.asked)
    assert left(tmp_path) == quiet.left
