"""Runs through a real Ray head and `ray job submit`, and common errors of users."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import torch
from safetensors.torch import load_file

from seqkd.models.loading import load_causal_lm, load_tokenizer
from tests.conftest import ROOT
from tests.fork_server import JOB_CONFIG, python

RAY = str(Path(sys.executable).parent / "ray")
TIMEOUT = 300
"""Seconds for one command. Only a hang takes this long."""


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """Separate home directory, so that the authentication token belongs to this head."""
    return tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def environment(home):
    kept = {k: v for k, v in os.environ.items() if not k.startswith("RAY_") or k == JOB_CONFIG}
    return kept | {"HOME": str(home), "RAY_AUTH_MODE": "token", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def head(environment):
    """Ray head with token authentication on its own ports. Other heads are not affected."""
    from actors.local_cluster import local_head

    with local_head(environment, "--num-cpus=2") as started:
        yield started


def submit(head, environment, *arguments):
    command = [
        *(RAY, "job", "submit", "--address", head.jobs, "--working-dir", str(ROOT), "--"),
        *(sys.executable, "scripts/train.py", *map(str, arguments)),
    ]
    return run(command, environment)


def run(command, environment):
    return subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT
    )


def metrics(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def test_student_sampled(head, environment, tiny_config, home):
    """The run has a warm-up on teacher samples, then uses student samples. Its output files are
    checked."""
    done = submit(
        head,
        environment,
        tiny_config,
        "sampler=student",
        "steps=3",
        "warmup={sampler: teacher, steps: 2, objective: {kind: token_forward_kl}, "
        "prompts_per_step: 4}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    # The job's working directory is a copy that Ray deletes, so the run is in the home directory.
    run = home / "seqkd" / "runs" / "tiny"
    rows = metrics(run)
    assert [r["step"] for r in rows] == [0, 1, 2, 3, 4]
    assert [r["sampler"] for r in rows] == ["teacher"] * 2 + ["student"] * 3
    assert [r["policy_version"] for r in rows] == [0, 1, 2, 3, 4]
    assert [r["rollout_policy_version"] for r in rows] == [0, 0, 2, 3, 4]
    assert all(r["logprob_gap_max"] <= 1e-3 for r in rows)
    assert all(r["reverse_kl_per_token"] > 0 for r in rows)
    assert "rollout loading, " in done.stdout and "actors ready after" in done.stdout
    assert "main     5/5" in done.stdout
    assert "reverse KL per token (nats)" in done.stdout
    assert "student after" in done.stdout
    for name in ("config.yaml", "evaluation.json", "tensorboard", "student/model.safetensors"):
        assert (run / name).exists(), name
    assert "## Evaluation\n\nOn 8 held-out" in (run / "student" / "README.md").read_text()

    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert AutoModelForCausalLM.from_pretrained(run / "student").config.eos_token_id == 0
    assert AutoTokenizer.from_pretrained(run / "student").chat_template


def test_teacher_sampled_and_a_used_directory(head, environment, tiny_config, tmp_path):
    overrides = ["sampler=teacher", "steps=2", "evaluation.prompts=0", f"runs_dir={tmp_path}"]
    overrides.append(
        "extra_terms=[{sampler: dataset, weight: 0.5, unit: sequence}, {sampler: mixture}]"
    )
    overrides.append(f"cluster={head.cluster}")
    succeeds(direct(environment, tiny_config, *overrides))
    rows = metrics(tmp_path / "tiny")
    assert {(r["sampler"], r["objective"]) for r in rows} == {("teacher", "sequence_forward_kl")}
    assert [r["policy_version"] for r in rows] == [0, 1]
    assert all(r["dataset/sequences"] == 4 and r["dataset/eos_rate"] == 1 for r in rows)
    assert all(0 < r["mixture/effective_sample_size"] <= 16 for r in rows)
    refused(direct(environment, tiny_config, *overrides), "already contains another run")


def test_a_student_equal_to_its_teacher_has_zero_divergence(
    head, environment, tiny_config, tiny, tmp_path
):
    done = direct(
        environment,
        tiny_config,
        f"cluster={head.cluster}",
        f"student.model={tiny['teacher']}",
        f"teacher={{kind: vllm, model: {tiny['teacher']}, kv_cache_gib: 0.1}}",
        "objective.normalization=rate",
        "steps=1",
        f"runs_dir={tmp_path}",
    )
    succeeds(done)
    (row,) = metrics(tmp_path / "tiny")
    for name in ("loss", "reverse_kl_per_token", "forward_kl_per_token", "rate"):
        assert abs(row[name]) <= 1e-5, name
    figures = json.loads((tmp_path / "tiny" / "evaluation.json").read_text())["figures"]["initial"]
    assert abs(figures["reverse_kl_per_sequence"]["mean"]) <= 1e-4
    assert abs(figures["forward_kl_per_sequence"]["mean"]) <= 1e-4


def direct(environment, *arguments, command="train"):
    return run([*python(), "-m", "seqkd", command, *map(str, arguments)], environment)


def test_two_step_training_equals_the_live_run(head, environment, tiny_config, tiny, tmp_path):
    """Both give the same weights after 10 steps. The teacher's checkpoint is removed before the
    second step of two-step training."""
    teacher, common, two_step = two_ways(
        head, tiny_config, tiny, tmp_path, "teacher", "evaluation.prompts=2"
    )
    check_python_api(
        environment, tmp_path, *common, "sampler=teacher", "teacher_cache=null", "name=live"
    )
    refused(direct(environment, *two_step), "has no entries for the teacher", "seqkd precompute")
    succeeds(direct(environment, *two_step, command="precompute"))
    shutil.rmtree(teacher)
    succeeds(direct(environment, *two_step))
    assert_same_student(tmp_path, tiny)
    later, live = (
        json.loads((tmp_path / name / "evaluation.json").read_text())["figures"]["main"]
        for name in ("later", "live")
    )
    assert later["forward_kl_per_token"] == pytest.approx(live["forward_kl_per_token"])
    assert "reverse_kl_per_token" not in later, "there is no teacher to score student samples"


PYTHON_API = """
import dataclasses, json, sys
import seqkd
result = seqkd.train(seqkd.load_config(sys.argv[1], sys.argv[2:]))
print(json.dumps(dataclasses.asdict(result), default=str))
try:
    seqkd.train(seqkd.load_config(sys.argv[1], sys.argv[2:]))
except seqkd.errors.ConfigError as error:
    print(error)
"""


def check_python_api(environment, runs, *arguments):
    """Check the result of a run by :func:`seqkd.train`, and that a used directory is refused."""
    done = run([sys.executable, "-c", PYTHON_API, *map(str, arguments)], environment)
    succeeds(done)
    *_, result, error = done.stdout.splitlines()
    result, directory = json.loads(result), runs / "live"
    assert result.pop("seconds") > sum(row["time_step_s"] for row in metrics(directory)) > 0
    assert result == {
        "directory": str(directory),
        "student": str(directory / "student"),
        "metrics": str(directory / "metrics.jsonl"),
        "report": str(directory / "report.html"),
        "figures": json.loads((directory / "evaluation.json").read_text())["figures"],
        "warnings": [],
        "steps": len(metrics(directory)),
    }
    assert {"initial", "main"} == result["figures"].keys()
    assert (directory / "report.html").is_file()
    assert "already contains another run" in error


def test_two_step_training_with_a_cache_filled_in_two_calls(
    head, environment, tiny_config, tiny, tmp_path
):
    """The teacher scores the answers of the data set by top-k. An incomplete cache is refused, and
    completed by a second precompute."""
    teacher, common, two_step = two_ways(
        head, tiny_config, tiny, tmp_path, "dataset", "evaluation.prompts=0", "top_k, top_k: 32"
    )
    succeeds(direct(environment, *common, "sampler=dataset", "teacher_cache=null", "name=live"))
    succeeds(direct(environment, *two_step, "steps=4", command="precompute"))
    refused(direct(environment, *two_step), "lacks", "scores of 24 completions")
    shards = set((tmp_path / "cache").rglob("*.arrow"))
    succeeds(direct(environment, *two_step, command="precompute"))
    assert len(set((tmp_path / "cache").rglob("*.arrow")) - shards) == 6
    shutil.rmtree(teacher)
    succeeds(direct(environment, *two_step))
    assert_same_student(tmp_path, tiny)


def two_ways(head, tiny_config, tiny, tmp_path, records, evaluation, scores="hidden"):
    """Return a copy of the teacher, the common arguments of both runs, and the arguments of the
    two-step run."""
    teacher = shutil.copytree(tiny["teacher"], tmp_path / "the-teacher")
    common = [
        tiny_config,
        f"cluster={head.cluster}",
        f"teacher={{kind: hf, model: {teacher}, scores: {scores}}}",
        f"data.path={answers(tmp_path)}",
        *("steps=10", "rollout.samples_per_prompt=2", "objective={kind: token_forward_kl}"),
        *(evaluation, "evaluation.examples=0", f"runs_dir={tmp_path}"),
        f"teacher_cache={{path: {tmp_path}/cache, records: {records}}}",
    ]
    return teacher, common, [*common, "sampler=teacher_cache", "name=later"]


def assert_same_student(tmp_path, tiny):
    later, live, initial = (
        load_file(folder / "model.safetensors")
        for folder in (tmp_path / "later/student", tmp_path / "live/student", Path(tiny["student"]))
    )
    assert max((later[n] - live[n]).abs().max() for n in live) <= 1e-6
    assert max((live[n] - initial[n]).abs().max() for n in live) > 1e-3


def succeeds(done):
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_row_uses_the_teacher_of_its_tag(environment, tiny_config, tiny, tmp_path):
    """The teacher of rows b is the student itself, so they add tokens but no divergence."""
    rows = [
        {"prompt": f"say {i}", "reference": "yes" * (i + 1), "topic": "ab"[i % 2]} for i in range(4)
    ]
    file = tmp_path / "tagged.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    members = {
        name: {"tags": [tag], "teacher": {"kind": "hf", "model": tiny[name]}}
        for name, tag in (("teacher", "a"), ("student", "b"))
    }
    done = direct(
        environment,
        tiny_config,
        f"teacher={json.dumps({'kind': 'multi', 'teachers': members})}",
        f"data={json.dumps({'path': str(file), 'tag_key': 'topic', 'max_prompt_tokens': 64})}",
        *("sampler=dataset", "objective={kind: token_forward_kl}", "evaluation.prompts=0"),
        *("steps=1", f"runs_dir={tmp_path}", f"teacher_cache={{path: {tmp_path}/cache}}"),
    )
    succeeds(done)
    assert len(list((tmp_path / "cache").glob("*/teacher.json"))) == 2
    (metric,) = metrics(tmp_path / "tiny")
    p, q = (load_causal_lm(tiny[name], "float32", "model") for name in ("teacher", "student"))
    tokenizer = load_tokenizer(tiny["student"], "model")
    total, tokens = 0.0, 0
    for row in rows:
        text = f"<|user|>{row['prompt']}<|end|><|assistant|>{row['reference']}<|end|>"
        ids = torch.tensor([tokenizer(text, add_special_tokens=False).input_ids])
        own = len(row["reference"]) + 1
        with torch.no_grad():
            log_p, log_q = (m(ids).logits[0, -own - 1 : -1].log_softmax(-1) for m in (p, q))
        tokens += own
        if row["topic"] == "a":
            total += (log_p.exp() * (log_p - log_q)).sum().item()
    assert metric["tokens"] == tokens
    assert metric["forward_kl_per_token"] == pytest.approx(total / tokens, rel=1e-4)


def answers(tmp_path):
    """Write more rows with answers than ten steps of four prompts need."""
    file = tmp_path / "answers.jsonl"
    rows = [{"prompt": f"say {i}", "reference": f"{i}!"} for i in range(50)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def refused(done, *texts):
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    for text in texts:
        assert text in done.stderr, done.stderr


def test_a_stopped_job_resumes_where_it_was(head, environment, tiny_config, tmp_path):
    """`ray job stop` saves a checkpoint. The run can be resumed on two ranks, but not with another
    seed."""
    run_of, arguments = tmp_path / "tiny", ["evaluation.prompts=0", f"runs_dir={tmp_path}"]
    job = subprocess.Popen(
        [
            *(RAY, "job", "submit", "--address", head.jobs, "--submission-id=stopped"),
            *("--working-dir", str(ROOT), "--", sys.executable, "scripts/train.py"),
            *(str(tiny_config), *arguments, "steps=80"),
        ],
        env=environment, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    until = time.monotonic() + TIMEOUT
    while not (run_of / "metrics.jsonl").exists() or len(metrics(run_of)) < 3:
        assert job.poll() is None, job.stdout.read()
        assert time.monotonic() < until
        time.sleep(0.1)
    stop = run([RAY, "job", "stop", "--address", head.jobs, "stopped"], environment)
    printed, _ = job.communicate(timeout=180)
    assert "stopped: by SIGTERM; continue with --resume" in printed, printed + stop.stdout
    (saved,) = (run_of / "checkpoints").iterdir()
    steps = len(metrics(run_of))
    assert saved.name == f"step-{steps:08d}"

    changed = [*arguments, "--resume", "steps=80", "learner.ranks=2"]
    refused = direct(environment, tiny_config, *changed, "seed=1")
    assert refused.returncode == 2
    assert "seed: 0 -> 1" in refused.stderr
    done = submit(head, environment, tiny_config, *changed)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "changed: learner.ranks: 1 -> 2" in done.stdout
    assert f"resuming after step {steps}" in done.stdout
    assert [row["step"] for row in metrics(run_of)] == list(range(80))


def test_the_head_refuses_requests_without_the_token(head):
    from actors.build import is_open

    assert not is_open(head.jobs.removeprefix("http://"))
    with pytest.raises(HTTPError, match="401"):
        urlopen(f"{head.jobs}/api/jobs/", timeout=30)


def test_a_head_without_authentication_is_reported(environment, tiny_config, tmp_path):
    """RAY_AUTH_MODE=disabled replaces the default, which is token if there is a token file."""
    from actors.local_cluster import local_head

    open_to_all = environment | {"RAY_AUTH_MODE": "disabled"}
    with local_head(open_to_all, "--num-cpus=1") as head:
        cluster = f"cluster={head.cluster}"
        done = direct(open_to_all, tiny_config, cluster, "rollout.cpus=64", f"runs_dir={tmp_path}")
    refused(done, "needs 64 CPU cores")
    assert f"warning: cluster: {head.cluster!r} accepts requests without a token" in done.stderr


def test_a_missing_token(head, environment, tiny_config, tmp_path):
    anonymous = environment | {"HOME": str(tmp_path)}
    del anonymous["RAY_AUTH_MODE"]
    done = direct(anonymous, tiny_config, f"cluster={head.cluster}", f"runs_dir={tmp_path}")
    refused(
        done, f"cluster: the Ray head at {head.cluster!r} requires an authentication token",
        "sends none (RAY_AUTH_MODE is not set)", "Set RAY_AUTH_MODE=token",
    )  # fmt: skip
    assert "gcs_client" not in done.stderr, "Ray retries in vain"
    anonymous |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a" * 64}
    done = direct(anonymous, tiny_config, f"cluster={head.cluster}", f"runs_dir={tmp_path}")
    refused(done, "sent a wrong one")


def test_more_cores_than_the_cluster_has(head, environment, tiny_config, tmp_path):
    done = direct(
        environment,
        tiny_config,
        f"cluster={head.cluster}",
        "rollout.cpus=64",
        f"runs_dir={tmp_path}",
    )
    refused(done, "needs 64 CPU cores, but the cluster has 2", "rollout.cpus")
    assert not (tmp_path / "tiny").exists()


def test_no_cluster_at_the_address(head, environment, tiny_config, tmp_path):
    done = direct(environment, tiny_config, "cluster=127.0.0.1:1", f"runs_dir={tmp_path}")
    refused(done, "no Ray cluster answers at '127.0.0.1:1'", "ray start --head")


def test_a_dry_run_reports_all_findings_and_starts_no_run(environment, tiny_config, tmp_path):
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "metrics.jsonl").write_text("{}\n")
    done = direct(
        environment,
        tiny_config,
        "--dry-run",
        f"runs_dir={tmp_path}",
        "student.model=/nowhere",
        "rollout.cpus=4096",
    )
    assert done.returncode == 2
    assert "estimator: rao_blackwell" in done.stdout
    assert "rollout 0: 4096 threads" in done.stdout
    lines = done.stdout.splitlines()
    for finding in (
        "already contains another run",
        "'/nowhere' does not exist",
        "needs 4096 CPU cores",
    ):
        assert any(line.startswith("  error: ") and finding in line for line in lines), finding
    done = direct(environment, tiny_config, "--dry-run", f"runs_dir={tmp_path}/other")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "findings: none" in done.stdout
    assert not (tmp_path / "other").exists()


def test_a_job_runs_in_the_ray_that_it_was_submitted_to(head, environment):
    """By default it would run in the Ray of this machine that was started last."""
    from actors.local_cluster import local_head

    job = [sys.executable, "-c", "import os; print('in', os.environ['RAY_ADDRESS'])"]
    with local_head(environment, "--num-cpus=1"):
        done = run([RAY, "job", "submit", "--address", head.jobs, "--", *job], environment)
    assert done.returncode == 0, done.stdout + done.stderr
    (printed,) = [line for line in done.stdout.splitlines() if line.startswith("in ")]
    assert printed.rpartition(":")[2] == head.cluster.rpartition(":")[2]
