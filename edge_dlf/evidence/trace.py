"""Trace files, which tell why each token was chosen: written, read back and summed up.

A file holds lines of JSON. A line with "format" begins an answer; each line after it is one of its tokens.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..answers.trace_entry import FORMAT, SEARCHED
from ..errors import InvalidParameterError
from ..system.durable import Appender, file_error
from ..system.jsonl import dump_line, parse_object, read_lines

N_BINS = 10
"""Number of equal parts of the range of α in the histogram."""


class TraceFile(Appender):
    """A file that answers are added to, after those that it holds already. A context manager.

    Raises InvalidParameterError where the file holds anything but a trace, EdgeDLFError where it cannot be written.
    """

    def __init__(self, path: Path) -> None:
        n_bytes = 0
        try:
            if path.exists():
                with path.open("rb") as file:
                    for line in read_lines(file):
                        if line.number == 1:
                            _checked(path, 1, line.content, None)
                        n_bytes = line.start + line.n_bytes if line.is_whole else n_bytes
        except OSError as error:
            raise file_error(path, error) from error
        super().__init__(path, n_bytes)

    def write(self, *entries: Mapping[str, Any]) -> None:
        """Add entries, all or none of them."""
        self.append(b"".join(map(dump_line, entries)))


class Head(NamedTuple):
    """Beginning of an answer, as `answer_entry` has it."""

    label: str
    family: str
    method: str
    experts: tuple[str, ...]
    alpha_max: float


Candidate = tuple[int, str, float]


class Step(NamedTuple):
    """One token, as `token_entry` has it.

    search: J, both KLs and both targets; None where α was not searched.
    members: name -> id and name of the token that the member would have chosen, and its candidates.
    """

    text: str
    name: str
    logprob: float
    alphas: tuple[float, ...]
    expert: int | None
    is_drafted: bool
    is_changed: bool
    search: tuple[float, ...] | None
    fused: tuple[Candidate, ...]
    members: dict[str, tuple[int, str, tuple[Candidate, ...]]]


def read_trace(path: Path) -> Iterator[Head | Step]:
    """Yield the answers and tokens in a file, line by line. A last line that was cut off is left out.

    Raises InvalidParameterError where a line is no part of a trace.
    """
    head: Head | None = None
    try:
        with path.open("rb") as file:
            for line in read_lines(file):
                if not line.is_whole:
                    return
                item = _checked(path, line.number, line.content, head)
                head = item if isinstance(item, Head) else head
                yield item
    except OSError as error:
        raise file_error(path, error) from error


def _checked(path: Path, number: int, content: bytes | None, head: Head | None) -> Head | Step:
    try:
        entry = parse_object(content or b"")
        if "format" in entry:
            return _head(entry)
        if head is None:
            raise ValueError("a trace begins otherwise")
        return _step(entry, head)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InvalidParameterError(f"{path}: line {number} is not of a trace that this version writes") from error


def _head(entry: Mapping[str, Any]) -> Head:
    if entry["format"] != FORMAT:
        raise ValueError("another format")
    label, family, method = (str(entry[name]) for name in ("answer", "family", "method"))
    return Head(label, family, method, tuple(map(str, entry["experts"])), _finite(entry["alpha_max"]))


def _step(entry: Mapping[str, Any], head: Head) -> Step:
    search, expert = entry.get("search"), entry["expert"]
    return Step(
        str(entry["text"]),
        str(entry["name"]),
        _number(entry["logprob"]),
        tuple(_finite(entry["alphas"].get(name, 0.0)) for name in head.experts),
        None if expert is None else head.experts.index(expert),
        bool(entry["drafted"]),
        bool(entry["changed"]),
        tuple(_finite(search[name]) for name in SEARCHED) if search else None,
        _candidates(entry["fused"]),
        {
            str(name): (int(own["id"]), str(own["name"]), _candidates(own["top"]))
            for name, own in entry["members"].items()
        },
    )


def _candidates(top: Sequence[Sequence[Any]]) -> tuple[Candidate, ...]:
    return tuple((int(id), str(name), _number(logprob)) for id, name, logprob in top)


def _number(value: float | None) -> float:
    """A logprob; null stands for −inf."""
    return -math.inf if value is None else _finite(value)


def _finite(value: float) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise ValueError("not finite")
    return number


@dataclass
class ExpertTotals:
    """Sums of one expert.

    n_led: steps on which the expert had the largest α.
    alpha_sum: sum of its α over all steps.
    """

    n_led: int = 0
    alpha_sum: float = 0.0


@dataclass
class Totals:
    """Sums over a trace.

    n_fused: steps on which experts took part.
    n_compared: steps on which the large model's own choice is known, those on which the fusion may have changed it.
    n_at_zero, n_at_bound: steps on which the largest α was 0, and its upper bound.
    alpha_max: the highest upper bound of any answer.
    alpha_sum: sum of the largest α over all steps.
    bins: histogram of the largest α, in N_BINS equal parts of its range.
    """

    n_answers: int = 0
    n_tokens: int = 0
    n_changed: int = 0
    n_drafted: int = 0
    n_fused: int = 0
    n_compared: int = 0
    n_at_zero: int = 0
    n_at_bound: int = 0
    alpha_max: float = 0.0
    alpha_sum: float = 0.0
    methods: list[str] = field(default_factory=list)
    experts: dict[str, ExpertTotals] = field(default_factory=dict)
    bins: list[int] = field(default_factory=lambda: [0] * N_BINS)
    _head: Head | None = None

    def add(self, item: Head | Step) -> None:
        """Count an answer's beginning or a token."""
        if isinstance(item, Head):
            self._head = item
            self.n_answers += 1
            self.alpha_max = max(self.alpha_max, item.alpha_max)
            if item.method not in self.methods:
                self.methods.append(item.method)
            return
        assert self._head
        self.n_tokens += 1
        self.n_changed += item.is_changed
        self.n_drafted += item.is_drafted
        if not item.alphas:
            return
        alpha = max(item.alphas)
        self.n_fused += 1
        self.n_compared += "large" in item.members
        self.alpha_sum += alpha
        self.n_at_zero += alpha == 0
        self.n_at_bound += 0 < self._head.alpha_max <= alpha
        part = alpha / self._head.alpha_max if self._head.alpha_max > 0 else 0.0
        self.bins[min(N_BINS - 1, max(0, int(part * N_BINS + 1e-9)))] += 1
        for t, name in enumerate(self._head.experts):
            expert = self.experts.setdefault(name, ExpertTotals())
            expert.n_led += item.expert == t
            expert.alpha_sum += item.alphas[t]

    @property
    def alpha_mean(self) -> float:
        return self.alpha_sum / max(self.n_fused, 1)
