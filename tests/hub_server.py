"""A Hugging Face hub on this machine: the part of its API that huggingface-hub asks, and the ways in which it fails."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


@dataclass
class FakeRepo:
    """A repository with one commit. answer: a status, and headers, in place of every answer about it."""

    files: dict[str, bytes]
    commit: str = "c" * 40
    license: str = "mit"
    answer: tuple[int, Mapping[str, str]] | None = None
    token: str | None = None
    siblings: list[dict[str, object]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.siblings = self.siblings or [
            {
                "rfilename": name,
                "size": len(content),
                "blobId": hashlib.sha1(name.encode()).hexdigest(),
                "lfs": {"sha256": sha256(content), "size": len(content), "pointerSize": 130},
            }
            for name, content in self.files.items()
        ]


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


class HubServer:
    """The hub at `url`. The content of files is served by another host, to which it redirects, as the hub's is.

    log: (method, path, Range header) of each request. cuts: bytes after which each next download breaks off.
    lies: content by sha256 that is served in its place. ranges: whether parts of a file can be asked for.
    stall: downloads stop after the first of `cuts` and wait for it. tokens_seen: Authorization headers by host.
    """

    def __init__(self) -> None:
        self.repos: dict[str, FakeRepo] = {}
        self.log: list[tuple[str, str, str | None]] = []
        self.cuts: list[int] = []
        self.lies: dict[str, bytes] = {}
        self.ranges = True
        self.stall: threading.Event | None = None
        self.stalled = threading.Event()
        self.tokens_seen: dict[str, set[str | None]] = {}
        self.nonsense: bytes | None = None
        hub = self

        class Handler(_Handler):
            server_of = hub

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        self._thread.start()
        port = self._http.server_address[1]
        self.url, self.cdn = f"http://127.0.0.1:{port}", f"http://localhost:{port}"

    @property
    def downloads(self) -> list[str | None]:
        """The Range of each request for content."""
        return [part for method, path, part in self.log if method == "GET" and path.startswith("/cdn/")]

    def close(self) -> None:
        if self.stall:
            self.stall.set()
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()


@contextmanager
def hub_server() -> Iterator[HubServer]:
    hub = HubServer()
    try:
        yield hub
    finally:
        hub.close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_of: HubServer

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self) -> None:
        hub, path = self.server_of, unquote(urlsplit(self.path).path)
        hub.log.append((self.command, path, self.headers.get("Range")))
        host = str(self.headers.get("Host")).split(":")[0]
        token = self.headers.get("Authorization")
        hub.tokens_seen.setdefault(host, set()).add(token)
        if path.startswith("/cdn/"):
            return self._content(path.removeprefix("/cdn/"))
        parts = path.removeprefix("/api/models").strip("/").split("/")
        repo = hub.repos.get("/".join(parts[:2]))
        if repo is None:
            # What the hub says of a repository that does not exist, or that is private.
            return self._end(401, {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Invalid username or password."})
        if repo.answer:
            return self._end(*repo.answer)
        if repo.token and token != f"Bearer {repo.token}":
            return self._end(401 if token is None else 403, {"X-Error-Code": "GatedRepo"})
        if path.startswith("/api/models/"):
            return self._listing(repo, parts)
        return self._resolve(repo, parts)

    def _listing(self, repo: FakeRepo, parts: list[str]) -> None:
        revision = parts[3] if parts[2:3] == ["revision"] else "main"
        if revision not in ("main", repo.commit):
            return self._end(404, {"X-Error-Code": "RevisionNotFound"})
        name = "/".join(parts[:2])
        listing = {"id": name, "modelId": name, "sha": repo.commit, "private": False, "disabled": False, "downloads": 0}
        listing |= {"likes": 0, "tags": [], "cardData": {"license": repo.license}, "siblings": repo.siblings}
        body = self.server_of.nonsense or json.dumps(listing).encode()
        return self._end(200, {"Content-Type": "application/json"}, body)

    def _resolve(self, repo: FakeRepo, parts: list[str]) -> None:
        name = "/".join(parts[4:])
        if name not in repo.files:
            return self._end(404, {"X-Error-Code": "EntryNotFound"})
        content = repo.files[name]
        sibling = next(sibling for sibling in repo.siblings if sibling["rfilename"] == name)
        headers = {
            "X-Repo-Commit": repo.commit,
            "X-Linked-Etag": f'"{sha256(content) if "lfs" in sibling else sibling["blobId"]}"',
            "X-Linked-Size": str(len(content)),
            "Location": f"{self.server_of.cdn}/cdn/{sha256(content)}",
        }
        return self._end(302, headers)

    def _content(self, digest: str) -> None:
        hub = self.server_of
        contents = {sha256(content): content for repo in hub.repos.values() for content in repo.files.values()}
        content = hub.lies.get(digest, contents[digest])
        start = 0
        if hub.ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").split("-")[0])
        headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"} if start else {}
        cut = hub.cuts.pop(0) if hub.cuts else None
        self._end(206 if start else 200, headers, content[start:], cut)

    def _end(self, status: int, headers: Mapping[str, str], body: bytes = b"", cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            self.wfile.flush()
            self.server_of.stalled.set()
            if self.server_of.stall:
                self.server_of.stall.wait(60)
            self.close_connection = True
