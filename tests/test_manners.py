"""The server towards clients that are right and unusual: names, keys, targets, and connections that are half closed."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
from click.testing import CliRunner
from starlette.types import Receive, Scope, Send
from uvicorn.server import ServerState

from edge_dlf import FusedLlama, InvalidParameterError
from edge_dlf.cli import main
from edge_dlf.server import Address, Rules, running
from edge_dlf.server.app import _Events
from edge_dlf.server.decoding import Ticket

from .http_server import Served, serving

CHAT = "/v1/chat/completions"
BODY = json.dumps({"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}).encode()
LONG = {"messages": [{"role": "user", "content": "Hello"}], "logit_bias": {"305": -100, "303": -100}}


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Served]:
    with FusedLlama.from_family(tiny, n_ctx=2048, n_threads=1, n_parallel=4) as llm, serving(llm) as server:
        yield server


def talk(server: Served, sent: bytes) -> bytes:
    """What a client gets that sends this, ends its own direction, and reads to the end, as `nc -N` does."""
    with socket.create_connection((server.base_url.host, server.base_url.port), timeout=30) as client:
        client.sendall(sent)
        client.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: client.recv(65536), b""))


def post(body: bytes, version: str = "1.1", target: str = CHAT, host: str = "localhost") -> bytes:
    return f"POST {target} HTTP/{version}\r\nHost: {host}\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def status_of(response: bytes) -> int:
    """The status of a response, after any that only say that one will come."""
    statuses = [int(line.split()[1]) for line in response.splitlines() if line.startswith(b"HTTP/1.1 ")]
    assert set(statuses[:-1]) <= {102}
    return statuses[-1]


@pytest.mark.parametrize("version", ["1.0", "1.1"])
def test_a_client_that_has_ended_its_own_direction_is_answered(server: Served, version: str) -> None:
    health = talk(server, f"GET /health HTTP/{version}\r\nHost: localhost\r\n\r\n".encode())
    assert health.endswith(b'{"status":"ok"}')
    answer = talk(server, post(BODY, version))
    assert status_of(answer) == 200
    assert json.loads(answer.rpartition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 3


def test_such_a_client_gets_its_stream_to_the_end(server: Served) -> None:
    body = json.dumps({**json.loads(BODY), "max_tokens": 40, "stream": True}).encode()
    assert b"data: [DONE]\n\n" in talk(server, post(body))


def test_such_a_client_gets_all_that_it_has_asked_for(server: Served) -> None:
    both = talk(server, post(BODY) + b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert both.count(b"HTTP/1.1 200") == 2
    assert b'{"status":"ok"}' in both


@pytest.mark.parametrize("sent", [b"", b"GET /health HTT", post(BODY)[:-5]])
def test_a_client_that_ends_amid_its_request_is_left(server: Served, sent: bytes) -> None:
    assert talk(server, sent) == b""


def test_what_is_no_http_after_a_refusal_ends_the_connection_and_logs_no_traceback(
    server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_connection((server.base_url.host, server.base_url.port), timeout=30) as client:
        client.sendall(b"POST /nope HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n")
        assert client.recv(12) == b"HTTP/1.1 404"
        client.sendall(b"no number\r\n")
        while client.recv(65536):
            pass
    server.get("/health")
    assert not [record for record in caplog.records if record.exc_info]


def test_a_client_that_offers_another_protocol_is_answered_in_this_one(
    server: Served, caplog: pytest.LogCaptureFixture
) -> None:
    """As Java's does with every request."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQCAAAA\r\n\r\n"
    health = talk(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n" + upgrade)
    assert health.endswith(b'{"status":"ok"}')
    assert not caplog.records


def test_a_client_that_ends_its_own_direction_and_leaves_later_takes_its_answer_along(server: Served) -> None:
    with socket.create_connection((server.base_url.host, server.base_url.port), timeout=30) as client:
        client.sendall(post(json.dumps(LONG).encode()))
        client.shutdown(socket.SHUT_WR)
        while not server.llm.driver.n_active:
            server.get("/health")
    for _ in range(5000):
        if not server.llm.driver.n_active:
            return
        server.get("/health")
    raise AssertionError("the answer is still decoded")


@pytest.mark.parametrize("sent", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n", b"\r\n", b"G"])
@pytest.mark.parametrize("before", [b"", b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"])
def test_a_client_that_sends_no_whole_head_is_left(
    server: Served, monkeypatch: pytest.MonkeyPatch, before: bytes, sent: bytes
) -> None:
    """It would keep one of the server's descriptors for ever."""
    monkeypatch.setattr(running, "_HEAD_S", 0.05)
    with socket.create_connection((server.base_url.host, server.base_url.port), timeout=30) as client:
        client.sendall(before + sent)
        with suppress(ConnectionResetError):
            while client.recv(65536):
                pass


@pytest.mark.parametrize("ends", ["in time", "with the server"])
def test_a_client_that_takes_nothing_of_its_answer_is_left(monkeypatch: pytest.MonkeyPatch, ends: str) -> None:
    """It would keep the places of its answers, and the server that is to end."""
    monkeypatch.setattr(running, *(("_TAKE_S", 0.05) if ends == "in time" else ("GRACE_S", -0.95)))
    closed = asyncio.Event()

    class Places:
        close = staticmethod(closed.set)

    async def endless() -> AsyncIterator[bytes]:
        while True:
            yield b"x" * 65536
            await asyncio.sleep(0)

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        await _Events(endless(), cast("Ticket", Places()))(scope, receive, send)

    async def serve() -> None:
        state = ServerState()
        config = running.config_of(app)
        with (
            socket.create_server(("127.0.0.1", 0)) as listener,
            socket.create_connection(listener.getsockname()) as client,
        ):
            client.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n")
            loop, accepted = asyncio.get_running_loop(), listener.accept()[0]
            made: Any = partial(running._Connection, config, state, {})
            _, connection = await loop.connect_accepted_socket(made, accepted)
            while connection.cycle is None:
                await asyncio.sleep(0)
            connection._require_head(None)  # that of this answer has come
            assert not connection.transport.is_closing()
            if ends == "with the server":
                connection.shutdown()
            await closed.wait()
            assert not state.connections

    asyncio.run(asyncio.wait_for(serve(), 30))


@pytest.mark.parametrize("origin", ["null", "http://[::1", "http://localhost.evil", "\u00fc", "http://", "x" * 10000])
def test_an_origin_that_is_none_of_this_server_is_refused(server: Served, origin: str) -> None:
    response = server.get("/health", headers={"Origin": origin.encode()})
    assert (response.status_code, response.json()["error"]["code"]) == (403, "foreign_origin")


@pytest.mark.parametrize(
    ("target", "host", "status"),
    [
        ("http://localhost:8080/health", "localhost", 200),
        ("HTTP://127.0.0.1/health?a=b", "anything.example", 200),
        ("http://[::1]:80/v1/models/tiny:large", "localhost", 200),
        ("http://localhost/v1/models/tiny%3Alarge", "localhost", 200),
        ("http://localhost", "localhost", 200),
        ("http://evil.example/health", "localhost", 403),
        ("http://user@localhost/health", "localhost", 403),
        ("http://localhost/http://localhost/health", "localhost", 404),
        ("ftp://localhost/health", "localhost", 404),
        ("*", "localhost", 404),
    ],
)
def test_a_target_may_be_a_whole_url(server: Served, target: str, host: str, status: int) -> None:
    assert status_of(talk(server, f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode())) == status


def test_a_whole_url_is_answered_like_its_path(server: Served) -> None:
    assert status_of(talk(server, post(BODY, target=f"http://localhost:9{CHAT}"))) == 200


def test_a_program_that_names_no_host_is_no_page_of_another_site(server: Served) -> None:
    assert talk(server, b"GET /health HTTP/1.0\r\n\r\n").endswith(b'{"status":"ok"}')


@pytest.mark.parametrize(
    ("method", "path", "said"),
    [
        ("POST", "/chat/completions", "there is /v1/chat/completions: clients need a base URL that ends in /v1"),
        ("POST", "/v1/v1/chat/completions", "there is /v1/chat/completions: clients"),
        ("POST", "/v1/completions/", "there is /v1/completions: clients"),
        ("GET", "/models", "there is /v1/models: clients"),
        ("POST", "/api/generate", "there are /v1/chat/completions, /v1/completions, /v1/models"),
        ("POST", "/v1/embeddings", "there is no /v1/embeddings; there are /v1/chat/completions"),
        ("GET", "/v1/chat/completions", "/v1/chat/completions is not for GET"),
        ("GET", "/v1/models/gpt-5", "the model 'gpt-5' does not exist"),
    ],
)
def test_what_is_not_there_is_told_with_what_is(server: Served, method: str, path: str, said: str) -> None:
    response = server.request(method, path, json={})
    assert response.status_code in (404, 405)
    assert said in response.json()["error"]["message"]


@pytest.mark.parametrize("key", ["schlüssel", "sk-abc ", " sk-abc", "sk-abc\n", "a\tb", "", " ", "\u200bkey", "a\x7f"])
def test_a_key_that_no_client_could_send_is_refused_at_the_start(tiny: Path, key: str) -> None:
    result = CliRunner(env={"EDGE_DLF_API_KEY": key} if key else {}).invoke(
        main, ["serve", str(tiny), "--port", "0", *([] if key else ["--api-key", ""])]
    )
    assert result.exit_code == 2
    assert result.stderr.startswith("edge-dlf: no client could send this API key: ")
    assert len(result.stderr.splitlines()) == 1
    assert not key.strip() or key not in result.stderr
    with pytest.raises(InvalidParameterError, match="API key"):
        Rules(api_key=key)


@pytest.mark.parametrize("key", ["sk-abc", "a b", "~!@#$%^&*()", "x" * 500])
def test_a_key_that_a_client_can_send_opens(server: Served, key: str) -> None:
    with serving(server.llm, Rules(api_key=key)) as client:
        assert client.get("/v1/models").status_code == 200
        assert client.get("/v1/models", headers={"Authorization": f"bearer  {key}"}).status_code == 200
        assert client.get("/v1/models", headers={"Authorization": f"Bearer x{key}"}).status_code == 401


@pytest.mark.parametrize("host", ["127.0.0.2", "127.0.1.1", "localhost", "127.1"])
def test_a_server_answers_to_its_own_address(
    server: Served, tiny: Path, monkeypatch: pytest.MonkeyPatch, host: str
) -> None:
    found: list[Rules] = []
    urls: list[str] = []

    def run(_: object, address: Address, rules: Rules, ready: object) -> None:
        found.append(rules)
        urls.append(address.url)

    monkeypatch.setattr("edge_dlf.server.run", run)
    result = CliRunner().invoke(main, ["serve", str(tiny), "--host", host, "--port", "0", "--ctx-size", "64"])
    assert result.exit_code == 0, result.stderr
    with serving(server.llm, found[0]) as client:
        for name in (urls[0].removeprefix("http://"), host.upper(), "localhost"):
            assert client.get("/health", headers={"Host": name}).status_code == 200
        assert client.get("/health", headers={"Host": "rebound.example"}).status_code == 403
