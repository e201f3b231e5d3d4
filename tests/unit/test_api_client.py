"""The client of a teacher's endpoint against a peer that misbehaves."""

from __future__ import annotations

import json
import random
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from seqkd.api_client import ApiClient, Request, check_endpoint, key_of
from seqkd.config_roles import ApiTeacher
from seqkd.errors import ActorError, ModelError


class Peer(BaseHTTPRequestHandler):
    """Does what ``server.faults`` says, one fault a request, then answers with the prompt."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
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
        if fault == "slow":
            threading.Event().wait(3)
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
        usage = {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}
        answer = {"id": "x", "object": "o", "created": 0, "model": "t", "choices": [choice]}
        return self.reply(200, {**answer, "usage": usage})

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


@pytest.fixture
def peer():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Peer)
    server.faults, server.bodies, server.lock = [], [], threading.Lock()
    server.under_way = server.most = 0
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def config(server, **options):
    port = server.server_address[1]
    return ApiTeacher(model="t", base_url=f"http://127.0.0.1:{port}/v1", **options)


def ask(server, number=1, **options):
    client = ApiClient(config(server, **options), "key")
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
    "fault", [429, 500, 503, "cut", "malformed", "no content", "no choices", "slow"]
)
def test_a_fault_is_asked_again(peer, fault):
    peer.faults = [fault]
    _, (reply,) = ask(peer, timeout_s=1.0)
    assert reply.text == "re: q0"
    assert len(peer.bodies) == 2


def test_three_in_ten_failing_loses_and_repeats_nothing(peer):
    generator = random.Random(0)
    kinds = [429, 500, "cut", "malformed"]
    peer.faults = [generator.choice(kinds) if generator.random() < 0.3 else None for _ in range(80)]
    client, replies = ask(peer, 60)
    assert [r.text for r in replies] == [f"re: q{i}" for i in range(60)]
    answered = [b for b in peer.bodies if b["seed"] is not None]
    assert len(answered) > 60
    assert client.used["completion_tokens"] == 60 * 2, "every answer is paid for once"


def test_no_more_requests_at_once_than_allowed(peer):
    ask(peer, 20, concurrency=3)
    assert peer.most <= 3


@pytest.mark.parametrize(("fault", "cause"), [(401, "AuthenticationError"), (400, "BadRequest")])
def test_what_cannot_succeed_is_not_repeated(peer, fault, cause):
    peer.faults = [fault] * 5
    with pytest.raises(ActorError, match=f"teacher endpoint 't' at http.*{cause}"):
        ask(peer)
    assert len(peer.bodies) == 1


def test_retries_end(peer):
    peer.faults = ["no content"] * 5
    with pytest.raises(ActorError, match="its answers cannot be read: ValueError: text None"):
        ask(peer, max_retries=2)
    assert len(peer.bodies) == 3


def test_the_endpoint_is_checked_before_the_run(peer):
    check_endpoint(config(peer))
    wrong = config(peer).model_copy(update={"model": "other"})
    with pytest.raises(ModelError, match=r"teacher\.model: 'other' is not served at .*'t'"):
        check_endpoint(wrong)


def test_nothing_listens(monkeypatch):
    nowhere = ApiTeacher(model="t", base_url="http://127.0.0.1:9/v1")
    with pytest.raises(ModelError, match=r"teacher\.base_url: .*APIConnectionError"):
        check_endpoint(nowhere)


def test_the_key_comes_from_the_environment(monkeypatch):
    remote = ApiTeacher(model="t", base_url="https://api.example.com/v1", key_env="SOME_KEY")
    monkeypatch.delenv("SOME_KEY", raising=False)
    with pytest.raises(ModelError, match=r"teacher\.key_env: .*SOME_KEY is not set"):
        key_of(remote)
    monkeypatch.setenv("SOME_KEY", "secret")
    assert key_of(remote) == "secret"


@pytest.mark.parametrize("value", ["sk-secret\u2026", "sk-\x07secret"])
def test_what_is_no_key_is_refused_without_being_shown(monkeypatch, value):
    remote = ApiTeacher(model="t", base_url="https://api.example.com/v1", key_env="SOME_KEY")
    monkeypatch.setenv("SOME_KEY", value)
    with pytest.raises(ModelError, match="SOME_KEY holds is no key") as caught:
        key_of(remote)
    assert "secret" not in str(caught.value)
    monkeypatch.setenv("SOME_KEY", "sk-secret\r\n")
    assert key_of(remote) == "sk-secret"


def test_a_key_that_an_endpoint_repeats_is_not_shown(peer):
    peer.faults = ["echo"]
    with pytest.raises(ActorError, match=r"AuthenticationError: .*\*\*\*") as caught:
        ask(peer)
    assert "key" not in str(caught.value).split("AuthenticationError")[1]


def test_a_page_in_place_of_a_model_list(peer):
    port = peer.server_address[1]
    page = ApiTeacher(model="t", base_url=f"http://127.0.0.1:{port}/page")
    with pytest.raises(ModelError, match=r"teacher\.base_url: .*ends in /v1"):
        check_endpoint(page)
