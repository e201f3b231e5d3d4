"""A black-box teacher: a real server on loopback, its text learnt by a student."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import yaml

from tests.conftest import ROOT


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """vLLM's own server of the tiny teacher, under the name "black-box"."""
    from quickstart import free_ports

    (port,) = free_ports(1)
    log = tmp_path_factory.mktemp("server") / "log"
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", tiny["teacher"]),
        *("--served-model-name", "black-box", "--host", "127.0.0.1", "--port", str(port)),
        *("--dtype", "float32", "--max-model-len", "512", "--enforce-eager"),
    ]
    environment = os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"}
    with log.open("w") as output:
        process = subprocess.Popen(command, env=environment, stdout=output, stderr=output)
        url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + 240
        while not answers(url):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)  # between two looks at the condition awaited
        yield f"{url}/v1"
        process.terminate()
        process.wait(60)


def answers(url):
    try:
        return urlopen(f"{url}/health", timeout=2).status == 200
    except (URLError, OSError):
        return False


def train(tiny, tmp_path, url, *overrides):
    data = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    data["student"]["model"] = tiny["student"]
    data["teacher"] = {"kind": "openai", "model": "black-box", "base_url": url}
    data["runs_dir"] = str(tmp_path)
    file = tmp_path / "black_box.yaml"
    file.write_text(yaml.safe_dump(data))
    command = [sys.executable, "scripts/train.py", str(file), *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_student_learns_from_a_black_box(server, tiny, tmp_path):
    done = train(tiny, tmp_path, server, "sampler=teacher", "steps=20", "prompts_per_step=8")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "tiny"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # 8 held-out prompts were asked once, 8 prompts x 4 samples in each step.
    assert [r["teacher_requests"] for r in rows] == [8 + 32 * (i + 1) for i in range(20)]
    assert rows[-1]["teacher_completion_tokens"] > 20 * 32
    figures = json.loads((run / "evaluation.json").read_text())
    assert "reverse_kl_per_token" not in figures["figures"]["main"]
    assert figures["changes"]["nll_per_token"]["initial -> main"]["high"] < 0
    assert "teacher's text, NLL per token" in done.stdout


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        (
            ["sampler=student"],
            ("teacher.scores is 'none'", "Set sampler to teacher"),
        ),
        (["sampler=mixture"], ("scores is 'none'",)),
        (["sampler=teacher", "teacher.model=other"], ("'other' is not served", "'black-box'")),
    ],
)
def test_what_a_black_box_cannot_do_is_refused(server, tiny, tmp_path, overrides, texts):
    done = train(tiny, tmp_path, server, *overrides)
    assert done.returncode == 2, done.stdout + done.stderr
    for text in texts:
        assert text in done.stderr
    assert "Traceback" not in done.stderr
