"""Values sent to TensorBoard and accelerate's other trackers, and their failures."""

from __future__ import annotations

import io
import json
import os
import re
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
from tests.hostile import TEXTS
from tests.unit.config.test_config import MINIMAL
from tests.unit.training.test_recovery import CONFIG, World

ROW = {"phase": "main", "tokens": 4, "loss": 1.0, "length": 2.0}
COSTS = {"seconds": 1.0}


class Recording(GeneralTracker):
    """Tracker of accelerate that records all calls."""

    name = "recording"
    requires_logging_directory = False
    instances: ClassVar[list[Recording]] = []

    def __init__(self, project, **options):
        super().__init__()
        self.project, self.options, self.calls = project, options, []
        self.info = SimpleNamespace(run_id=f"given {len(self.instances)}")
        self.instances.append(self)

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

    def values(self, key):
        """Return steps and values of one metric."""
        return [(c[0], c[1][key]) for c in self.calls if isinstance(c, tuple) and key in c[1]]


class Failing(Recording):
    """Tracker that fails when values are sent."""

    def log(self, values, step=None):
        raise ConnectionError("no\n  network")


class NeverStarting(Recording):
    def start(self):
        raise RuntimeError("not logged in")


@pytest.fixture
def registered(monkeypatch):
    """Function that puts classes into accelerate's table, under names that the schema allows."""

    def register(**classes):
        for name, cls in classes.items():
            monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, name, cls)

    monkeypatch.setattr(Recording, "instances", [])
    return register


def config(*names, **changes):
    return Config.model_validate({**MINIMAL, "trackers": names, **changes})


def begun(directory, run, step=0):
    recorder = Recorder(directory, run, io.StringIO())
    recorder.rewind(step)
    recorder.begin("main", run)
    return recorder


def board(directory):
    events = EventAccumulator(str(directory / "tensorboard")).Reload()
    return {k: [(e.step, e.value) for e in events.Scalars(k)] for k in events.Tags()["scalars"]}


def test_accelerate_has_all_trackers_of_the_schema_and_none_needs_a_directory():
    for name in get_args(TrackerName):
        assert not LOGGER_TYPE_TO_CLASS[name].requires_logging_directory


def test_tensorboard_and_metrics_have_only_numbers(tmp_path):
    """Neither TensorBoard, which renders text as Markdown, nor the names of metrics contain text of
    the configuration."""
    text = " ".join(TEXTS.values())
    recorder = begun(tmp_path, config(data={"path": text, "heldout_path": text}))
    recorder.step(0, ROW, COSTS, Clock(), 1)
    recorder.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    used = {kind for kind, names in events.Tags().items() if names} - {"graph", "meta_graph"}
    assert used == {"scalars"}
    names = {*events.Tags()["scalars"], *json.loads((tmp_path / "metrics.jsonl").read_text())}
    assert all(re.fullmatch(r"[a-z0-9_/]+", name) for name in names), names


def test_a_tracker_receives_the_configuration(registered, tmp_path):
    registered(wandb=Recording)
    begun(tmp_path, config("wandb", "wandb", seed=7, learner={"betas": [0.8, 0.9]})).close()
    (recording,) = Recording.instances
    assert recording.project == "seqkd" and recording.options["name"] == "x"
    assert recording.options["dir"] == str(tmp_path / "trackers")
    assert recording.calls == ["start", "finish"]
    values = recording.configuration
    assert values["seed"] == 7 and values["student.model"] == "a" and values["warmup"] is None
    assert values["learner.betas"] == "[0.8, 0.9]" and values["rollout.mask_truncated"] is False
    assert all(isinstance(v, str | int | float | None) for v in values.values())


def test_only_finite_numbers_of_each_step_are_sent(registered, tmp_path):
    registered(wandb=Recording)
    recorder = begun(tmp_path, config("wandb"))
    extra = {"skipped": True, "grad_norm": float("nan"), "rate": float("inf"), "sequences": 3}
    for step in range(2):
        recorder.step(step, ROW | extra | {"loss": step + 0.5}, COSTS, Clock(), 1)
    recorder.close()
    (recording,) = Recording.instances
    assert recording.values("loss") == [(0, 0.5), (1, 1.5)]
    assert recording.values("skipped") == [(0, 1.0), (1, 1.0)]
    values = recording.calls[1][1]
    assert {"phase", "grad_norm", "rate"}.isdisjoint(values)
    assert {type(v) for v in values.values()} == {float}
    assert {"time_step_s", "time_learn_s", "tokens_per_s", "sequences"} <= values.keys()
    assert recording.calls[-1] == "finish"
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
    assert Recording.instances[0].calls[1] == (5, expected)
    assert board(tmp_path) == {name: [(5, value)] for name, value in expected.items()}


def test_all_steps_and_measurements_of_a_run_are_sent_once(registered, tmp_path):
    registered(wandb=Recording)
    world = World(tmp_path, config=CONFIG.model_copy(update={"trackers": ("wandb",)}))
    world.finish()
    (recording,) = Recording.instances
    assert [step for step, _ in recording.values("loss")] == list(range(10))
    # Before the first step, after the warm-up's 3 and after 7 more.
    assert [step for step, _ in recording.values("heldout/nll_per_token")] == [0, 3, 10]
    assert recording.values("heldout/nll_per_token") == [
        (step, pytest.approx(value, rel=1e-6))
        for step, value in board(tmp_path)["heldout/nll_per_token"]
    ]


def test_a_resumed_run_continues_in_the_tracker(registered, tmp_path):
    registered(wandb=Recording, mlflow=Recording, trackio=Recording)
    names = config("wandb", "mlflow", "trackio")
    recorder = begun(tmp_path, names)
    recorder.step(0, ROW, COSTS, Clock(), 1)
    recorder.rewind(0)  # like after a lost learner
    assert len(Recording.instances) == 3
    recorder.close()
    begun(tmp_path, names, step=1).close()
    begun(tmp_path / "..", names).close()
    wandb, mlflow, trackio = zip(
        Recording.instances[:3], Recording.instances[3:6], Recording.instances[6:], strict=True
    )
    ids = [recording.options["id"] for recording in wandb]
    assert ids[0] == ids[1] != ids[2]
    assert {recording.options["resume"] for recording in wandb} == {"allow"}
    assert [recording.options["run_id"] for recording in mlflow] == [None, "given 1", None]
    assert [recording.options["resume"] for recording in trackio] == ["never", "allow", "never"]
    assert [recording.options["config"]["student.model"] for recording in trackio] == ["a"] * 3
    assert [hasattr(recording, "configuration") for recording in wandb] == [True, False, True]


def test_an_incomplete_id_file_starts_a_new_run(registered, tmp_path):
    registered(mlflow=Recording)
    (tmp_path / "trackers").mkdir()
    (tmp_path / "trackers" / "mlflow.id").write_text("")
    begun(tmp_path, config("mlflow")).close()
    assert Recording.instances[0].options["run_id"] is None
    assert (tmp_path / "trackers" / "mlflow.id").read_text() == "given 0"


def test_tensorboard_hides_repeated_steps(tmp_path, monkeypatch):
    # Files of the same second are read in the order of this number as text: 10 before 9.
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
    ("cls", "reason"),
    [(Failing, "no network"), (NeverStarting, "not logged in")],
    ids=["while it runs", "at its start"],
)
def test_a_failing_tracker_does_not_stop_the_run(registered, tmp_path, cls, reason):
    registered(wandb=cls, trackio=Recording)
    recorder = begun(tmp_path, config("wandb", "trackio"))
    for step in range(3):
        recorder.step(step, ROW, COSTS, Clock(), 1)
    recorder.close()
    said = recorder.progress.file.getvalue()
    assert said.count(f"warning: wandb failed: {reason}. The run continues without wandb.") == 1
    assert said.count("warning") == 1
    assert (
        Recording.instances[-1].values("loss")
        == board(tmp_path)["loss"]
        == [(i, 1.0) for i in range(3)]
    )
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_missing_package_is_reported_before_the_run_starts(monkeypatch, capsys, tmp_path):
    from seqkd.cli.main import main

    monkeypatch.setattr(tracking, "_available_trackers", [])
    with pytest.raises(ConfigError, match=r"trackers: the package 'mlflow' .*`pip install mlflow`"):
        trackers.check(("mlflow",))
    trackers.check(())
    run = [str(ROOT / "configs/tiny.yaml"), "student.model=./nowhere", f"runs_dir={tmp_path}/runs"]
    arguments = [*run, "trackers=[wandb]"]
    assert main(["train", *arguments]) == 2
    assert "error: trackers: the package 'wandb' is not" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(["train", *arguments, "--dry-run"]) == 2
    assert "  error: trackers: the package 'wandb' is not" in capsys.readouterr().out
    monkeypatch.setattr(tracking, "_available_trackers", ["wandb"])
    trackers.check(("wandb",))


@pytest.mark.parametrize("name", get_args(TrackerName))
def test_accelerate_takes_the_options(name, tmp_path, monkeypatch):
    """The tracker's own package is replaced by a stub, so only accelerate's use of the options is
    tested."""
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


def test_the_environment_variables_of_a_launcher_are_ignored(tmp_path):
    """Otherwise accelerate would wait for the other processes that they announce."""
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


def test_tracker_files_of_a_failed_start_do_not_block_a_new_run(tmp_path):
    from seqkd.storage import run_directory

    (tmp_path / "trackers").mkdir()
    run_directory.refuse_used(tmp_path)
