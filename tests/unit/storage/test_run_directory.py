"""Where a run is, that it is alone there, and what a resumed one may change."""

from __future__ import annotations

import io
import json
import multiprocessing

import pytest

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
    """The directory of a run with some rows of metrics."""
    c = config(runs_dir=str(tmp_path), **changes)
    directory = run_directory.locate(c)
    with run_directory.lock(directory):
        run_directory.initialize(directory, c, data or {"training": table("a")})
    (directory / "metrics.jsonl").write_text("{}\n")
    return directory


def test_a_used_directory_is_refused_unless_the_run_goes_on(tmp_path):
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


def test_resuming_what_has_not_begun_begins(tmp_path):
    found = run_directory.resumption(tmp_path / "x", config(), resume=True)
    assert not found.exists


def test_how_a_run_is_carried_out_may_change(tmp_path):
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
    found = run_directory.resumption(directory, c, resume=True)
    assert not found.trajectory
    assert "learner.ranks: 1 -> 2" in found.changes
    assert "checkpoints.every_steps: 100 -> 7" in found.changes


def test_what_the_next_steps_do_may_change_and_is_another_student(tmp_path):
    directory = begun(tmp_path)
    changes = {"learner": {"lr": 0.5}, "steps": MINIMAL["steps"] + 5}
    c = config(runs_dir=str(tmp_path), **changes)
    found = run_directory.resumption(directory, c, resume=True)
    assert sorted(found.trajectory) == ["learner.lr", "steps"]
    assert "learner.lr: 1e-05 -> 0.5" in found.changes


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
def test_what_would_make_the_steps_so_far_others_is_refused(tmp_path, changes, line):
    directory = begun(tmp_path, steps=3)
    c = config(runs_dir=str(tmp_path), **{"steps": 3, **changes})
    with pytest.raises(ConfigError, match="a run with another configuration") as caught:
        run_directory.resumption(directory, c, resume=True)
    assert line in str(caught.value)
    assert "Restore these values, or choose a new name" in str(caught.value)


def test_another_data_set_is_refused(tmp_path):
    directory = begun(tmp_path, {"training": table("a", "b"), "held-out": (), "corpus": ()})
    same = {"training": table("a", "b"), "held-out": (), "corpus": ()}
    run_directory.refuse_other_data(directory, same)
    for other, found in (
        (table("a", "c"), "2 then, 2 now, with different content"),
        (table("b", "a"), "2 then, 2 now, with different content"),
        (table("a"), "2 then, 1 now"),
    ):
        with pytest.raises(ConfigError, match="the training prompts have changed since") as caught:
            run_directory.refuse_other_data(directory, same | {"training": other})
        assert found in str(caught.value)


@pytest.mark.parametrize("content", ["", "[]", "{}", None])
def test_a_lost_description_of_the_data(tmp_path, content):
    directory = begun(tmp_path)
    (directory / "data.json").unlink()
    if content is not None:
        (directory / "data.json").write_text(content)
    with pytest.raises(ConfigError, match=r"data\.json, .* is missing or damaged"):
        run_directory.refuse_other_data(directory, {"training": table("a")})


def test_a_run_under_way_is_not_begun_a_second_time(tmp_path):
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
    other.kill()  # whatever ends it, the lock goes with it
    other.join()
    with run_directory.lock(tmp_path / "x"):
        pass


def test_within_a_packaged_job_runs_go_home(tmp_path, monkeypatch):
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
    made = Recorder(tmp_path, config())
    yield made
    made.close()


def test_metrics_go_on_without_gap_or_repetition(recorder, tmp_path):
    recorder.rewind(0)
    recorder.begin("main", config())
    rows(recorder, 0, 5)
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text() + '{"step": 5, "loss": 1')  # killed while writing
    assert [row["loss"] for row in recorder.rewind(3)] == [0, 1, 2]
    rows(recorder, 3, 6)
    recorder.close()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == list(range(6))


def test_of_damaged_rows_the_whole_ones_are_left(recorder, tmp_path):
    recorder.rewind(0)
    recorder.begin("main", config())
    rows(recorder, 0, 4)
    recorder.close()
    file = tmp_path / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)
    noise = lines[1][:9] + b"\xff\n" + b'[1]\n{"step": "x"}\n' + lines[0]
    file.write_bytes(lines[0] + noise + b"".join(lines[2:]))
    assert [row["step"] for row in recorder.rewind(4)] == [0, 2, 3]


def test_what_is_no_number_is_written_as_null(recorder, tmp_path):
    recorder.rewind(0)
    recorder.begin("main", config())
    row = ROW | {"grad_norm": float("nan"), "loss": float("inf")}
    recorder.step(0, row, {"seconds": 1.0}, Clock(), 1)
    row = json.loads((tmp_path / "metrics.jsonl").read_text())
    assert row["grad_norm"] is None and row["loss"] is None


def test_without_tensorboard_the_run_goes_on(tmp_path):
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
