"""Many requests through one scheduler: pulled as there is room for them, given back as they are done."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

from ..engine.generation import Generation, Outcome
from ..engine.scheduler import Scheduler
from ..errors import ContextOverflowError, EdgeDLFError, InvalidParameterError, NonFiniteLogitsError
from .completion import CompletionShape, Dict
from .requests import Request, parse_line, request_id
from .stream import Answer
from .token import Token

LATER = object()
"""In place of a request: there is none yet, and those that are being decoded shall go on."""
_AHEAD = 8
"""Requests pulled beyond the oldest one that is not done, relative to those decoded at once, while order is kept."""
_CODES = (
    (InvalidParameterError, "invalid_request"),
    (ContextOverflowError, "context_length_exceeded"),
    (NonFiniteLogitsError, "non_finite_logits"),
)


@dataclass(eq=False)
class _Job:
    """One request on its way. result: what is given back, once there is something."""

    custom_id: str
    answer: Answer | None = None
    shape: CompletionShape | None = None
    tokens: list[Token] = field(default_factory=list)
    result: Dict | None = None


def run_batch(
    scheduler: Scheduler,
    requests: Iterable[Any],
    prepare: Callable[[Request, str], tuple[Answer, CompletionShape]],
    n_parallel: int,
    ordered: bool,
) -> Iterator[Dict]:
    """Results of `requests` as they are done, or in their order; see `FusedLlama.batch`.

    requests: may give LATER, and is asked again after a step. prepare: request and its id -> its answer, not begun, and
    the shape of its result; an EdgeDLFError that it raises is that request's result. n_parallel: requests decoded at
    once; one more is pulled, to be at hand.
    """
    numbered = enumerate(requests, 1)
    jobs: dict[Generation, _Job] = {}
    unreported: deque[_Job] = deque()
    is_exhausted = False
    try:
        while True:
            while not is_exhausted and len(jobs) <= n_parallel and len(unreported) < _AHEAD * (n_parallel + 1):
                number, line = next(numbered, (0, None))
                if not number:
                    is_exhausted = True
                    break
                if line is LATER:
                    break
                job = _begin(line, number, prepare)
                unreported.append(job)
                if not job.answer:
                    break  # to be given back at once
                jobs[job.answer.generation] = job
                scheduler.add(job.answer.generation)
            yield from _done(unreported, ordered)
            if jobs:
                if next(iter(jobs)) not in scheduler:
                    raise EdgeDLFError("this batch was ended by a newer request, or by close()")
                for generation, outcome in scheduler.step():
                    if _advance(jobs[generation], outcome):
                        scheduler.remove(generation)
                        del jobs[generation]
            elif is_exhausted and not unreported:
                return
    finally:
        for generation in jobs:
            scheduler.remove(generation)


def _begin(line: Any, number: int, prepare: Callable[[Request, str], tuple[Answer, CompletionShape]]) -> _Job:
    job = _Job(request_id(line, number))
    try:
        job.answer, job.shape = prepare(parse_line(line), job.custom_id)
    except EdgeDLFError as error:
        job.result = failure(job.custom_id, error)
    return job


def _advance(job: _Job, outcome: Outcome) -> bool:
    """Take in what a step gave; whether that ends the job."""
    assert job.answer is not None
    assert job.shape is not None
    if isinstance(outcome, EdgeDLFError):
        job.result = failure(job.custom_id, outcome)
        return True
    for pick in outcome:
        job.tokens += job.answer.push(pick)
        if job.answer.report.finish_reason:
            job.result = _success(job.custom_id, job.shape.result(job.tokens, job.answer.report))
            return True
    return False


def _done(unreported: deque[_Job], ordered: bool) -> Iterator[Dict]:
    """Take results that can be given back out of `unreported`."""
    if ordered:
        while unreported and unreported[0].result:
            yield unreported.popleft().result or {}
        return
    for job in [job for job in unreported if job.result]:
        unreported.remove(job)
        yield job.result or {}


def row_seed(seed: int, custom_id: str) -> int:
    """The seed of a sampled row that has none of its own."""
    return int.from_bytes(_digest(f"{seed}:{custom_id}", 8), "big")


def _success(custom_id: str, body: Dict) -> Dict:
    # Rows share each step's time, so that tokens a second of one of them mean nothing.
    body["edge_dlf"] = {name: value for name, value in body["edge_dlf"].items() if not name.endswith("_tps")}
    return _result(custom_id, {"status_code": 200, "request_id": body["id"], "body": body}, None)


def failure(custom_id: str, error: EdgeDLFError) -> Dict:
    """The result of a request that gave none."""
    code = next((code for kind, code in _CODES if isinstance(error, kind)), "failed")
    return _result(custom_id, None, {"code": code, "message": str(error)})


def _result(custom_id: str, response: Dict | None, error: Dict | None) -> Dict:
    identity = f"batch_req_{_digest(custom_id, 12).hex()}"
    return {"id": identity, "custom_id": custom_id, "response": response, "error": error}


def _digest(text: str, n_bytes: int) -> bytes:
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=n_bytes).digest()
