"""A model hub on the loopback interface. It serves a few small files with the HTTP API of the real
hub, so that the loading code of transformers, huggingface_hub and datasets runs unchanged."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
Repos = dict[str, dict[str, bytes]]
"""Repositories by "models/owner/name" or "datasets/owner/name": the content of files by path."""


class Hub(BaseHTTPRequestHandler):
    """The part of the API that is needed for reading. All other requests fail with 404."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_HEAD(self):
        self.answer()

    def do_GET(self):
        self.answer()

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        request = json.loads(body) if body.startswith("{") else parse_qs(body)
        repo, rest = self.repo(urlsplit(self.path).path.removeprefix("/api/"))
        if repo is None or not rest.startswith("paths-info/"):
            return self.missing("RepoNotFound")
        paths = request.get("paths", [])
        return self.send_json([e for p in paths for e in entries(repo, "") if e["path"] == p])

    def answer(self):
        self.server.asked.append(f"{self.command} {self.path}")
        path = unquote(urlsplit(self.path).path)
        api = path.startswith("/api/")
        kind = "" if path.startswith("/datasets/") or api else "models/"
        repo, rest = self.repo(kind + path.removeprefix("/api/").lstrip("/"))
        if repo is None:
            return self.missing("RepoNotFound")
        verb, _, name = rest.partition("/")
        name = name.partition("/")[2]  # after the revision
        if verb == "resolve":
            return self.send_file(repo[name]) if name in repo else self.missing("EntryNotFound")
        if api and verb in ("", "revision"):
            siblings = [{"rfilename": file} for file in repo]
            return self.send_json({"id": self.name, "sha": COMMIT, "siblings": siblings})
        if api and verb == "tree":
            listed = entries(repo, name, "recursive=true" in self.path.lower())
            return self.send_json(listed) if listed else self.missing("EntryNotFound")
        return self.missing("EntryNotFound")

    def repo(self, path: str):
        kind, owner, name, *rest = [*path.split("/"), "", ""]
        self.name = f"{owner}/{name}"
        return self.server.repos.get(f"{kind}/{self.name}"), "/".join(rest).strip("/")

    def missing(self, code: str):
        self.send_json({"error": code}, 404, {"X-Error-Code": code})

    def send_json(self, value, status: int = 200, headers=None):
        headers = {"Content-Type": "application/json"} | (headers or {})
        self.send(json.dumps(value).encode(), status, headers)

    def send_file(self, content: bytes):
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": COMMIT,
            "Accept-Ranges": "bytes",
        }
        span = self.headers.get("Range", "").removeprefix("bytes=")
        if not span or self.command == "HEAD":
            return self.send(content, 200, headers)
        first, _, last = span.partition("-")
        begin, end = int(first), min(int(last or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {begin}-{end}/{len(content)}"
        return self.send(content[begin : end + 1], 206, headers)

    def send(self, content: bytes, status: int, headers):
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def entries(repo: dict[str, bytes], folder: str, recursive: bool = True) -> list[dict[str, object]]:
    """List the files below ``folder`` in the hub's format. Unless ``recursive``, list only the
    files and folders that are directly in it."""
    prefix = f"{folder}/" if folder else ""
    listed: dict[str, dict[str, object]] = {}
    for path, content in repo.items():
        rest = path.removeprefix(prefix)
        if not path.startswith(prefix):
            continue
        oid = hashlib.sha1(content).hexdigest()
        if "/" in rest and not recursive:
            path = prefix + rest.partition("/")[0]
            listed[path] = {"type": "directory", "path": path, "size": 0, "oid": oid}
        else:
            listed[path] = {"type": "file", "path": path, "size": len(content), "oid": oid}
    return list(listed.values())


@contextmanager
def serving(repos: Repos) -> Iterator[ThreadingHTTPServer]:
    """Serve a hub on a free port of the loopback interface. Its attribute ``asked`` lists all
    requests."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos, server.asked = repos, []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
