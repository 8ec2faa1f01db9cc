"""A Hugging Face hub on 127.0.0.1 with one model: its revisions, its files, and the token that opens it."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

REPOSITORY = "painter/tiny"
COMMITS = {"main": "a" * 40, "v1": "b" * 40}


class FakeHub(ThreadingHTTPServer):
    """Revision `main` holds the folder's files; `v1` also a file `version.json`.

    `token`: requests without it are answered as the hub answers for a private model; None: the model is public.
    """

    daemon_threads = True

    def __init__(self, folder: Path, token: str | None = None) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.token = token
        self.requests: list[str] = []
        """Method and path of each request."""
        self.num_bytes: dict[str, int] = {}
        """Bytes sent of each file."""
        files = {str(f.relative_to(folder)): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
        self.files = {COMMITS["main"]: files, COMMITS["v1"]: {**files, "version.json": b'"v1"'}}

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        api, resolve = f"/api/models/{REPOSITORY}/", f"/{REPOSITORY}/resolve/"
        wanted = f"Bearer {self.server.token}"
        known = path.startswith((api, resolve))
        if not known or (self.server.token is not None and self.headers["authorization"] != wanted):
            self._error(401, "RepoNotFound")
        elif path.startswith(api):
            self._answer_api(*path.removeprefix(api).split("/", 1))
        else:
            self._answer_file(*path.removeprefix(resolve).split("/", 1))

    def _answer_api(self, kind: str, revision: str) -> None:
        commit = COMMITS.get(revision, revision)
        if commit not in self.server.files:
            self._error(404, "RevisionNotFound")
        elif kind == "revision":
            self._send(json.dumps({"id": REPOSITORY, "sha": commit, "siblings": []}).encode())
        else:
            files = self.server.files[commit]
            tree = [{"type": "file", "path": p, "size": len(d), "oid": _etag(d)} for p, d in files.items()]
            self._send(json.dumps(tree).encode())

    def _answer_file(self, revision: str, name: str) -> None:
        commit = COMMITS.get(revision, revision)
        data = self.server.files[commit].get(name)
        if data is None:
            self._error(404, "EntryNotFound")
            return
        if self.command == "GET":
            self.server.num_bytes[name] = self.server.num_bytes.get(name, 0) + len(data)
        self._send(data, {"X-Repo-Commit": commit, "ETag": f'"{_etag(data)}"'})

    def _send(self, data: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    def _error(self, status: int, code: str) -> None:
        self._send(b"{}", {"X-Error-Code": code, "X-Error-Message": code}, status)

    def log_message(self, format: str, *args: object) -> None:
        """Log nothing: the tests look at `requests`."""


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def fake_hub(folder: Path, token: str | None = None) -> Iterator[FakeHub]:
    """The hub while it serves `folder`."""
    with FakeHub(folder, token) as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()
