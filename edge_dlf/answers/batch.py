"""Batches in memory: many requests at once, pulled as there is room for them and reported as they are done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

from ..errors import ContextOverflowError, EdgeDLFError, InvalidParameterError, NonFiniteLogitsError, require
from .completion import Completion, Dict
from .requests import Request, parse_line, request_id
from .sandbox import NoTemplateError
from .stream import Answer, Driver

LATER = object()
"""Sentinel in place of a request: none is waiting yet, so keep decoding."""
_AHEAD = 8
"""Requests pulled beyond the oldest one that is not done, relative to those decoded at once, while order is kept."""
_CODES = (
    (InvalidParameterError, "invalid_request"),
    (ContextOverflowError, "context_length_exceeded"),
    (NonFiniteLogitsError, "non_finite_logits"),
)


@dataclass(eq=False)
class _Row:
    """One request on its way, and its result once there is one."""

    custom_id: str
    completion: Completion | None = None
    result: Dict | None = None


def run_batch(
    driver: Driver,
    requests: Iterable[Any],
    prepare: Callable[[Request, str], Completion],
    *,
    ordered: bool = False,
    exact: bool = False,
) -> Iterator[Dict]:
    """Yield results of `requests` as they are done, or in their order; see `FusedLlama.batch`.

    requests: pulled as there is room for them, one more than are decoded at once. It may give LATER and is asked again
        after a step then.
    prepare: request and its id -> its answer, not begun. An EdgeDLFError that it raises is that request's result, but
        for NoTemplateError, which ends the batch.
    exact: let each answer begin with empty KV caches.
    """
    numbered = enumerate(requests, 1)
    running: dict[Answer, _Row] = {}
    unreported: deque[_Row] = deque()
    is_exhausted, n_ahead = False, _AHEAD * (driver.n_parallel + 1)
    if exact:
        require(driver.n_parallel == 1, "exact needs n_parallel=1: one request at a time")
        has_cache = driver.decoder.ensemble.prompt_cache is not None
        require(not has_cache, "exact begins with empty KV caches: leave out prompt_cache")
        driver.forget()
    try:
        while True:
            while not is_exhausted and len(running) <= driver.n_parallel and len(unreported) < n_ahead:
                number, line = next(numbered, (0, None))
                is_exhausted = not number
                if is_exhausted or line is LATER:
                    break
                driver.require_open()
                row = _begin(line, number, prepare)
                unreported.append(row)
                if not row.completion:
                    break  # its error is reported at once
                running[row.completion.answer] = row
                driver.add(row.completion.answer)
            yield from _done(unreported, ordered)
            if running:
                if next(iter(running)) not in driver:
                    raise EdgeDLFError("this batch was ended by a newer request, or by close()")
                for answer in driver.step():
                    if answer.has_ended and answer in running:
                        _end(running.pop(answer))
                        if exact:
                            driver.forget()
            elif is_exhausted and not unreported:
                return
    finally:
        for answer in running:
            driver.remove(answer)


def _begin(line: Any, number: int, prepare: Callable[[Request, str], Completion]) -> _Row:
    row = _Row(request_id(line, number))
    try:
        row.completion = prepare(parse_line(line), row.custom_id)
    except NoTemplateError:  # all rows that need the template would fail alike
        raise
    except EdgeDLFError as error:
        row.result = failure(row.custom_id, error)
    return row


def _end(row: _Row) -> None:
    """Set the result of a row whose answer has ended."""
    assert row.completion is not None
    answer = row.completion.answer
    if answer.error:
        row.result = failure(row.custom_id, answer.error)
    else:
        body = row.completion.result(answer.tokens)
        row.result = _result(row.custom_id, {"status_code": 200, "request_id": body["id"], "body": body}, None)


def _done(unreported: deque[_Row], ordered: bool) -> Iterator[Dict]:
    """Take results that can be reported out of `unreported`."""
    for row in list(unreported):
        if row.result:
            unreported.remove(row)
            yield row.result
        elif ordered:
            return


def row_seed(seed: int, custom_id: str) -> int:
    """Return the seed of a sampled row that has none of its own."""
    return int.from_bytes(_digest(f"{seed}:{custom_id}", 8), "big")


def failure(custom_id: str, error: EdgeDLFError) -> Dict:
    """Return the result of a request that failed."""
    code = next((code for kind, code in _CODES if isinstance(error, kind)), "failed")
    return _result(custom_id, None, {"code": code, "message": str(error)})


def _result(custom_id: str, response: Dict | None, error: Dict | None) -> Dict:
    identity = f"batch_req_{_digest(custom_id, 12).hex()}"
    return {"id": identity, "custom_id": custom_id, "response": response, "error": error}


def _digest(text: str, n_bytes: int) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=n_bytes).digest()
