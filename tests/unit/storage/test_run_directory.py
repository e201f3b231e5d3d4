"""The run directory: location, lock, and allowed changes of a resumed run."""

from __future__ import annotations

import io
import json
import multiprocessing

import pytest

from seqkd.cli.train import train
from seqkd.config.run import Config
from seqkd.data.prompt_table import PromptTable, batch_of
from seqkd.errors import ConfigError, StorageError
from seqkd.storage import run_directory
from seqkd.training.clock import Clock
from seqkd.training.recorder import Recorder
from tests.unit.config.test_config import MINIMAL


def config(**changes):
    return Config.model_validate({**MINIMAL, **changes})


def table(*answers):
    rows = [(f"id{i}", [i], [ord(a)], False, "", None, 0, 1) for i, a in enumerate(answers)]
    return PromptTable([batch_of(rows)], [])


def begun(tmp_path, data=None, **changes):
    """Create a run directory with rows of metrics."""
    c = config(runs_dir=str(tmp_path), **changes)
    directory = run_directory.locate(c)
    with run_directory.lock(directory):
        run_directory.initialize(directory, c, data or {"training": table("a")}, {})
    (directory / "metrics.jsonl").write_text("{}\n")
    return directory


def test_used_directory_is_refused_without_resume(tmp_path):
    directory = begun(tmp_path)
    c = config(runs_dir=str(tmp_path))
    with pytest.raises(ConfigError, match=r"another run\. Choose a new name.*--resume"):
        run_directory.resumption(directory, c, resume=False)
    assert run_directory.resumption(directory, c, resume=True) == run_directory.Resumption(True)
    (directory / "metrics.jsonl").write_text("")  # the first start failed before its first step
    assert not run_directory.resumption(directory, c, resume=False).exists


def test_a_directory_with_other_files_is_refused(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "thesis.tex").write_text("")
    for resume in (False, True):
        with pytest.raises(ConfigError, match="already contains"):
            run_directory.resumption(tmp_path / "x", config(), resume)


def test_resuming_an_empty_directory_starts_a_run(tmp_path):
    resumption = run_directory.resumption(tmp_path / "x", config(), resume=True)
    assert not resumption.exists


def test_execution_keys_may_change(tmp_path):
    directory = begun(tmp_path)
    c = config(
        runs_dir=str(tmp_path),
        learner={"ranks": 2, "zero_stage": 3},
        rollout={"actors": 2, "gpus": 1},
        checkpoints={"every_steps": 7},
        recovery={"restarts": 99},
        alarms={"canary_every": 5},
        placement="split",
        prompts_per_step=4,
    )
    resumption = run_directory.resumption(directory, c, resume=True)
    assert not resumption.trajectory
    assert "learner.ranks: 1 -> 2" in resumption.changes
    assert "checkpoints.every_steps: 100 -> 7" in resumption.changes


def test_trajectory_keys_may_change_and_are_reported(tmp_path):
    directory = begun(tmp_path)
    changes = {"learner": {"lr": 0.5}, "steps": MINIMAL["steps"] + 5}
    c = config(runs_dir=str(tmp_path), **changes)
    resumption = run_directory.resumption(directory, c, resume=True)
    assert sorted(resumption.trajectory) == ["learner.lr", "steps"]
    assert "learner.lr: 1e-05 -> 0.5" in resumption.changes


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"seed": 7}, "seed: 0 -> 7"),
        ({"rollout": {"max_tokens": 9}}, "rollout.max_tokens: 64 -> 9"),
        ({"data": {**MINIMAL["data"], "max_prompt_tokens": 9}}, "data.max_prompt_tokens:"),
        ({"objective": {"kind": "token_reverse_kl"}}, "objective.kind: sequence_reverse_kl ->"),
        ({"objective": {"future_weight": 0.5}}, "objective.future_weight: 1.0 -> 0.5"),
        ({"warmup": {"sampler": "teacher", "steps": 1}}, "warmup.steps: (none) -> 1"),
        ({"teacher": {**MINIMAL["teacher"], "model": "other"}}, "teacher.model:"),
        ({"steps": 1}, "(can only increase)"),
        ({"prompts_per_step": 8}, "prompts_per_step: 4 -> 8"),
    ],
)
def test_changes_of_earlier_steps_are_refused(tmp_path, changes, line):
    directory = begun(tmp_path, steps=3)
    c = config(runs_dir=str(tmp_path), **{"steps": 3, **changes})
    with pytest.raises(ConfigError, match="a run with another configuration") as caught:
        run_directory.resumption(directory, c, resume=True)
    assert line in str(caught.value)
    assert "Restore these values, or choose a new name" in str(caught.value)


def test_changed_data_set_is_refused(tmp_path):
    directory = begun(tmp_path, {"training": table("a", "b"), "held-out": (), "corpus": ()})
    same = {"training": table("a", "b"), "held-out": (), "corpus": ()}
    run_directory.refuse_other_data(directory, same)
    for other, message in (
        (table("a", "c"), "2 then, 2 now, with different content"),
        (table("b", "a"), "2 then, 2 now, with different content"),
        (table("a"), "2 then, 1 now"),
    ):
        with pytest.raises(ConfigError, match="the training prompts have changed since") as caught:
            run_directory.refuse_other_data(directory, same | {"training": other})
        assert message in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", None])
def test_missing_or_damaged_data_fingerprint(tmp_path, content):
    directory = begun(tmp_path)
    (directory / "data.json").unlink()
    if content is not None:
        (directory / "data.json").write_text(content)
    with pytest.raises(ConfigError, match=r"data\.json, .* is missing or damaged"):
        run_directory.refuse_other_data(directory, {"training": table("a")})


def test_a_start_that_wrote_nothing_leaves_no_directory(tmp_path):
    with pytest.raises(KeyError), run_directory.lock(tmp_path / "runs" / "x"):
        raise KeyError
    assert not (tmp_path / "runs").exists()
    with run_directory.lock(tmp_path / "x"):
        (tmp_path / "x" / "config.yaml").write_text("")
    assert (tmp_path / "x" / "lock").exists()


def test_a_name_in_use_is_refused_before_the_data_is_read(tmp_path):
    missing = {"path": "missing.jsonl", "heldout_path": "missing.jsonl"}
    run = config(data=missing, runs_dir=str(tmp_path))
    with (
        run_directory.lock(run_directory.locate(run)),
        pytest.raises(ConfigError, match="is in use by a running process"),
    ):
        train(run)


def test_running_directory_is_locked(tmp_path):
    ready, done = multiprocessing.Event(), multiprocessing.Event()

    def first():
        with run_directory.lock(tmp_path / "x"):
            ready.set()
            done.wait(60)

    other = multiprocessing.get_context("fork").Process(target=first)
    other.start()
    assert ready.wait(60)
    with (
        pytest.raises(ConfigError, match="is in use by a running process"),
        run_directory.lock(tmp_path / "x"),
    ):
        pass
    other.kill()  # the lock is released however the process ends
    other.join()
    with run_directory.lock(tmp_path / "x"):
        pass


def test_relative_runs_dir_in_a_ray_job_is_in_the_home_directory(tmp_path, monkeypatch):
    packaged = tmp_path / "working_dir_files" / "pkg"
    packaged.mkdir(parents=True)
    monkeypatch.chdir(packaged)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert run_directory.locate(config()) == tmp_path / "home" / "seqkd" / "runs" / "x"
    assert run_directory.locate(config(runs_dir=str(tmp_path))) == tmp_path / "x"


def test_a_directory_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    c = config(runs_dir=str(tmp_path / "file"))
    with (
        pytest.raises(ConfigError, match=r"runs_dir: .*cannot be written"),
        run_directory.lock(run_directory.locate(c)),
    ):
        pass


ROW = {"phase": "main", "tokens": 4, "loss": 1.0, "length": 2.0}


def rows(recorder, first, last):
    for step in range(first, last):
        recorder.step(step, ROW | {"loss": float(step)}, {"seconds": 1.0}, Clock(), last)


@pytest.fixture
def recorder(tmp_path):
    instance = Recorder(tmp_path, config())
    yield instance
    instance.close()


def test_metrics_continue_without_gaps_or_duplicates(recorder, tmp_path):
    recorder.rewind(0)
    recorder.begin("main", config())
    rows(recorder, 0, 5)
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 5, "loss": 1')  # killed while writing
    assert [row["loss"] for row in recorder.rewind(3)] == [0, 1, 2]
    rows(recorder, 3, 6)
    recorder.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == list(range(6))


def test_rewind_drops_damaged_rows(recorder, tmp_path):
    recorder.rewind(0)
    recorder.begin("main", config())
    rows(recorder, 0, 4)
    recorder.close()
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    noise = lines[1][:9] + b"\xff\n" + b'[1]\n{"step": "x"}\n' + lines[0]
    file.write_bytes(lines[0] + noise + b"".join(lines[2:]))
    assert [row["step"] for row in recorder.rewind(4)] == [0, 2, 3]


def test_non_finite_numbers_are_written_as_null(recorder, tmp_path):
    recorder.rewind(0)
    recorder.begin("main", config())
    row = ROW | {"grad_norm": float("nan"), "loss": float("inf")}
    recorder.step(0, row, {"seconds": 1.0}, Clock(), 1)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["grad_norm"] is None and row["loss"] is None


def test_run_continues_without_tensorboard(tmp_path):
    (tmp_path / "tensorboard").write_text("in its way")
    out = io.StringIO()
    recorder = Recorder(tmp_path, config(), out)
    recorder.rewind(0)
    recorder.begin("main", config())
    rows(recorder, 0, 2)
    recorder.close()
    assert out.getvalue().count("The run continues without TensorBoard") == 1
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 2


def test_metrics_that_cannot_be_written(recorder, tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"metrics\.jsonl: cannot be written"):
        recorder.rewind(0)


def test_files_that_are_not_of_a_run_are_not_called_a_run(tmp_path):
    """--resume is not suggested if there is nothing to resume."""
    (tmp_path / "notes.txt").touch()
    with pytest.raises(ConfigError, match="already contains other files") as caught:
        run_directory.refuse_used(tmp_path)
    assert "--resume" not in str(caught.value)
    (tmp_path / "config.yaml").touch()
    with pytest.raises(ConfigError, match=r"already contains another run. .* --resume"):
        run_directory.refuse_used(tmp_path)
