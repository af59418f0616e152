"""The server's engine by hand, turn by turn, in place of its thread and of the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_dlf import FusedLlama
from edge_dlf.answers.requests import parse_body
from edge_dlf.server.engine import Engine, Event, StoppingError, Ticket
from edge_dlf.server.metrics import Metrics

pytest.importorskip("uvicorn")


class Loop:
    """An event loop that does at once what it is called for."""

    def __init__(self) -> None:
        self.n_calls = 0

    def call_soon_threadsafe(self, what: Callable[[], None]) -> None:
        self.n_calls += 1
        what()


@pytest.fixture
def engine(tiny: Path) -> Engine:
    with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1, n_parallel=2) as llm:
        engine = Engine(llm, 4, Metrics())
        engine._loop = Loop()  # type: ignore[assignment]
        llm.scheduler.decoder.ensemble.before_decode = engine._deliver
        yield engine


def asked(engine: Engine, n_tokens: int, *, is_streamed: bool = True) -> Ticket:
    """A request for so many tokens, on its way to the engine."""
    ticket = engine.ticket(1, is_streamed=is_streamed)
    body = {"prompt": "the cat", "max_tokens": n_tokens, "logit_bias": {"305": -100, "303": -100}}
    ticket.answers = [engine.llm.prepare(parse_body(body, False), draft="off")[0]]
    engine.command(lambda: engine.begin(ticket))
    return ticket


def taken(ticket: Ticket) -> list[Event]:
    """What has come of an answer."""
    events = []
    while not ticket.events.empty():
        events.append(ticket.events.get_nowait())
    return events


def test_tokens_reach_the_loop_while_members_compute(engine: Engine) -> None:
    ticket = asked(engine, 3)
    engine._turn()
    assert not taken(ticket)
    engine._turn()
    assert [len(event.tokens) for event in taken(ticket)] == [1]
    engine._turn()
    rest = taken(ticket)
    assert sum(len(event.tokens) for event in rest) == 2
    assert rest[-1].is_last


def test_an_end_reaches_its_client_where_the_last_other_one_leaves(engine: Engine) -> None:
    done, leaving = asked(engine, 1), asked(engine, 8)
    engine._turn()
    assert not taken(done)
    leaving.close()
    engine._turn()
    assert [event.is_last for event in taken(done)] == [True]


def test_an_answer_that_is_not_streamed_wakes_the_loop_once(engine: Engine) -> None:
    ticket = asked(engine, 5, is_streamed=False)
    for _ in range(5):
        engine._turn()
    assert [(len(event.tokens), event.is_last) for event in taken(ticket)] == [(5, True)]
    assert engine._loop.n_calls == 1  # type: ignore[attr-defined]


def test_a_ticket_gives_all_that_has_come_at_once(engine: Engine) -> None:
    ticket = asked(engine, 4)
    for _ in range(4):
        engine._turn()

    async def read() -> list[int]:
        return [sum(len(event.tokens) for event in events) async for events in ticket]

    assert asyncio.run(read()) == [4]


def test_tokens_that_come_with_an_error_are_given_before_it(engine: Engine) -> None:
    ticket = asked(engine, 8)
    for _ in range(4):
        engine._turn()
    engine._end_all()
    given: list[int] = []

    async def read() -> None:
        async for events in ticket:
            given.append(sum(len(event.tokens) for event in events))

    with pytest.raises(StoppingError):
        asyncio.run(read())
    assert sum(given) >= 3


def test_an_answer_that_ended_is_not_late(engine: Engine) -> None:
    ticket = asked(engine, 2)
    for _ in range(2):
        engine._turn()
    ticket.events.put_nowait(Event(0, error=TimeoutError()))

    async def read() -> int:
        return sum([len(event.tokens) async for events in ticket for event in events])

    assert asyncio.run(read()) == 2
