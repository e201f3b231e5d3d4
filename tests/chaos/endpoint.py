"""Endpoint whose completions depend only on the prompt and the seed, with faults on demand."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TIMEOUT_S = 3.0
FAULTS = {
    "refused": 3, "not Unicode": 3, "slow": 1, "HTTP 500": 3, "no answer": 3,
}  # fmt: skip
"""Faults, with the number of requests in a row that they affect. All are repaired by retries."""


class Server(ThreadingHTTPServer):
    """The endpoint."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.lock, self.broken = threading.Lock(), []
        self.closing = threading.Event()

    def break_next(self, fault: str) -> None:
        """Apply a fault to the next requests."""
        with self.lock:
            self.broken += [fault] * FAULTS[fault]


class Handler(BaseHTTPRequestHandler):
    """Answers of the endpoint."""

    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        """List the served model."""
        self.reply({"object": "list", "data": [{"id": "words", "object": "model"}]})

    def do_POST(self) -> None:
        """Complete a chat."""
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            fault = self.server.broken.pop(0) if self.server.broken else ""
        if fault == "HTTP 500":
            return self.reply({"error": {"message": "try again"}}, 500)
        if fault == "no answer":
            self.close_connection = True
            return None
        if fault == "slow":
            self.server.closing.wait(2 * TIMEOUT_S)
        text = body["messages"][-1]["content"]
        drawn = random.Random(f"{text} {body['seed']}")
        words = " ".join(drawn.choices(("yes", "no", "maybe", "often", "never"), k=5))
        message = {"role": "assistant", "content": words}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        if fault == "refused":
            choice["finish_reason"] = "content_filter"
        if fault == "not Unicode":
            message["content"] = "\ud800"
        read = 10 + len(text)
        usage = {"prompt_tokens": read, "completion_tokens": 5, "total_tokens": read + 5}
        return self.reply({"id": "x", "model": "words", "choices": [choice], "usage": usage})

    def reply(self, value: object, status: int = 200) -> None:
        """Send a response."""
        data = json.dumps(value).encode()
        with suppress(OSError):  # the client may not wait for a slow response
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.send_header("retry-after-ms", "20")
            self.end_headers()
            self.wfile.write(data)


@contextmanager
def serve() -> Iterator[Server]:
    """Run the endpoint on a free port of loopback."""
    server = Server()
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()


def overrides(server: Server) -> list[str]:
    """Return the overrides for a run that is taught by the endpoint."""
    url = f"http://127.0.0.1:{server.server_port}/v1"
    return [
        f"teacher={{kind: openai, model: words, base_url: '{url}', timeout_s: {TIMEOUT_S:g}}}",
        "sampler=teacher",
        "objective={kind: sequence_forward_kl}",
    ]
