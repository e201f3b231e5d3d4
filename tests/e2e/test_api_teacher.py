"""A teacher behind a real server on loopback: training on its text and scores, also if 30 % of the
requests fail."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.error import URLError
from urllib.request import Request, urlopen

import pytest
import torch
import yaml

from actors.endpoint_teacher import ApiSampler, ApiScorer
from actors.teacher import TeacherActor
from seqkd.config.teacher import EndpointTeacherConfig, HfTeacherConfig
from seqkd.evaluation.catalog import labeled
from tests.conftest import ROOT
from tests.fork_server import python


@pytest.fixture(scope="module")
def server(tiny, tmp_path_factory):
    """vLLM server of the tiny teacher, under the name "black-box"."""
    from actors.local_cluster import free_ports

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
            time.sleep(0.5)  # polling interval
        yield f"{url}/v1"
        process.terminate()
        process.wait(60)


def answers(url):
    try:
        return urlopen(f"{url}/health", timeout=2).status == 200
    except (URLError, OSError):
        return False


class Failing(BaseHTTPRequestHandler):
    """Proxy that fails 30 % of the requests, and logs all requests as (body, fault or None)."""

    protocol_version = "HTTP/1.1"
    faults = (429, 500, "cut", "malformed")

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.handle_one(None)

    def do_POST(self):
        self.handle_one(self.rfile.read(int(self.headers["Content-Length"])))

    def handle_one(self, body):
        server = self.server
        with server.lock:
            fails = server.random.random() < 0.3
            fault = server.random.choice(self.faults) if fails else None
            server.log.append((json.loads(body) if body else None, fault))
        if isinstance(fault, int):
            return self.send(fault, b'{"error": {"message": "no"}}')
        if fault == "cut":
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault == "malformed":
            return self.send(200, b'{"choices": [{"index"')
        passed = Request(server.url + self.path, body, {"Content-Type": "application/json"})
        with urlopen(passed, timeout=60) as answer:
            return self.send(answer.status, answer.read())

    def send(self, status, data):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.send_header("retry-after-ms", "20")
        self.end_headers()
        self.wfile.write(data)


@pytest.fixture
def failing(server):
    proxy = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    proxy.url, proxy.log = server.removesuffix("/v1"), []
    proxy.lock, proxy.random = threading.Lock(), random.Random(5)
    threading.Thread(target=proxy.serve_forever, args=(0.01,), daemon=True).start()
    yield proxy
    proxy.shutdown()
    proxy.server_close()


def asked(body):
    """Return the identity of a request: a text to score, or a prompt to complete and a seed."""
    text = body.get("prompt") or body["messages"][-1]["content"]
    return json.dumps([text, None if body.get("echo") else body["seed"]])


def train(tiny, tmp_path, url, *overrides):
    data = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())
    data["student"]["model"] = tiny["student"]
    data["teacher"] = {"kind": "openai", "model": "black-box", "base_url": url}
    data["runs_dir"] = str(tmp_path)
    file = tmp_path / "black_box.yaml"
    file.write_text(yaml.safe_dump(data))
    command = [*python(), "-m", "seqkd", "train", str(file), *overrides]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_a_student_trains_on_text_of_a_black_box(server, tiny, tmp_path):
    done = train(tiny, tmp_path, server, "sampler=teacher", "steps=10", "prompts_per_step=8")
    assert done.returncode == 0, done.stdout + done.stderr
    run = tmp_path / "tiny"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # One request for each of 8 held-out prompts, and 8 prompts x 4 samples per step.
    assert [r["teacher_requests"] for r in rows] == [8 + 32 * (i + 1) for i in range(10)]
    assert rows[-1]["teacher_completion_tokens"] > 10 * 32
    figures = json.loads((run / "evaluation.json").read_text())
    assert "reverse_kl_per_token" not in figures["figures"]["main"]
    assert figures["changes"]["nll_per_token"]["initial -> main"]["high"] < 0
    assert labeled("nll_per_token") in done.stdout


SCORING = ("teacher.precision=float32", "teacher.max_retries=12")
REWARD_TO_GO = "objective={kind: sequence_reverse_kl, estimator: reward_to_go, normalization: rate}"


@pytest.mark.parametrize(
    ("overrides", "scored", "written"),
    [
        # Held-out prompts: one teacher answer per prompt, which is scored together with the
        # student's two answers if that gives a divergence. The checks: three scores, and for chat
        # three prompts. The probe: one score in each of three steps.
        (["sampler=student", "teacher.scores=logprobs", REWARD_TO_GO], 3 + 48 + 3, 3 + 8),
        (
            ["sampler=mixture", "teacher.scores=top_k", "teacher.api=completions"],
            3 + 24 + 48 + 3,
            None,
        ),
        (["sampler=teacher"], 0, 3 + 8 + 48),
    ],
)
def test_three_in_ten_requests_fail(failing, tiny, tmp_path, overrides, scored, written):
    """No answer is lost, no answered request is repeated, and no score becomes zero."""
    if scored:
        overrides = [*overrides, *SCORING, f"teacher.tokenizer={tiny['teacher']}"]
    url = f"http://127.0.0.1:{failing.server_address[1]}/v1"
    steps = ["steps=3", "prompts_per_step=4", "rollout.samples_per_prompt=4"]
    done = train(tiny, tmp_path, url, *overrides, *steps)
    assert done.returncode == 0, done.stdout + done.stderr
    posts = [(body, fault) for body, fault in failing.log if body]
    faults = Counter(fault for _, fault in failing.log)
    print(f"{len(failing.log)} requests, {dict(faults)}")
    assert faults.keys() == {None, *Failing.faults}
    answered = Counter(asked(body) for body, fault in posts if fault is None)
    scores = Counter(asked(body) for body, fault in posts if fault is None and body.get("echo"))
    assert set(map(asked, (body for body, _ in posts))) == set(answered), "no request is lost"
    assert scores.total() == scored
    # The checks before the run score one text twice on purpose, and each step scores the probe.
    assert Counter(scores.values()) == (Counter({3: 1, 2: 1, 1: scored - 5}) if scored else {})
    texts = answered - scores
    assert set(texts.values()) == {1}
    rows = [json.loads(r) for r in (tmp_path / "tiny" / "metrics.jsonl").read_text().splitlines()]
    assert len(rows) == 3
    if written is not None:
        assert texts.total() == written
    else:
        assert texts.total() == 8 + sum(row["teacher_samples"] for row in rows)
        assert all(0.3 < row["mean_weight"] <= 1.25 for row in rows)
    for row in rows if scored else []:
        assert -12 < row["teacher_logprob_per_token"] < -1
        assert row["teacher_unreadable"] >= 0 < row["teacher_requests"]
    checks = 3 * bool(scored) + 3 * ("teacher.api=completions" not in overrides)
    unreadable = sum(fault == "malformed" for _, fault in posts)
    assert rows[-1]["teacher_requests"] <= answered.total() - checks + unreadable


def test_scores_agree_with_those_of_a_local_model(server, tiny, prompts):
    """The log-probs that the endpoint returned while sampling agree, too."""
    options = {"model": "black-box", "base_url": server, "api": "completions", "scores": "top_k"}
    endpoint = EndpointTeacherConfig(**options, tokenizer=tiny["teacher"], precision="float32")
    sampler, scorer, local = ApiSampler((0,)), ApiScorer(), TeacherActor()
    sampler.start(endpoint, "key", tiny["student"])
    scorer.start(endpoint, "key", 320)
    local.start(HfTeacherConfig(model=tiny["teacher"], scores="top_k", top_k=319), 512, 320)
    rollouts = [r for _, _, r in sampler.sample(prompts, [1, 2, 3, 4], [8] * 4, 64, 1.0, 1.0)]
    assert {r.finish_reason for r in rollouts} == {"stop", "length"}
    assert all((r.completion_ids[-1] == 0) == (r.finish_reason == "stop") for r in rollouts)
    largest = 0.0
    for rollout, remote, reference in zip(
        rollouts, scorer.score(rollouts), local.score(rollouts), strict=True
    ):
        drawn = torch.tensor(rollout.rollout_logprobs)
        # Of 320 tokens, 319 are listed. The tail is the remaining one.
        logprobs = reference.top_logprobs[:, -1:].expand(-1, 320)
        logprobs = logprobs.scatter(-1, reference.top_ids.long(), reference.top_logprobs[:, :-1])
        ids, best = remote.top_ids.long(), logprobs.topk(20)
        rest = logprobs.scatter(-1, best.indices, -torch.inf).logsumexp(-1, keepdim=True)
        for actual, expected in [
            (drawn, reference.logprobs),
            (remote.logprobs, reference.logprobs),
            (remote.top_logprobs[:, :-1], logprobs.gather(-1, ids)),  # by id
            (remote.top_logprobs, torch.cat([best.values, rest], -1)),  # no token is missing
        ]:
            largest = max(largest, (actual - expected).abs().max().item())
    print(f"largest difference: {largest:.3g} nats")
    assert largest <= 1e-3


@pytest.mark.parametrize(
    ("overrides", "texts"),
    [
        (
            ["sampler=student"],
            ("teacher.scores is 'none'", "set sampler to teacher"),
        ),
        (
            ["sampler=student", "teacher.scores=top_k"],
            ("teacher.tokenizer is not set", "scores to none"),
        ),
        (["sampler=mixture"], ("scores is 'none'",)),
        (["sampler=teacher", "teacher.model=other"], ("'other' is not served", "'black-box'")),
    ],
)
def test_unsupported_options_of_a_black_box_are_refused(server, tiny, tmp_path, overrides, texts):
    done = train(tiny, tmp_path, server, *overrides)
    assert done.returncode == 2, done.stdout + done.stderr
    for text in texts:
        assert text in done.stderr
    assert "Traceback" not in done.stderr
