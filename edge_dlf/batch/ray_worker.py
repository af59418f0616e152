"""`Worker`: one copy of a family in an actor of Ray Data, and one continuous batch for all shares that it has."""

from __future__ import annotations

import contextlib
import os
import pickle
import queue
import socket
import threading
import traceback
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any, TypeAlias

import pyarrow as pa
import ray

from ..answers.batch import LATER, failure
from ..answers.requests import parse_line
from ..api import FusedLlama
from ..errors import CapacityError, DecodeError, EdgeDLFError, InvalidParameterError, LoadError
from ..llama import default_n_threads

N_ATTEMPTS = 3
"""Times that a share may be begun; after that its rows are taken for what kills the process."""
_KINDS = {kind.exit_code: kind for kind in (EdgeDLFError, InvalidParameterError, LoadError, CapacityError)}

Share: TypeAlias = list[tuple[str, Any]]
"""Requests, each with its id."""
Result: TypeAlias = dict[str, Any]


@dataclass(frozen=True)
class _Row:
    """A request in the batch, its number in its share, and where its result goes, or what ended the batch."""

    custom_id: str
    request: Any
    index: int
    results: queue.SimpleQueue[tuple[int, Result] | EdgeDLFError]


class Worker:
    """Answers shares, several at a time, each in a thread of its own.

    feed: counts how often each share is begun. load: makes the family of `loading`; n_cores: threads for it where
    `loading` has none. settings: of the batch. folder: what relative paths count from.
    """

    def __init__(
        self,
        feed: Any,
        load: Callable[..., FusedLlama],
        loading: Mapping[str, Any],
        n_cores: int,
        settings: Mapping[str, Any],
        folder: str,
    ) -> None:
        self._feed = feed
        self._rows: queue.SimpleQueue[_Row] = queue.SimpleQueue()
        self._suspects = threading.Lock()
        self._failing = threading.Lock()
        self._failure: EdgeDLFError | None = None
        self._running: dict[str, list[_Row]] = defaultdict(list)
        with contextlib.suppress(OSError):
            os.chdir(folder)
        try:
            llm = load(**{"n_threads": min(n_cores, default_n_threads()), **loading})
        except Exception as error:
            self._fail(error)
        else:
            threading.Thread(target=self._serve, args=(llm, settings), daemon=True).start()

    def __call__(self, table: pa.Table) -> pa.Table:
        """number, share -> number, results: in the order of the share, or the EdgeDLFError that there was instead."""
        number = table["number"][0].as_py()
        pickled = table["share"][0].as_py()
        share: Share = pickle.loads(pickled) if pickled else []
        n_begun = ray.get(self._feed.n_begun.remote(number))
        # What was there at all deaths but the last allowed runs without others of its kind: only the one that kills
        # will be there at the next.
        with self._suspects if n_begun == N_ATTEMPTS - 1 else contextlib.nullcontext():
            if n_begun == N_ATTEMPTS:
                results: list[Result] | EdgeDLFError = [_died(custom_id) for custom_id, _ in share]
            else:
                ray.get(self._feed.begin.remote(number))
                results = self._answer(share)
        return pa.table({"number": [number], "results": pa.array([pickle.dumps(results)], pa.large_binary())})

    def _answer(self, share: Share) -> list[Result] | EdgeDLFError:
        """Let the rows of a share join the batch, and wait for them."""
        results: list[Result] = [{}] * len(share)
        answers: queue.SimpleQueue[tuple[int, Result] | EdgeDLFError] = queue.SimpleQueue()
        n_waiting = 0
        for index, (custom_id, request) in enumerate(share):
            try:
                parse_line(request)
            except EdgeDLFError as error:
                results[index] = failure(custom_id, error)
                continue
            with self._failing:
                if self._failure:
                    return self._failure
                self._rows.put(_Row(custom_id, _named(request, custom_id), index, answers))
            n_waiting += 1
        for _ in range(n_waiting):
            answer = answers.get()
            if isinstance(answer, EdgeDLFError):
                return answer
            results[answer[0]] = answer[1]
        return results

    def _serve(self, llm: FusedLlama, settings: Mapping[str, Any]) -> None:
        """Run the one batch, for as long as the actor lives."""
        try:
            for result in llm.batch(self._requests(), **settings):
                row = self._running[result["custom_id"]].pop(0)
                if not self._running[row.custom_id]:
                    del self._running[row.custom_id]
                row.results.put((row.index, result))
        except Exception as error:
            self._fail(error)

    def _requests(self) -> Iterator[Any]:
        """Requests as they come. While some run, LATER stands for the next one until it is there."""
        while True:
            try:
                row = self._rows.get(block=not self._running)
            except queue.Empty:
                yield LATER
            else:
                self._running[row.custom_id].append(row)
                yield row.request

    def _fail(self, error: Exception) -> None:
        """End all shares, those to come too, with `error`, under the machine's name."""
        traceback.print_exc()  # for Ray's log of this process
        kind = _KINDS.get(getattr(error, "exit_code", 1), EdgeDLFError)
        what = str(error) if isinstance(error, EdgeDLFError) else f"{type(error).__name__}: {error}"
        with self._failing:
            self._failure = kind(f"{socket.gethostname()}: {what}")
            while not self._rows.empty():
                self._running[""].append(self._rows.get())
        for row in chain(*self._running.values()):
            row.results.put(self._failure)


def _named(request: Any, custom_id: str) -> Any:
    """A valid request under its id."""
    if isinstance(request, str):
        return {"prompt": request, "id": custom_id}
    return request if "custom_id" in request else {**request, "id": custom_id}


def _died(custom_id: str) -> Result:
    """The result of a row that was running whenever its process died."""
    result = failure(custom_id, DecodeError(f"the process that ran it died {N_ATTEMPTS} times"))
    return {**result, "error": {**result["error"], "code": "worker_died"}}
