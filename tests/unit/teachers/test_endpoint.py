"""Client of a teacher endpoint against a server with injected faults."""

from __future__ import annotations

import json
import math
import random
import socket
import threading
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch

from actors.endpoint_teacher import ApiSampler, ApiScorer
from seqkd.checks.teacher_endpoint import check_answers, check_endpoint
from seqkd.config.run import Config
from seqkd.config.teacher import EndpointTeacherConfig
from seqkd.errors import ActorError, ModelError
from seqkd.teachers import endpoint
from seqkd.teachers.endpoint import EndpointClient, Request, key_of
from seqkd.types import Prompt, Rollout
from tests.unit.config.test_config import MINIMAL

VOCABULARY = 320


def distribution(ids):
    """Return [V] log-probs after ``ids``, which depend on every token."""
    seed = hash(tuple(ids)) % 2**31
    return torch.randn(VOCABULARY, generator=torch.Generator().manual_seed(seed)).log_softmax(-1)


class Peer(BaseHTTPRequestHandler):
    """Server that applies one of ``server.faults`` per request and then responds with the
    prompt."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        if "elsewhere" in self.path:
            return self.reply(307, {}, ("Location", f"http://127.0.0.1:{self.server.elsewhere}/"))
        if "page" in self.path:
            return self.send(200, b"<html></html>", kind="text/html")
        return self.reply(200, {"object": "list", "data": [{"id": "t", "object": "model"}]})

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.under_way += 1
            self.server.most = max(self.server.most, self.server.under_way)
            self.server.bodies.append(body)
            fault = self.server.faults.pop(0) if self.server.faults else None
        try:
            self.fail(fault, body)
        finally:
            with self.server.lock:
                self.server.under_way -= 1

    def fail(self, fault, body):
        if isinstance(fault, int):
            return self.reply(fault, {"error": {"message": "no"}}, ("retry-after-ms", "10"))
        if fault == "echo":
            return self.reply(401, {"error": {"message": f"no: {self.headers['Authorization']}"}})
        if fault == "cut":
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", "500")
            self.end_headers()
            self.wfile.write(b'{"choices": [')
            self.wfile.flush()
            self.close_connection = True
            return self.connection.shutdown(socket.SHUT_RDWR)
        if fault == "malformed":
            return self.send(200, b'{"choices": [{"index"')
        if fault == "elsewhere":
            port = self.server.elsewhere
            target = f"http://127.0.0.1:{port}{self.path}"
            return self.reply(307, {}, ("Location", target))
        if fault == "blocked":
            return self.reply(400, {"error": {"message": "no", "code": "content_filter"}})
        if fault == "endless":
            return self.endless()
        if fault == "slow":
            threading.Event().wait(3)
        if isinstance(body.get("prompt"), list):
            return self.tokens(fault, body)
        text = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
        choice = {"index": 0, "finish_reason": "stop", "logprobs": None}
        if "messages" in body:
            choice["message"] = {"role": "assistant", "content": f"re: {text}"}
        else:
            choice["text"] = f"re: {text}"
        if fault == "no content":
            choice["message"]["content"] = None
        if fault == "no choices":
            return self.reply(200, {"id": "x"})
        if fault == "surrogate":
            choice["message"]["content"] = "a \ud800 b"
        if fault == "filtered":
            choice["finish_reason"] = "content_filter"
        if fault == "declined":
            choice["message"]["refusal"] = "I cannot help with that."
        read = 3 if self.server.counts is None else self.server.counts(text)
        return self.answer(choice, read, 2)

    def endless(self):
        """Send one byte at a time and never end."""
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", "1000000")
        self.end_headers()
        with suppress(OSError):
            while not self.server.closing.wait(0.05):
                self.wfile.write(b" ")
        self.close_connection = True

    def answer(self, choice, read, written):
        usage = {"prompt_tokens": read, "completion_tokens": written}
        head = {"id": "x", "object": "o", "created": 0, "model": self.server.model}
        self.reply(200, {**head, "choices": [choice], "usage": usage})

    def tokens(self, fault, body):
        """Respond with log-probs by token id, of the echoed prompt or of a completion that ends in
        token 0."""
        prompt = body["prompt"]
        if fault == "reads less":
            prompt = prompt[2:]
        ids = prompt if body.get("echo") else [*prompt, 7, 8, 0]
        first = 0 if body.get("echo") else len(prompt)
        laws = [self.server.law(ids[:i]) if i else None for i in range(len(ids))]
        logprobs = [None if d is None else d[t].item() for d, t in zip(laws, ids, strict=True)]
        if self.server.noise:
            logprobs = [v and v - random.uniform(0, self.server.noise) for v in logprobs]
        tops = [d and dict(zip(*self.best(d, body), strict=True)) for d in map(self.some, laws)]
        logprob_lists = {
            "tokens": [f"token_id:{t}" for t in ids][first:],
            "token_logprobs": logprobs[first:],
            "top_logprobs": tops[first:],
        }
        choice = {"index": 0, "text": "x", "finish_reason": "stop", "logprobs": logprob_lists}
        if fault == "filtered":
            choice["finish_reason"] = "content_filter"
        if fault == "cut at its end":
            choice["finish_reason"] = "length"
        SPOIL.get(fault, lambda c: None)(choice)
        self.answer(choice, len(prompt), 1 if body.get("echo") else 3)

    @staticmethod
    def some(logprobs):
        return None if logprobs is None else logprobs.tolist()

    @staticmethod
    def best(logprobs, body):
        order = sorted(range(VOCABULARY), key=lambda v: -logprobs[v])[: body["logprobs"]]
        return [f"token_id:{v}" for v in order], [logprobs[v] for v in order]

    def reply(self, status, content, *headers):
        self.send(status, json.dumps(content).encode(), *headers)

    def send(self, status, data, *headers, kind="application/json"):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        for header in headers:
            self.send_header(*header)
        self.end_headers()
        self.wfile.write(data)


def spoil(field, change):
    """Return a fault in one of the log-prob lists of a response."""

    def apply(choice):
        choice["logprobs"][field] = change(choice["logprobs"][field])

    return apply


SPOIL = {
    "no log-probs": lambda choice: choice.update(logprobs=None),
    "empty": spoil("token_logprobs", lambda v: []),
    "null": spoil("token_logprobs", lambda v: [*v[:-1], None]),
    "NaN": spoil("token_logprobs", lambda v: [*v[:-1], math.nan]),
    "-inf": spoil("token_logprobs", lambda v: [*v[:-1], -math.inf]),
    "-9999": spoil("token_logprobs", lambda v: [*v[:-1], -9999.0]),
    "above 0": spoil("token_logprobs", lambda v: [*v[:-1], 0.5]),
    "all zero": spoil("token_logprobs", lambda v: [None] + [0.0] * (len(v) - 1)),
    "one short": lambda choice: [v.pop() for v in choice["logprobs"].values()],
    "one list short": spoil("token_logprobs", lambda v: v[:-1]),
    "other tokens": spoil("tokens", lambda v: [*v[:-1], "token_id:1"]),
    "text": spoil("tokens", lambda v: ["a"] * len(v)),
    "tops missing": spoil("top_logprobs", lambda v: v[:-2]),
    "few on top": spoil("top_logprobs", lambda v: [d and dict(list(d.items())[:1]) for d in v]),
    "null on top": spoil("top_logprobs", lambda v: [d and dict.fromkeys(d) for d in v]),
    "above 1 on top": spoil("top_logprobs", lambda v: [d and dict.fromkeys(d, -0.1) for d in v]),
}


@pytest.fixture
def peer():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Peer)
    server.faults, server.bodies, server.lock = [], [], threading.Lock()
    server.under_way = server.most = 0
    server.closing = threading.Event()
    server.law, server.counts, server.noise, server.model = distribution, None, 0.0, "t"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.closing.set()
    server.shutdown()


def config(server, **options):
    port = server.server_address[1]
    return EndpointTeacherConfig(model="t", base_url=f"http://127.0.0.1:{port}/v1", **options)


def ask(server, number=1, **options):
    client = EndpointClient(config(server, **options), "key")
    requests = [Request((("user", f"q{i}"),), f"rendered {i}", i) for i in range(number)]
    return client, client.complete(requests, max_tokens=7, temperature=1.0, top_p=1.0)


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_completions_come_in_order(peer, api):
    client, replies = ask(peer, 5, api=api)
    word = "q{}" if api == "chat" else "rendered {}"
    assert [r.text for r in replies] == ["re: " + word.format(i) for i in range(5)]
    assert all(r.ended for r in replies)
    assert client.used == {"requests": 5, "prompt_tokens": 15, "completion_tokens": 10}
    assert {b["seed"] for b in peer.bodies} == set(range(5))
    assert {b["max_tokens"] for b in peer.bodies} == {7}


@pytest.mark.parametrize(
    "fault",
    [429, 500, 503, "cut", "malformed", "no content", "no choices", "slow", "endless",
     "surrogate", "filtered", "declined", "blocked"],
)  # fmt: skip
def test_faulty_requests_are_retried(peer, fault):
    peer.faults = [fault]
    _, (reply,) = ask(peer, timeout_s=1.0)
    assert reply.text == "re: q0"
    assert len(peer.bodies) == 2


def test_no_reply_is_lost_or_repeated_with_30_percent_failures(peer):
    generator = random.Random(0)
    kinds = [429, 500, "cut", "malformed"]
    peer.faults = [generator.choice(kinds) if generator.random() < 0.3 else None for _ in range(80)]
    client, replies = ask(peer, 60)
    assert [r.text for r in replies] == [f"re: q{i}" for i in range(60)]
    answered = [b for b in peer.bodies if b["seed"] is not None]
    assert len(answered) > 60
    assert client.used["completion_tokens"] == 60 * 2, "tokens are counted once per response"


def test_concurrency_limit(peer):
    ask(peer, 20, concurrency=3)
    assert peer.most <= 3


@pytest.mark.parametrize(("fault", "cause"), [(401, "AuthenticationError"), (400, "BadRequest")])
def test_permanent_errors_are_not_retried(peer, fault, cause):
    peer.faults = [fault] * 5
    with pytest.raises(ActorError, match=f"teacher endpoint 't' at http.*{cause}"):
        ask(peer)
    assert len(peer.bodies) == 1


def test_retries_are_limited(peer):
    peer.faults = ["no content"] * 5
    with pytest.raises(ModelError, match="invalid response: text None"):
        ask(peer, answer_retries=2, on_refusal="fail")
    assert len(peer.bodies) == 3


@pytest.mark.parametrize("fault", ["surrogate", "filtered", "declined", "blocked", "no content"])
def test_unanswered_requests_are_counted_and_skipped(peer, fault):
    peer.faults = [fault] * 3
    client, replies = ask(peer, 4, answer_retries=2, concurrency=1, max_skipped_share=0.5)
    assert [r and r.text for r in replies] == [None, "re: q1", "re: q2", "re: q3"]
    counted = "refused" if fault in ("filtered", "declined", "blocked") else "unreadable"
    assert client.used["skipped"] == 1
    assert client.used[counted] == 3
    peer.faults = [fault] * 3
    with pytest.raises(ModelError, match=r"teacher endpoint 't' at http.*: invalid response: "):
        ask(peer, 4, answer_retries=2, concurrency=1, on_refusal="fail")


def test_the_skipped_share_is_limited(peer):
    peer.faults = ["filtered", None] * 30
    with pytest.raises(ModelError, match=r"max_skipped_share: 11 of 21 requests .*content filter"):
        ask(peer, 60, answer_retries=0, concurrency=1)


def test_a_skipped_completion_is_marked(peer, tiny):
    sampler = ApiSampler(stop_ids=(0,))
    sampler.start(config(peer, answer_retries=0), "key", tiny["student"])
    peer.faults = ["filtered"]
    prompt = Prompt("p", (5, 6), "x", messages=(("user", "x"),))
    drawn = [r for *_, r in sampler.sample([prompt], [3], [2], 9, 1.0, 1.0)]
    assert sorted(len(r.completion_ids) > 0 for r in drawn) == [False, True]
    assert sorted(r.finish_reason for r in drawn) == ["refused", "stop"]


def test_a_skipped_score_is_empty(peer):
    peer.faults = ["NaN"]
    _, scored = score(peer, rollouts(3), answer_retries=0, concurrency=1)
    assert [s.refused for s in scored] == [True, False, False]


def test_large_responses_are_refused(peer, monkeypatch):
    monkeypatch.setattr(endpoint, "LARGEST", 100)
    with pytest.raises(ActorError, match="the response has more than 100 bytes"):
        ask(peer, max_retries=0)


@pytest.mark.parametrize("checked", [False, True])
def test_redirects_are_not_followed(peer, checked):
    """A followed redirect would send the prompts to another address."""
    other = ThreadingHTTPServer(("127.0.0.1", 0), Peer)
    other.bodies, peer.elsewhere = [], other.server_address[1]
    peer.faults = ["elsewhere"]
    with other, pytest.raises(ModelError, match=r"teacher\.base_url: .* redirects to http"):
        if checked:
            port = peer.server_address[1]
            check_endpoint(
                EndpointTeacherConfig(model="t", base_url=f"http://127.0.0.1:{port}/elsewhere")
            )
        ask(peer)
    assert other.bodies == []


def test_the_endpoint_is_checked_before_the_run(peer):
    check_endpoint(config(peer))
    wrong = config(peer).model_copy(update={"model": "other"})
    with pytest.raises(ModelError, match=r"teacher\.model: 'other' is not served at .*'t'"):
        check_endpoint(wrong)


def test_unreachable_endpoint(monkeypatch):
    nowhere = EndpointTeacherConfig(model="t", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ModelError, match=r"teacher\.base_url: .*APIConnectionError"):
        check_endpoint(nowhere)


def test_the_key_comes_from_the_environment(monkeypatch):
    remote = EndpointTeacherConfig(
        model="t", base_url="https://api.example.com/v1", api_key_env="SOME_KEY"
    )
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ModelError, match=r"teacher\.api_key_env: .*SOME_KEY is not set"):
        key_of(remote)
    monkeypatch.setenv("SOME_KEY", "secret")
    assert key_of(remote) == "secret"


@pytest.mark.parametrize("value", ["sk-secret\u2026", "sk-\x07secret"])
def test_invalid_key_is_refused_without_printing_it(monkeypatch, value):
    remote = EndpointTeacherConfig(
        model="t", base_url="https://api.example.com/v1", api_key_env="SOME_KEY"
    )
    monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(ModelError, match="value of SOME_KEY has characters") as caught:
        key_of(remote)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("SOME_KEY", "sk-secret\r\n")
    assert key_of(remote) == "sk-secret"


def test_key_is_masked_in_errors(peer):
    peer.faults = ["echo"]
    with pytest.raises(ActorError, match=r"AuthenticationError: .*\*\*\*") as caught:
        ask(peer)
    assert "key" not in str(caught.value).split("AuthenticationError")[1]


def test_html_page_instead_of_a_model_list(peer):
    port = peer.server_address[1]
    page = EndpointTeacherConfig(model="t", base_url=f"http://127.0.0.1:{port}/page")
    with pytest.raises(ModelError, match=r"teacher\.base_url: .*ends in /v1"):
        check_endpoint(page)


# --- scores


SCORING = {"tokenizer": "any", "precision": "float32"}


def rollouts(number):
    drawn = random.Random(0)
    return [
        Rollout(
            prompt_id=str(i),
            sample_id=f"{i}/0",
            prompt_ids=tuple(drawn.choices(range(1, VOCABULARY), k=1 + i % 3)),
            completion_ids=tuple(drawn.choices(range(VOCABULARY), k=1 + i % 5)),
            rollout_logprobs=None,
            source="student",
            policy_version=0,
            finish_reason="length",
        )
        for i in range(number)
    ]


def score(server, wanted, **options):
    scorer = ApiScorer()
    options = {"scores": "top_k", "top_k": 5, **SCORING, **options}
    scorer.start(config(server, **options), "key", VOCABULARY)
    return scorer, scorer.score(wanted)


def states(rollout):
    """Return [T, V] log-probs of the server's model before each completion token."""
    ids = [*rollout.prompt_ids, *rollout.completion_ids]
    return torch.stack([distribution(ids[:i]) for i in range(len(rollout.prompt_ids), len(ids))])


def expect_exact(wanted, scores):
    assert [s.sample_id for s in scores] == [r.sample_id for r in wanted]
    for rollout, score in zip(wanted, scores, strict=True):
        expected = states(rollout)
        drawn = expected.gather(-1, torch.tensor(rollout.completion_ids)[:, None]).squeeze(-1)
        assert torch.equal(score.logprobs, drawn)
        assert score.logprobs.dtype == torch.float32
        if score.top_ids is not None:
            best = expected.topk(5)
            assert torch.equal(score.top_ids.long(), best.indices)
            assert torch.equal(score.top_logprobs[:, :5], best.values)
            rest = expected.scatter(-1, best.indices, -torch.inf).logsumexp(-1)
            assert torch.allclose(score.top_logprobs[:, 5], rest, atol=1e-5)


@pytest.mark.parametrize("scores", ["logprobs", "top_k"])
def test_scores_match_the_model(peer, scores):
    wanted = rollouts(12)
    scorer, scored = score(peer, wanted, scores=scores)
    expect_exact(wanted, scored)
    assert all((s.top_ids is None) == (scores == "logprobs") for s in scored)
    tokens = sum(len(r.prompt_ids) + len(r.completion_ids) for r in wanted)
    assert scorer.usage() == {"requests": 12, "prompt_tokens": tokens, "completion_tokens": 12}
    assert [b["prompt"] for b in peer.bodies if b["max_tokens"] != 1] == []


@pytest.mark.parametrize("fault", [*SPOIL, "reads less", 429, 500, "cut", "malformed"])
def test_invalid_scores_are_requested_again(peer, fault):
    (wanted,) = rollouts(5)[4:]
    peer.faults = [fault]
    _, scored = score(peer, [wanted])
    expect_exact([wanted], scored)
    assert [b["prompt"] for b in peer.bodies] == [[*wanted.prompt_ids, *wanted.completion_ids]] * 2


@pytest.mark.parametrize("fault", SPOIL)
def test_permanently_invalid_scores_raise(peer, fault):
    peer.faults = [fault] * 2
    with pytest.raises(ModelError, match="invalid response: "):
        score(peer, rollouts(5)[4:], answer_retries=1, on_refusal="fail")
    assert len(peer.bodies) == 2


def test_scores_with_30_percent_failures(peer):
    """Scores are complete and in order, and every text has one valid response."""
    generator = random.Random(1)
    kinds = [429, 500, "cut", "malformed", *SPOIL]
    peer.faults = [generator.choice(kinds) if generator.random() < 0.3 else None for _ in range(90)]
    failing = sum(fault is not None for fault in peer.faults[:60])
    wanted = rollouts(60)
    # Requests are concurrent: any number of the faults can meet one text.
    scorer, scored = score(peer, wanted, answer_retries=len(peer.faults))
    expect_exact(wanted, scored)
    assert len(peer.bodies) >= 60 + failing
    read = sum(f not in (429, 500, "cut", "malformed") for f in peer.faults[: len(peer.bodies)])
    assert scorer.client.used["unreadable"] > 5 < read


def test_tail_probability_is_never_zero(peer):
    peer.law = lambda ids: torch.tensor([100.0, *[0.0] * (VOCABULARY - 1)]).log_softmax(-1)
    _, (scored,) = score(peer, rollouts(1), top_k=1)
    assert scored.top_logprobs[0].tolist() == [0.0, pytest.approx(-23 * math.log(2))]


def test_token_outside_the_students_vocabulary(peer):
    scorer = ApiScorer()
    scorer.start(config(peer, scores="top_k", **SCORING), "key", 20)
    with pytest.raises(ModelError, match=r"returned token \d+ .* student\.model has only 20"):
        scorer.score(rollouts(1))


@pytest.mark.parametrize(
    "fault", [None, "text", "null", "reads less", "filtered", "cut at its end"]
)
def test_scoring_teacher_samples_in_student_tokens(peer, tiny, fault):
    sampler = ApiSampler(stop_ids=(0,))
    options = {"api": "completions", "scores": "logprobs", **SCORING}
    sampler.start(config(peer, **options), "key", tiny["student"])
    peer.faults = [fault]
    ((_, _, scored),) = sampler.sample([Prompt("p", (5, 6), "x")], [3], [1], 9, 1.0, 1.0)
    assert scored.completion_ids == (7, 8, 0)
    laws = [distribution(ids) for ids in ([5, 6], [5, 6, 7], [5, 6, 7, 8])]
    expected = [law[t].item() for law, t in zip(laws, (7, 8, 0), strict=True)]
    assert scored.rollout_logprobs == pytest.approx(expected)
    assert scored.finish_reason == "stop"
    assert peer.bodies[-1]["stop_token_ids"] == [0]
    assert len(peer.bodies) == (1 if fault is None else 2)


# --- the checks before the first step


def check(server, words, longest=40, **options):
    port = server.server_address[1]
    teacher = {"kind": "openai", "model": "t", "base_url": f"http://127.0.0.1:{port}/v1"}
    teacher |= {
        "api": "completions",
        "scores": "logprobs",
        **SCORING,
        "max_retries": 1,
        "answer_retries": 1,
        **options,
    }
    data = {**MINIMAL["data"], "max_prompt_tokens": longest}
    run = {**MINIMAL, "data": data, "teacher": teacher, "sampler": "teacher"}
    run["rollout"] = {"max_tokens": 8}
    whole = Config.model_validate(run)
    check_answers(check_endpoint(whole.teacher), words, VOCABULARY, whole.data, whole.rollout)


TEXT_ONLY = {"scores": "none", "tokenizer": None}


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 3), ({"scores": "top_k"}, 3), ({"api": "chat"}, 6), ({"api": "chat", **TEXT_ONLY}, 3)],
)
def test_valid_endpoint_passes_with_few_requests(peer, tokenizer, options, most):
    peer.counts = lambda text: 12 + len(text) // 3
    check(peer, tokenizer, longest=100, **options)
    assert len(peer.bodies) == most


@pytest.mark.parametrize("api", ["chat", "completions"])
@pytest.mark.parametrize("limit", [0, 30])
def test_text_truncation_is_detected(peer, tokenizer, api, limit):
    peer.counts = lambda text: 12 + min(limit, len(text) // 3)
    with pytest.raises(
        ModelError, match=r"truncates prompts: it counted \d+ tokens in a prompt and \d+"
    ):
        check(peer, tokenizer, longest=200, api=api, **TEXT_ONLY)


def test_token_truncation_is_detected(peer, tokenizer):
    peer.faults = ["reads less"] * 9
    with pytest.raises(
        ModelError, match=r"it read 46 of 48 prompt tokens\. Increase the server's context"
    ):
        check(peer, tokenizer)


def test_unreported_truncation_is_detected(peer, tokenizer):
    peer.law = lambda ids: distribution(ids[-10:])
    with pytest.raises(ModelError, match="truncates prompts: changing the first of 48 tokens"):
        check(peer, tokenizer)


def test_missing_log_probs_are_detected(peer, tokenizer):
    peer.faults = ["no log-probs"] * 9
    with pytest.raises(ModelError, match=r"returns no log-probs.*or set teacher\.scores to none\."):
        check(peer, tokenizer)


def test_tokens_as_text_are_detected(peer, tokenizer):
    peer.faults = ["text"] * 9
    with pytest.raises(ModelError, match=r"returns tokens as text \('a'\), .*as_token_ids"):
        check(peer, tokenizer)


def test_too_few_top_tokens_are_detected(peer, tokenizer):
    peer.faults = ["few on top"] * 9
    with pytest.raises(
        ModelError, match=r"returns 1 tokens per state, .*teacher\.top_k = 20. Decrease"
    ):
        check(peer, tokenizer, scores="top_k")


@pytest.mark.parametrize(("precision", "noise"), [("float32", 0.01), ("bfloat16", 0.5)])
def test_nondeterministic_scores_are_detected(peer, tokenizer, precision, noise):
    peer.noise = noise
    with pytest.raises(ModelError, match=r"is not deterministic: two scores of one text differ by"):
        check(peer, tokenizer, precision=precision)
    peer.noise = noise / 50
    check(peer, tokenizer, precision=precision)


def test_response_of_another_model_is_detected(peer, tokenizer):
    peer.model = "other"
    with pytest.raises(
        ModelError, match=r"teacher\.model: 't' was requested, but .* serves 'other'"
    ):
        check(peer, tokenizer)
    peer.model = "owner/t"
    check(peer, tokenizer)


def test_uniform_distribution_is_detected(peer, tokenizer):
    # Log-probs depend on every token, but the distribution is almost uniform.
    peer.law = lambda ids: (0.01 * distribution(ids)).log_softmax(-1)
    with pytest.raises(ModelError, match=r"within 0\.1 of -ln 320 = -5\.768, as of a model"):
        check(peer, tokenizer)


def law_of(model):
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model)

    def law(ids):
        with torch.inference_mode():
            return loaded(torch.tensor([ids])).logits[0, -1].log_softmax(-1)

    return law


def test_served_model_is_compared_with_the_checkpoint(peer, tokenizer, tiny):
    peer.law = law_of(tiny["teacher"])
    check(peer, tokenizer, checkpoint=tiny["teacher"])
    with pytest.raises(
        ModelError, match=r"is not '.*student': the log-probs of a short text differ by up to \d"
    ):
        check(peer, tokenizer, checkpoint=tiny["student"])
