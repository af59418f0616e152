"""The address of the server, and the server that runs until a signal ends it."""

from __future__ import annotations

import asyncio
import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import HANDLED_SIGNALS

from ..errors import EdgeDLFError, InvalidParameterError
from .app import Rules, make_app
from .decoding import DecodingThread

if TYPE_CHECKING:
    from ..api import FusedLlama

GRACE_S = 3.0
"""Seconds that answers may take after the first signal."""
_PROBE_S = 0.5
"""Seconds until the first look whether a client is still there, and until the second; then the pause doubles."""
_HEAD_S = 30.0
"""Seconds that a client may take to send the head of a request."""
_TAKE_S = 60.0
"""Seconds that a client may leave untaken what is sent to it."""


@dataclass(frozen=True)
class Address:
    """A bound address. No other process can take it while models are loaded."""

    socket: socket.socket
    is_local: bool

    @classmethod
    def bind(cls, host: str, port: int) -> Address:
        """Bind a TCP socket; port 0 takes a free one. Raises InvalidParameterError or EdgeDLFError."""
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        except (OSError, UnicodeError, OverflowError) as error:
            raise InvalidParameterError(f"{host}: no address of this machine ({error})") from None
        family, kind, protocol, _, address = found[0]
        bound = socket.socket(family, kind, protocol)
        try:
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            bound.close()
            reason = (error.strerror or str(error)).lower()
            raise EdgeDLFError(f"cannot listen at {host}:{port}: {reason}") from None
        return cls(bound, ipaddress.ip_address(str(address[0]).partition("%")[0]).is_loopback)

    @property
    def host(self) -> str:
        """Number of the address, as a URL has it."""
        host = self.socket.getsockname()[0]
        return f"[{host}]" if ":" in host else host

    @property
    def url(self) -> str:
        """Address of the server for a browser on this machine."""
        host, port = self.socket.getsockname()[:2]
        is_any = ipaddress.ip_address(host.partition("%")[0]).is_unspecified
        return f"http://{'localhost' if is_any else self.host}:{port}"


class _Connection(H11Protocol):
    """HTTP connection that also answers a client that has sent all and ended its own direction, as `nc -N` does.

    To a server a client that has left looks the same, until something is sent: its system refuses that.
    One that sends no head of a request in time, or takes nothing of its answer, is left: it would keep a descriptor,
    or the places of its answers, from others.
    """

    _is_half_closed = False
    _head_timer: asyncio.TimerHandle | None = None
    _taking_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in filter(None, (self._head_timer, self._taking_timer)):
            timer.cancel()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._taking_timer = self.loop.call_later(_TAKE_S, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._taking_timer:
            self._taking_timer.cancel()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is no HTTP. A client that has had a response, or a part of one, is left."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.close()

    def _unsupported_upgrade_warning(self) -> None:
        """Say nothing: clients that offer HTTP/2 with every request are right to do so."""

    def shutdown(self) -> None:
        """Close the connection once it is idle, or a second after all answers have ended."""
        super().shutdown()
        self.loop.call_later(GRACE_S + 1, self.transport.abort)

    def _expect_head(self) -> None:
        if self._head_timer:
            self._head_timer.cancel()
        self._head_timer = self.loop.call_later(_HEAD_S, self._require_head, self.cycle)

    def _require_head(self, earlier: object) -> None:
        """Leave a client of which no request has come since the `earlier` one."""
        if self.cycle is earlier:
            self.transport.abort()

    def eof_received(self) -> bool:  # type: ignore[override]
        self._is_half_closed = self._is_answering()
        if self._is_half_closed:
            self.loop.call_later(_PROBE_S, self._probe, _PROBE_S)
        return self._is_half_closed

    def on_response_complete(self) -> None:
        super().on_response_complete()  # which begins to answer what else the client has sent
        if self.cycle.response_complete:
            self._expect_head()
        if self._is_half_closed and self._is_answering():
            self.loop.call_later(_PROBE_S, self._probe, _PROBE_S)
        elif self._is_half_closed:
            self.transport.close()

    def _is_answering(self) -> bool:
        return self.cycle is not None and not self.cycle.more_body and not self.cycle.response_complete

    def _probe(self, pause_s: float) -> None:
        """Send what a client that has left refuses and others pass over, until the answer begins."""
        cycle = self.cycle
        if cycle.scope["http_version"] == "1.1" and not (cycle.response_started or self.transport.is_closing()):
            self.transport.write(self.conn.send(h11.InformationalResponse(status_code=102, headers=[])) or b"")
            self.loop.call_later(pause_s, self._probe, 2 * pause_s)


class _Server(uvicorn.Server):
    """HTTP server that ends its answers GRACE_S after the first signal, and at once after a second one."""

    thread: DecodingThread
    ready: Callable[[], None]

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self.ready()

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals of uvicorn but for those that this process was started to ignore."""
        ignored = [number for number in HANDLED_SIGNALS if signal.getsignal(number) is signal.SIG_IGN]
        with super().capture_signals():
            for number in ignored:
                signal.signal(number, signal.SIG_IGN)
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self.should_exit:  # nothing is left to wait for then: uvicorn's own haste would log a traceback
            self.thread.llm.interrupt()
            self.thread.stop_after(0)
            return
        self.thread.refuse()
        self.thread.stop_after(GRACE_S)
        super().handle_exit(sig, frame)


def config_of(app: ASGIApp) -> uvicorn.Config:
    """Return how `app` is served."""
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        http=_Connection,
        ws="none",
        timeout_graceful_shutdown=int(GRACE_S) + 5,
        h11_max_incomplete_event_size=64 * 1024,
    )


def run(llm: FusedLlama, address: Address, rules: Rules, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM, which are raised again at the end.

    ready: called once the server accepts clients.
    """
    app = make_app(llm, rules)
    server = _Server(config_of(app))
    server.thread, server.ready = app.state.thread, ready
    try:
        server.run(sockets=[address.socket])
    finally:
        server.thread.close()  # where it was ended before the application's own end
