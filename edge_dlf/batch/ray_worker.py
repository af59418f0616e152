"""`Worker`: one copy of a family in an actor of Ray, and one continuous batch for all shares that it has."""

from __future__ import annotations

import contextlib
import os
import queue
import socket
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future
from itertools import chain
from typing import Any, TypeAlias

from ..answers.batch import LATER, failure
from ..answers.requests import parse_line
from ..api import FusedLlama
from ..errors import CapacityError, DecodeError, EdgeDLFError, InvalidParameterError, LoadError
from ..llama import default_n_threads

_KINDS = {kind.exit_code: kind for kind in (EdgeDLFError, InvalidParameterError, LoadError, CapacityError)}

Share: TypeAlias = list[tuple[str, Any]]
"""Requests, each with its id."""
Result: TypeAlias = dict[str, Any]


class Worker:
    """Answers shares, several at a time, each in a thread of its own.

    load: makes the family of `loading`.
    n_cores: threads for it where `loading` has none.
    settings: of the batch.
    folder: what relative paths count from.
    """

    def __init__(
        self,
        load: Callable[..., FusedLlama],
        loading: Mapping[str, Any],
        n_cores: int,
        settings: Mapping[str, Any],
        folder: str,
    ) -> None:
        self._rows: queue.SimpleQueue[tuple[str, Any, Future[Result]]] = queue.SimpleQueue()
        self._failing = threading.Lock()
        self._failure: EdgeDLFError | None = None
        self._running: dict[str, list[Future[Result]]] = defaultdict(list)
        with contextlib.suppress(OSError):
            os.chdir(folder)
        try:
            llm = load(**{"n_threads": min(n_cores, default_n_threads()), **loading})
        except Exception as error:
            self._fail(error)
        else:
            threading.Thread(target=self._serve, args=(llm, settings), daemon=True).start()

    def answer(self, share: Share) -> list[Result] | EdgeDLFError:
        """Results in the order of the share, or what ended the batch."""
        futures = [self._join(custom_id, request) for custom_id, request in share]
        try:
            results = [future.result() for future in futures]
        except EdgeDLFError as error:
            return error
        return self._failure or results

    def _join(self, custom_id: str, request: Any) -> Future[Result]:
        """Let a request join the batch."""
        future: Future[Result] = Future()
        try:
            parse_line(request)
        except EdgeDLFError as error:
            future.set_result(failure(custom_id, error))
            return future
        with self._failing:
            if self._failure:
                future.set_exception(self._failure)
            else:
                self._rows.put((custom_id, _named(request, custom_id), future))
        return future

    def _serve(self, llm: FusedLlama, settings: Mapping[str, Any]) -> None:
        """Run the one batch, for as long as the actor lives."""
        try:
            for result in llm.batch(self._requests(), **settings):
                waiting = self._running[result["custom_id"]]
                waiting.pop(0).set_result(result)
                if not waiting:
                    del self._running[result["custom_id"]]
        except Exception as error:
            self._fail(error)

    def _requests(self) -> Iterator[Any]:
        """Requests as they come. While some run, LATER stands for the next one until it is there."""
        while True:
            try:
                custom_id, request, future = self._rows.get(block=not self._running)
            except queue.Empty:
                yield LATER
            else:
                self._running[custom_id].append(future)
                yield request

    def _fail(self, error: Exception) -> None:
        """End all shares, those to come too, with `error`, under the machine's name."""
        traceback.print_exc()  # for Ray's log of this process
        kind = _KINDS.get(getattr(error, "exit_code", 1), EdgeDLFError)
        what = str(error) if isinstance(error, EdgeDLFError) else f"{type(error).__name__}: {error}"
        with self._failing:
            self._failure = kind(f"{socket.gethostname()}: {what}")
            while not self._rows.empty():
                self._running[""].append(self._rows.get()[2])
        for future in chain(*self._running.values()):
            future.set_exception(self._failure)


def _named(request: Any, custom_id: str) -> Any:
    """A valid request under its id."""
    if isinstance(request, str):
        return {"prompt": request, "id": custom_id}
    return request if "custom_id" in request else {**request, "id": custom_id}


def died(custom_id: str, n_times: int) -> Result:
    """The result of a row that was running whenever its process died."""
    result = failure(custom_id, DecodeError(f"the process that ran it died {n_times} times"))
    return {**result, "error": {**result["error"], "code": "worker_died"}}
