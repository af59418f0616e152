"""A server over a family in this process, on a free port of the loopback."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import httpx
import uvicorn

from edge_dlf.server import Address, Rules, make_app
from edge_dlf.server.running import config_of

if TYPE_CHECKING:
    from edge_dlf import FusedLlama


class Served(httpx.Client):
    """A client of the server. llm: the family that it serves."""

    llm: FusedLlama


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.is_ready = threading.Event()

    async def startup(self, sockets: list | None = None) -> None:
        await super().startup(sockets)
        self.is_ready.set()


@contextmanager
def serving(llm: FusedLlama, rules: Rules = Rules()) -> Iterator[Served]:  # noqa: B008
    """Serve `llm` while this lasts."""
    app = make_app(llm, rules)
    server = _Server(config_of(app))
    address = Address.bind("127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve([address.socket])))
    thread.start()
    try:
        assert server.is_ready.wait(60)
        headers = {"Authorization": f"Bearer {rules.api_key}"} if rules.api_key else {}
        with Served(base_url=address.url, timeout=60, headers=headers) as client:
            client.llm = llm
            yield client
    finally:
        server.should_exit = True
        thread.join()
        app.state.thread.close()
