"""What TensorBoard and accelerate's other trackers are given, and that none of them ends a run."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from types import SimpleNamespace
from typing import ClassVar, get_args

import numpy as np
import pytest
from accelerate import tracking
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, GeneralTracker
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from seqkd.config.base import TrackerName
from seqkd.config.run import Config
from seqkd.errors import ConfigError
from seqkd.evaluation.heldout import Measurement
from seqkd.training import trackers
from seqkd.training.clock import Clock
from seqkd.training.recorder import Recorder
from tests.conftest import ROOT
from tests.unit.config.test_config import MINIMAL
from tests.unit.training.test_recovery import CONFIG, World

ROW = {"phase": "main", "tokens": 4, "loss": 1.0, "length": 2.0}
COSTS = {"seconds": 1.0}


class Recording(GeneralTracker):
    """A tracker of accelerate that keeps what it is given."""

    name = "recording"
    requires_logging_directory = False
    made: ClassVar[list[Recording]] = []

    def __init__(self, project, **options):
        super().__init__()
        self.project, self.options, self.calls = project, options, []
        self.info = SimpleNamespace(run_id=f"given {len(self.made)}")
        self.made.append(self)

    @property
    def tracker(self):
        return self

    @tracking.on_main_process
    def start(self):
        self.calls.append("start")

    @tracking.on_main_process
    def store_init_configuration(self, values):
        self.configuration = values

    @tracking.on_main_process
    def log(self, values, step=None):
        self.calls.append((step, values))

    @tracking.on_main_process
    def finish(self):
        self.calls.append("finish")

    def of(self, key):
        """Steps and values of one metric."""
        return [(c[0], c[1][key]) for c in self.calls if isinstance(c, tuple) and key in c[1]]


class Failing(Recording):
    """Fails in the call that its name in the configuration stands for."""

    def log(self, values, step=None):
        raise ConnectionError("no\n  network")


class NeverStarting(Recording):
    def start(self):
        raise RuntimeError("not logged in")


@pytest.fixture
def registered(monkeypatch):
    """Puts classes into accelerate's table, under names that the schema knows."""

    def register(**classes):
        for name, of in classes.items():
            monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, of)

    monkeypatch.setattr(Recording, "made", [])
    return register


def config(*names, **changes):
    return Config.model_validate({**MINIMAL, "trackers": names, **changes})


def begun(directory, of, step=0):
    recorder = Recorder(directory, of, io.StringIO())
    recorder.rewind(step)
    recorder.begin("main", of)
    return recorder


def board(directory):
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    return {k: [(e.step, e.value) for e in events.Scalars(k)] for k in events.Tags()["scalars"]}


def test_accelerate_has_every_tracker_of_the_schema_and_none_needs_a_directory():
    for name in get_args(TrackerName):
        assert not LOGGER_TYPE_TO_CLASS[name].requires_logging_directory


def test_what_a_tracker_is_told_of_the_run(registered, tmp_path):
    registered(wandb=Recording)
    begun(tmp_path, config("wandb", "wandb", seed=7, learner={"betas": [0.8, 0.9]})).close()
    (made,) = Recording.made
    assert made.project == "seqkd" and made.options["name"] == "x"
    assert made.options["dir"] == str(tmp_path / "trackers")
    assert made.calls == ["start", "finish"]
    told = made.configuration
    assert told["seed"] == 7 and told["student.model"] == "a" and told["warmup"] is None
    assert told["learner.betas"] == "[0.8, 0.9]" and told["rollout.mask_truncated"] is False
    assert all(isinstance(v, str | int | float | None) for v in told.values())


def test_numbers_of_each_step_and_nothing_else_are_sent(registered, tmp_path):
    registered(wandb=Recording)
    recorder = begun(tmp_path, config("wandb"))
    extra = {"skipped": True, "grad_norm": float("nan"), "rate": float("inf"), "sequences": 3}
    for step in range(2):
        recorder.step(step, ROW | extra | {"loss": step + 0.5}, COSTS, Clock(), 1)
    recorder.close()
    (made,) = Recording.made
    assert made.of("loss") == [(0, 0.5), (1, 1.5)]
    assert made.of("skipped") == [(0, 1.0), (1, 1.0)]
    values = made.calls[1][1]
    assert {"phase", "grad_norm", "rate"}.isdisjoint(values)
    assert {type(v) for v in values.values()} == {float}
    assert {"time_step_s", "time_learn_s", "tokens_per_s", "sequences"} <= values.keys()
    assert made.calls[-1] == "finish"
    shown = board(tmp_path)
    assert shown.keys() == values.keys()
    assert shown["loss"] == [(0, 0.5), (1, 1.5)]


def test_held_out_figures_are_means_over_tokens_or_sequences(registered, tmp_path):
    registered(mlflow=Recording)
    sums = {
        "sequences": np.array([1.0, 1.0]),
        "student_tokens": np.array([2.0, 6.0]),
        "teacher_tokens": np.array([4.0, 4.0]),
        "student_ended": np.array([1.0, 0.0]),
        "teacher_ended": np.array([1.0, 1.0]),
        "nll": np.array([8.0, 12.0]),
        "reverse_kl": np.array([1.0, 1.0]),
    }
    recorder = begun(tmp_path, config("mlflow"))
    recorder.held_out(5, Measurement(sums, (), ()))
    recorder.close()
    expected = {
        "heldout/reverse_kl_per_token": 0.25,
        "heldout/reverse_kl_per_sequence": 1.0,
        "heldout/nll_per_token": 2.5,
        "heldout/student_length": 4.0,
        "heldout/teacher_length": 4.0,
        "heldout/student_eos_rate": 0.5,
        "heldout/teacher_eos_rate": 1.0,
    }
    assert Recording.made[0].calls[1] == (5, expected)
    assert board(tmp_path) == {name: [(5, value)] for name, value in expected.items()}


def test_of_a_whole_run_every_step_and_every_measurement_is_sent_once(registered, tmp_path):
    registered(wandb=Recording)
    world = World(tmp_path, config=CONFIG.model_copy(update={"trackers": ("wandb",)}))
    world.finish()
    (made,) = Recording.made
    assert [step for step, _ in made.of("loss")] == list(range(10))
    # Before the first step, after the warm-up's 3 and after 7 more.
    assert [step for step, _ in made.of("heldout/nll_per_token")] == [0, 3, 10]
    assert made.of("heldout/nll_per_token") == [
        (step, pytest.approx(value, rel=1e-6))
        for step, value in board(tmp_path)["heldout/nll_per_token"]
    ]


def test_a_resumed_run_goes_on_in_the_tracker(registered, tmp_path):
    registered(wandb=Recording, mlflow=Recording, trackio=Recording)
    names = config("wandb", "mlflow", "trackio")
    recorder = begun(tmp_path, names)
    recorder.step(0, ROW, COSTS, Clock(), 1)
    recorder.rewind(0)  # as after a lost learner
    assert len(Recording.made) == 3
    recorder.close()
    begun(tmp_path, names, step=1).close()
    begun(tmp_path / "..", names).close()
    wandb, mlflow, trackio = zip(
        Recording.made[:3], Recording.made[3:6], Recording.made[6:], strict=True
    )
    ids = [made.options["id"] for made in wandb]
    assert ids[0] == ids[1] != ids[2]
    assert {made.options["resume"] for made in wandb} == {"allow"}
    assert [made.options["run_id"] for made in mlflow] == [None, "given 1", None]
    assert [made.options["resume"] for made in trackio] == ["never", "allow", "never"]
    assert [made.options["config"]["student.model"] for made in trackio] == ["a"] * 3
    assert [hasattr(made, "configuration") for made in wandb] == [True, False, True]


def test_an_id_that_was_not_written_to_its_end_begins_anew(registered, tmp_path):
    registered(mlflow=Recording)
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers" / "mlflow.id").write_text("")
    begun(tmp_path, config("mlflow")).close()
    assert Recording.made[0].options["run_id"] is None
    assert (tmp_path / "trackers" / "mlflow.id").read_text() == "given 0"


def test_tensorboard_hides_what_is_taken_again(tmp_path, monkeypatch):
    # Files of one second are read in the order of this number, as text: 10 before 9.
    monkeypatch.setattr(event_file_writer, "_global_uid", event_file_writer.AtomicCounter(0))
    recorder = begun(tmp_path, config())
    for step in range(4):
        recorder.step(step, ROW | {"loss": 1.0}, COSTS, Clock(), 1)
    recorder.rewind(2)
    for step in range(2, 5):
        recorder.step(step, ROW | {"loss": 2.0}, COSTS, Clock(), 1)
    recorder.close()
    assert board(tmp_path)["loss"] == [(0, 1.0), (1, 1.0), (2, 2.0), (3, 2.0), (4, 2.0)]


@pytest.mark.parametrize(
    ("of", "reason"),
    [(Failing, "no network"), (NeverStarting, "not logged in")],
    ids=["while it runs", "at its start"],
)
def test_without_a_tracker_that_fails_the_run_goes_on(registered, tmp_path, of, reason):
    registered(wandb=of, trackio=Recording)
    recorder = begun(tmp_path, config("wandb", "trackio"))
    for step in range(3):
        recorder.step(step, ROW, COSTS, Clock(), 1)
    recorder.close()
    said = recorder.progress.file.getvalue()
    assert said.count(f"warning: wandb failed: {reason}. The run continues without wandb.") == 1
    assert said.count("warning") == 1
    assert Recording.made[-1].of("loss") == board(tmp_path)["loss"] == [(i, 1.0) for i in range(3)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_missing_package_is_said_before_anything_starts(monkeypatch, capsys, tmp_path):
    from seqkd.cli.main import main

    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ConfigError, match=r"trackers: the package 'mlflow' .* pip install mlflow,"):
        trackers.check(("mlflow",))
    trackers.check(())
    of = [str(ROOT / "configs/tiny.yaml"), "student.model=./nowhere", f"runs_dir={tmp_path}/runs"]
    arguments = [*of, "trackers=[wandb]"]
    assert main(["train", *arguments]) == 2
    assert "error: trackers: the package 'wandb' is not" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(["train", *arguments, "--dry-run"]) == 2
    assert "  error: trackers: the package 'wandb' is not" in capsys.readouterr().out
    monkeypatch.setattr(tracking, "_available_trackers", ["wandb"])
    trackers.check(("wandb",))


@pytest.mark.parametrize("name", get_args(TrackerName))
def test_accelerate_takes_the_options(name, tmp_path, monkeypatch):
    """Only the package of the tracker sees the options that accelerate passes on."""
    real = LOGGER_TYPE_TO_CLASS[name]

    class Stub(real):
        def start(self):
            self.run = self.active_run = SimpleNamespace(info=SimpleNamespace(run_id="given"))

        def store_init_configuration(self, values):
            pass

    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, Stub)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "unused")
    for _ in ("first", "resumed"):
        assert trackers._start(name, tmp_path, config()).name == name


def test_the_variables_of_a_launcher_are_not_asked(tmp_path):
    """Else accelerate would wait for the other processes that they speak of."""
    code = (
        "from seqkd.training.trackers import _ignore_launcher; _ignore_launcher(); "
        "import os; print(os.environ['WORLD_SIZE'])"
    )
    launched = {"WORLD_SIZE": "4", "RANK": "1", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1"}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | launched | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert (done.returncode, done.stdout) == (0, "4\n"), done.stderr


def test_of_a_start_that_failed_the_trackers_are_no_hindrance(tmp_path):
    from seqkd.storage import run_directory

    (tmp_path / "trackers").mkdir()
    run_directory.refuse_used(tmp_path)
