"""The thread that decodes for all clients: answers come in from the event loop, their tokens go back as they come."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import takewhile
from queue import SimpleQueue
from typing import TYPE_CHECKING, cast

from ..answers.stream import Answer
from ..answers.token import Token
from ..errors import EdgeDLFError, RequestInterruptedError, require
from .refusals import HTTPError, stopping

if TYPE_CHECKING:
    from ..api import FusedLlama
    from .metrics import Metrics

logger = logging.getLogger(__name__)

N_PREFILL = 128
"""Tokens of prompts evaluated in one step, so that a long prompt does not keep other answers waiting."""


@dataclass(frozen=True)
class Event:
    """Tokens of the answer number `index`; `is_last` where it has ended. error: why no more can come."""

    index: int
    tokens: Sequence[Token] = ()
    is_last: bool = False
    error: EdgeDLFError | HTTPError | None = None


@dataclass(eq=False)
class Ticket:
    """The answers of one request on their way, for the event loop: iterating gives their events, those at once that
    have come meanwhile. is_streamed: whether tokens are wanted as they come, or all at the end. timer: what ends them
    when they take too long."""

    thread: DecodingThread
    n_places: int
    is_streamed: bool
    answers: Sequence[Answer] = ()
    events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)
    begun_at: float = field(default_factory=time.perf_counter)
    has_first_token: bool = False
    timer: asyncio.TimerHandle | None = None

    def start(self, answers: Sequence[Answer], timeout_s: float) -> None:
        """Let the answers join the line. timeout_s: time that they may take."""
        self.answers = answers
        expired = Event(0, error=HTTPError(504, "the answer took longer than the server allows", "timeout"))
        self.timer = asyncio.get_running_loop().call_later(timeout_s, self.events.put_nowait, expired)
        self.thread.command(lambda: self.thread.begin(self))

    async def __aiter__(self) -> AsyncIterator[list[Event]]:
        """Events until every answer has ended. Raises EdgeDLFError where one cannot go on, HTTPError where they take
        too long or the server stops."""
        n_left = len(self.answers)
        while n_left:
            events = [await self.events.get()]
            while not self.events.empty():
                events.append(self.events.get_nowait())
            given = list(takewhile(lambda event: not event.error, events))
            n_left -= sum(event.is_last for event in given)
            if given:
                yield given
            if n_left and len(given) < len(events):
                raise cast("Exception", events[len(given)].error)

    def close(self) -> None:
        """End what has not ended, at once, and give its place up. Calling it twice is no error."""
        if self.timer:
            self.timer.cancel()
        self.thread.give_back(self.n_places)
        self.n_places = 0
        if self.answers:
            self.thread.command(lambda: self.thread.end(self))


class DecodingThread:
    """Decodes the answers of all clients in a thread of its own.

    n_most: answers that may be decoded or wait at once.
    Tickets belong to the event loop that `open` was called in.
    """

    def __init__(self, llm: FusedLlama, n_most: int, metrics: Metrics) -> None:
        self.llm = llm
        self.n_most = n_most
        self._driver = llm.driver
        self._metrics = metrics
        self._n_taken = 0
        self._is_stopping = self._has_stopped = False
        self._answer_s = 1.0
        self._tickets: dict[Answer, tuple[Ticket, int]] = {}
        self._due: list[tuple[Ticket, Event]] = []
        self._commands: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._is_open = threading.Event()
        self._thread = threading.Thread(target=self._run, name="edge-dlf decoding", daemon=True)

    def open(self) -> None:
        """Begin to decode."""
        self._loop = asyncio.get_running_loop()
        self._is_open.set()
        self._thread.start()

    def close(self) -> None:
        """End every answer and the thread. Calling it twice, or from another thread, is no error."""
        self.stop()
        self.command(self._is_open.clear)
        if self._is_open.is_set():
            self._thread.join()

    def ticket(self, n_answers: int, *, is_streamed: bool) -> Ticket:
        """Take places for a request of so many answers. Raises HTTPError or InvalidParameterError."""
        if self._is_stopping:
            raise stopping()
        require(n_answers <= self.n_most, f"{n_answers} choices are more than the {self.n_most} that this server takes")
        if self._n_taken + n_answers > self.n_most:
            wait_s = max(1, min(60, round(self._answer_s * self._n_taken / self._driver.n_parallel)))
            message = "as many requests wait as may; try again later"
            raise HTTPError(503, message, "overloaded", {"Retry-After": str(wait_s)})
        self._n_taken += n_answers
        return Ticket(self, n_answers, is_streamed)

    def give_back(self, n_places: int) -> None:
        """Let others have places that were taken."""
        self._n_taken -= n_places

    def refuse(self) -> None:
        """Take no more requests; those that are there go on."""
        self._is_stopping = True

    def stop(self) -> None:
        """Take no more requests, and end those that are there."""
        self._is_stopping = True
        self.command(self._end_all)

    def stop_after(self, seconds: float) -> None:
        """Let `stop` follow. May be called from a signal's handler, where `stop` itself could wait for a lock that the
        same thread holds."""
        self._loop.call_soon_threadsafe(self._loop.call_later, seconds, self.stop)

    def command(self, what: Callable[[], None]) -> None:
        """Let the decoding thread do something between two steps."""
        self._commands.put(what)

    # What follows runs in the decoding thread.

    def begin(self, ticket: Ticket) -> None:
        """Let the answers of a ticket join the line."""
        if self._has_stopped:
            self._post(ticket, Event(0, error=stopping()))
            return
        for index, answer in enumerate(ticket.answers):
            self._tickets[answer] = ticket, index
            self._driver.add(answer)

    def end(self, ticket: Ticket) -> None:
        """Take those answers of a ticket out that have not ended."""
        for answer in ticket.answers:
            if self._tickets.pop(answer, None):
                self._driver.remove(answer)

    def _run(self) -> None:
        while self._is_open.is_set():
            if self._tickets and self._commands.empty():
                self._step()
            else:
                self._commands.get()()
            if not self._tickets:
                self._deliver()  # no step follows in which members compute

    def _end_all(self) -> None:
        self._has_stopped = True
        self._fail_all(stopping())
        self.llm.end_forms()

    def _step(self) -> None:
        """Run one step of all answers. What it gave is handed over while the members compute the next one."""
        try:
            answers = self._driver.step(N_PREFILL, self._deliver)
        except RequestInterruptedError:
            self._fail_all(stopping())
        except EdgeDLFError as error:
            self._fail_all(error)
        except Exception:
            logger.exception("a step of the engine failed")
            self._fail_all(EdgeDLFError("the engine failed; what it wrote to its terminal says why"))
        else:
            for answer in answers:
                self._advance(answer)

    def _advance(self, answer: Answer) -> None:
        """Tell the client what a step gave one answer."""
        ticket, index = self._tickets[answer]
        if answer.report.n_generated and not ticket.has_first_token:
            ticket.has_first_token = True
            self._metrics.first_token(time.perf_counter() - ticket.begun_at)
        if answer.has_ended:
            del self._tickets[answer]
        if answer.error:
            self._post(ticket, Event(index, error=answer.error))
        elif answer.has_ended:
            self._metrics.ended(answer.report)
            self._answer_s += 0.1 * (time.perf_counter() - ticket.begun_at - self._answer_s)
            self._post(ticket, Event(index, answer.take(), is_last=True))
        elif ticket.is_streamed and answer.tokens:
            self._post(ticket, Event(index, answer.take()))

    def _fail_all(self, error: EdgeDLFError | HTTPError) -> None:
        """End every answer with `error`. What a failed step left in the caches is not trusted."""
        self._driver.clear()
        self._driver.forget()
        tickets, self._tickets = self._tickets, {}
        for ticket, index in tickets.values():
            self._post(ticket, Event(index, error=error))

    def _post(self, ticket: Ticket, event: Event) -> None:
        self._due.append((ticket, event))

    def _deliver(self) -> None:
        """Hand what is due to the event loop. It is held until members compute again: earlier, the loop would take the
        interpreter away from the step that they wait for."""
        due, self._due = self._due, []

        def put() -> None:
            for ticket, event in due:
                ticket.events.put_nowait(event)

        if due:
            with suppress(RuntimeError):  # the loop has ended: nobody waits for these
                self._loop.call_soon_threadsafe(put)
