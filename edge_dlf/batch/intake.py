"""The input of a batch: requests that are still to be run, each with an id of its own."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from hashlib import blake2b
from typing import IO, Any

from ..answers.requests import columns_of, is_id, is_openai, request_id
from ..system.jsonl import MAX_LINE_BYTES, Line, parse_object
from .ids import Ids

INCOMPLETE = "incomplete_line"
"""Code of the error of a last line that whoever writes the input may not have finished."""
_BLOCK_BYTES = 1 << 20


def fingerprint(file: IO[bytes], n_bytes: int | None = None) -> dict[str, Any]:
    """Size and digest of `file`, or of its first `n_bytes`; goes back to its beginning."""
    digest = blake2b(digest_size=16)
    file.seek(0)
    while block := file.read(_BLOCK_BYTES if n_bytes is None else min(_BLOCK_BYTES, n_bytes - file.tell())):
        digest.update(block)
    found = {"bytes": file.tell(), "blake2b": digest.hexdigest()}
    file.seek(0)
    return found


class Intake:
    """Iterates over the requests in `lines` that have no finished row in `ids`, and hands over rows to `finish`.

    A request without an id gets the number of its line, as text. Lines that are no requests become rows with an error.
    With `ordered`, for requests that are finished in the order of the lines, such a row waits for those before it.

    keep: whether finished rows get the columns of their line that no request uses.
    """

    def __init__(
        self,
        lines: Iterable[Line],
        ids: Ids,
        finish: Callable[[Mapping[str, Any]], None],
        *,
        ordered: bool = False,
        keep: bool = False,
    ) -> None:
        self._lines = lines
        self._ids = ids
        self._finish = finish
        self._ordered = ordered
        self._keep = keep
        self._running: dict[str, tuple[int, dict[str, Any]]] = {}
        self._n_given = 0
        self._refused: deque[tuple[int, Mapping[str, Any]]] = deque()  # with the number of requests before each

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for line in self._lines:
            try:
                id, request = _request(line)
                found = self._ids.meet(id)
                if found == "repeated":
                    raise _RowError("duplicate_id", f"the id {id!r} is that of an earlier line")
            except _RowError as reason:
                if self._ids.meet(line.number) == "new":
                    id, error = f"batch_req_line_{line.number}", {"code": reason.code, "message": str(reason)}
                    row = {"id": id, "custom_id": None, "response": None, "error": {**error, "line": line.number}}
                    self._refused.append((self._n_given, row))
                    self._hand_over()
                continue
            if found == "new":
                self._running[id] = line.number, {"columns": columns_of(request)} if self._keep else {}
                self._n_given += 1
                yield request

    @property
    def n_running(self) -> int:
        """Requests given out whose rows are not finished."""
        return len(self._running)

    def finished(self, row: Mapping[str, Any]) -> None:
        """Hand over the row of a request that has been run, with what is kept; an error gets the number of its line."""
        number, kept = self._running.pop(row["custom_id"])
        error = {"error": {**row["error"], "line": number}} if row["error"] else {}
        self._finish({**row, **error, **kept})
        self._hand_over()

    def _hand_over(self) -> None:
        """Hand over the refused rows whose turn it is."""
        n_finished = self._n_given - len(self._running)
        while self._refused and not (self._ordered and self._refused[0][0] > n_finished):
            self._finish(self._refused.popleft()[1])


class _RowError(Exception):
    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


def _request(line: Line) -> tuple[str, dict[str, Any]]:
    """The id of the request in `line`, and the request with it."""
    if line.content is None:
        raise _RowError("line_too_long", f"{line.n_bytes:,} bytes; a line may have {MAX_LINE_BYTES:,}")
    try:
        request = parse_object(line.content)
    except ValueError as error:
        if not line.is_whole:
            raise _RowError(INCOMPLETE, f"{error}; no line break ends it, so it is read again next time") from None
        raise _RowError("invalid_json", f'{error}; a row is an object such as {{"prompt": "…"}}') from None
    name = "custom_id" if "custom_id" in request or is_openai(request) else "id"
    id = request.get(name)
    if id == "" or not (id is None or is_id(id)):
        raise _RowError("invalid_request", f"{name} must be a text that is not empty, or a whole number")
    text = request_id({name: id}, line.number)
    return text, {**request, name: text}
