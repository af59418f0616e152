"""The server's decoding thread and its tickets, by an event loop of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from edge_dlf import EdgeDLFError, FusedLlama
from edge_dlf.answers.requests import parse_body
from edge_dlf.server.decoding import DecodingThread, Event, Ticket
from edge_dlf.server.metrics import Metrics
from edge_dlf.server.refusals import HTTPError

pytest.importorskip("uvicorn")


@pytest.fixture(scope="module")
def llm(tiny: Path):
    with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1, n_parallel=2) as llm:
        yield llm


@asynccontextmanager
async def decoding(llm: FusedLlama) -> AsyncIterator[DecodingThread]:
    thread = DecodingThread(llm, 4, Metrics())
    thread.open()
    try:
        yield thread
    finally:
        await asyncio.to_thread(thread.close)


def asked(thread: DecodingThread, n_tokens: int, *, is_streamed: bool = True, timeout_s: float = 60.0) -> Ticket:
    """A request for so many tokens, on its way."""
    ticket = thread.ticket(1, is_streamed=is_streamed)
    body = {"prompt": "the cat", "max_tokens": n_tokens, "logit_bias": {"305": -100, "303": -100}}
    ticket.start([thread.llm.prepare(parse_body(body, False), draft="off").answer], timeout_s)
    return ticket


async def taken(ticket: Ticket) -> list[Event]:
    """All events of a ticket, which is closed then."""
    events = [event async for given in ticket for event in given]
    ticket.close()
    return events


def run(llm: FusedLlama, work: Callable[[DecodingThread], Awaitable[None]]) -> None:
    async def main() -> None:
        async with decoding(llm) as thread:
            await work(thread)

    asyncio.run(main())


def test_streamed_tokens_come_as_they_are_decoded(llm: FusedLlama) -> None:
    async def work(thread: DecodingThread) -> None:
        events = await taken(asked(thread, 20))
        assert sum(len(event.tokens) for event in events) == 20
        assert len(events) > 10  # a token whose character is incomplete comes with the next one
        assert [event.is_last for event in events] == [False] * (len(events) - 1) + [True]

    run(llm, work)


def test_an_answer_that_is_not_streamed_comes_as_one_event(llm: FusedLlama) -> None:
    async def work(thread: DecodingThread) -> None:
        (event,) = await taken(asked(thread, 5, is_streamed=False))
        assert (len(event.tokens), event.is_last) == (5, True)

    run(llm, work)


def test_an_end_reaches_its_client_where_the_other_one_leaves(llm: FusedLlama) -> None:
    async def work(thread: DecodingThread) -> None:
        done, leaving = asked(thread, 3), asked(thread, 200)
        first = await anext(aiter(leaving))
        assert first
        leaving.close()
        assert sum(len(event.tokens) for event in await taken(done)) == 3

    run(llm, work)


def test_tokens_that_come_before_an_error_are_given_before_it(llm: FusedLlama) -> None:
    async def work(thread: DecodingThread) -> None:
        ticket, given = asked(thread, 200), []

        async def read() -> None:
            async for events in ticket:
                given.extend(events)
                thread.stop()

        with pytest.raises(HTTPError, match="stopping"):
            await read()
        assert sum(len(event.tokens) for event in given) > 0
        with pytest.raises(HTTPError, match="stopping"):
            thread.ticket(1, is_streamed=False)

    run(llm, work)


def test_events_that_have_come_are_given_at_once_and_an_end_is_not_late(llm: FusedLlama) -> None:
    async def work(thread: DecodingThread) -> None:
        whole = asked(thread, 4, is_streamed=False)
        (end,) = await taken(whole)
        ticket = Ticket(thread, 0, is_streamed=True, answers=whole.answers)
        for token in end.tokens:
            ticket.events.put_nowait(Event(0, [token], is_last=token is end.tokens[-1]))
        ticket.events.put_nowait(Event(0, error=HTTPError(504, "too late")))
        assert [[len(event.tokens) for event in given] async for given in ticket] == [[1, 1, 1, 1]]

    run(llm, work)


def test_an_answer_that_takes_too_long_ends_with_a_timeout(llm: FusedLlama) -> None:
    async def work(thread: DecodingThread) -> None:
        ticket = asked(thread, 200, timeout_s=0.0)
        with pytest.raises(HTTPError, match="longer than the server allows"):
            await taken(ticket)
        ticket.close()

    run(llm, work)


def test_a_failing_step_ends_every_answer_and_the_next_one_is_right(
    llm: FusedLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise EdgeDLFError("a step that fails")

    async def work(thread: DecodingThread) -> None:
        with monkeypatch.context() as patch:
            patch.setattr(llm.driver.decoder, "step", fail)
            for ticket in (asked(thread, 5), asked(thread, 5)):
                with pytest.raises(EdgeDLFError, match="a step that fails"):
                    await taken(ticket)
                ticket.close()
        assert sum(len(event.tokens) for event in await taken(asked(thread, 5))) == 5

    run(llm, work)
