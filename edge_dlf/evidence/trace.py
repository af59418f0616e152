"""Trace files, which tell why each token was chosen: written, read back and summed up.

A file holds lines of JSON. A line with "format" begins an answer; each line after it is one of its tokens.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

from ..answers.trace_entry import FORMAT
from ..errors import InvalidParameterError
from ..system.durable import Appender, file_error
from ..system.jsonl import Line, dump_line, parse_object, read_lines

_LARGEST = 1e30
"""Far above every α and every logprob that is written, and sums of such numbers stay finite."""
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
                if not path.is_file():
                    raise InvalidParameterError(f"{path}: is no regular file")
                with path.open("rb") as file:
                    for line in read_lines(file):
                        if line.number == 1:
                            _checked(path, line, None)
                        n_bytes = line.start + line.n_bytes if line.is_whole else n_bytes
        except OSError as error:
            raise file_error(path, error) from error
        super().__init__(path, n_bytes)

    def write(self, *entries: Mapping[str, Any]) -> None:
        """Add entries, all or none of them."""
        self.append(b"".join(map(dump_line, entries)))


Entry: TypeAlias = Mapping[str, Any]
"""One line: what `answer_entry` or `token_entry` returned, with null for numbers that JSON does not have."""


def read_trace(path: Path) -> Iterator[Entry]:
    """Yield the answers and tokens in a file, line by line. A last line that was cut off is left out.

    Raises InvalidParameterError where a line is no part of a trace.
    """
    experts: Sequence[str] | None = None
    try:
        with path.open("rb") as file:
            for line in read_lines(file):
                if not line.is_whole:
                    return
                entry = _checked(path, line, experts)
                experts = entry.get("experts", experts)
                yield entry
    except OSError as error:
        raise file_error(path, error) from error


def _checked(path: Path, line: Line, experts: Sequence[str] | None) -> Entry:
    """Return the entry in a line.

    experts: names of the answer's experts; None before the first answer.
    """
    try:
        entry = parse_object(line.content or b"")
        json.dumps(entry, allow_nan=False)  # 1e999 is JSON, and infinite
        match entry:
            case {"format": version, "answer": str(), "method": str(), "experts": [*_], "alpha_max": int() | float()}:
                is_known = version == FORMAT and abs(entry["alpha_max"]) < _LARGEST
                is_known = is_known and all(isinstance(name, str) for name in entry["experts"])
            case {
                "text": str(),
                "name": str(),
                "logprob": float() | int() | None,
                "alphas": {**alphas},
                "expert": expert,
                "drafted": bool(),
                "changed": bool(),
                "fused": [*fused],
                "members": {},
            } if experts is not None:
                rows = chain(fused, *(own["top"] for own in entry["members"].values()))
                is_known = expert in (None, *experts) and {*alphas} <= {*experts} and all(len(row) == 3 for row in rows)
                numbers: list[Any] = [*alphas.values(), entry["logprob"] or 0]
                is_known = is_known and all(abs(number) < _LARGEST for number in numbers)
            case _:
                is_known = False
        if not is_known:
            raise ValueError("another shape")
    except (ValueError, TypeError, KeyError) as error:
        raise InvalidParameterError(f"{path}: line {line.number} is not of a trace that this version writes") from error
    return entry


@dataclass
class Totals:
    """Sums over a trace.

    n_fused: steps on which experts took part.
    n_compared: steps on which the large model's own choice is known, those on which the fusion may have changed it.
    n_at_zero, n_at_bound: steps on which the largest α was 0, and its upper bound.
    alpha_max: the highest upper bound of any answer.
    alpha_sum: sum of the largest α over all steps.
    experts: name -> steps on which the expert had the largest α, and the sum of its α over all steps.
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
    experts: dict[str, dict[str, float]] = field(default_factory=dict)
    bins: list[int] = field(default_factory=lambda: [0] * N_BINS)
    _head: Entry = field(default_factory=dict)

    def add(self, entry: Entry) -> None:
        """Count an answer's beginning or a token."""
        if "format" in entry:
            self._head = entry
            self.n_answers += 1
            self.alpha_max = max(self.alpha_max, entry["alpha_max"])
            if entry["method"] not in self.methods:
                self.methods.append(entry["method"])
            return
        self.n_tokens += 1
        self.n_changed += entry["changed"]
        self.n_drafted += entry["drafted"]
        alphas = {name: entry["alphas"].get(name, 0.0) for name in self._head["experts"]}
        if not alphas:
            return
        alpha, bound = max(alphas.values()), self._head["alpha_max"]
        self.n_fused += 1
        self.n_compared += "large" in entry["members"]
        self.alpha_sum += alpha
        self.n_at_zero += alpha == 0
        self.n_at_bound += 0 < bound <= alpha
        part = alpha / bound if bound > 0 else 0.0
        self.bins[int(min(N_BINS - 1, max(0, part * N_BINS + 1e-9)))] += 1
        for name, own in alphas.items():
            expert = self.experts.setdefault(name, {"n_led": 0, "alpha_sum": 0.0})
            expert["n_led"] += entry["expert"] == name
            expert["alpha_sum"] += own

    @property
    def alpha_mean(self) -> float:
        return self.alpha_sum / max(self.n_fused, 1)
