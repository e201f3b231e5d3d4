"""Messages about the Ray head, from servers that answer like one."""

from __future__ import annotations

import re
import socket
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread
from types import SimpleNamespace

import grpc
import pytest

from actors import build
from seqkd.errors import ResourceError


@contextmanager
def head(answer):
    """Serve Ray's health check on loopback. ``answer`` handles a call."""
    method = grpc.unary_unary_rpc_method_handler(answer)
    service = grpc.method_handlers_generic_handler(
        "ray.rpc.NodeInfoGcsService", {"CheckAlive": method} if answer else {}
    )
    server = grpc.server(ThreadPoolExecutor(1), handlers=[service])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None)


def refusing(request, context):
    context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken: missing or incorrect")


def reach(address):
    build.reach(SimpleNamespace(cluster=address))


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_USE_TLS"):
        monkeypatch.delenv(name, raising=False)


def test_a_head_that_answers_is_reached():
    with head(lambda request, context: b"") as address:
        reach(address)
    with head(None) as address:  # Ray Client's server has other methods
        reach(f"ray://{address}")
    reach(None)
    reach("auto")


@pytest.mark.parametrize(
    ("mode", "state"), [(None, "sends none (RAY_AUTH_MODE is not set)"), ("token", "sent a wrong")]
)
def test_a_head_that_wants_a_token_is_not_called_missing(monkeypatch, mode, state):
    if mode:
        monkeypatch.setenv("RAY_AUTH_MODE", mode)
        monkeypatch.setattr(
            "ray._private.authentication.authentication_utils.is_token_auth_enabled", lambda: False
        )
    with head(refusing) as address, pytest.raises(ResourceError) as caught:
        reach(address)
    text = str(caught.value)
    assert text.startswith(f"cluster: the Ray head at '{address}' requires an authentication token")
    assert state in text and "Set RAY_AUTH_MODE=token, and store" in text
    assert "no Ray cluster" not in text


def test_an_address_without_a_head_is_reported(monkeypatch):
    """A web server, such as the dashboard, and a closed port. The variable is named if it is the
    source of the address."""
    server = HTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler)
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        with pytest.raises(ResourceError, match=r"^cluster: no Ray cluster .* not the dashboard's"):
            reach(f"127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        monkeypatch.setenv("RAY_ADDRESS", address)
        start = re.escape(f"RAY_ADDRESS: no Ray cluster answers at '{address}': ")
        with pytest.raises(ResourceError, match=f"^{start}.*refused"):
            reach(None)
