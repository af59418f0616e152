"""The address of the server, and the server that runs until a signal ends it."""

from __future__ import annotations

import ipaddress
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import TYPE_CHECKING

import uvicorn
from uvicorn.server import HANDLED_SIGNALS

from ..errors import EdgeDLFError, InvalidParameterError
from .app import Rules, make_app
from .decoding import DecodingThread

if TYPE_CHECKING:
    from ..api import FusedLlama

GRACE_S = 5.0
"""Seconds that answers may take after the first signal."""


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
    def url(self) -> str:
        """Address of the server for a browser on this machine."""
        host, port = self.socket.getsockname()[:2]
        is_any = ipaddress.ip_address(host.partition("%")[0]).is_unspecified
        return f"http://{'localhost' if is_any else f'[{host}]' if ':' in host else host}:{port}"


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


def run(llm: FusedLlama, address: Address, rules: Rules, ready: Callable[[], None]) -> None:
    """Serve until SIGINT or SIGTERM, which are raised again at the end.

    ready: called once the server accepts clients.
    """
    app = make_app(llm, rules)
    config = uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        server_header=False,
        http="h11",  # httptools, where it is installed, sets headers no limit
        timeout_graceful_shutdown=int(GRACE_S) + 5,
        h11_max_incomplete_event_size=64 * 1024,
    )
    server = _Server(config)
    server.thread, server.ready = app.state.thread, ready
    try:
        server.run(sockets=[address.socket])
    finally:
        server.thread.close()  # where it was ended before the application's own end
