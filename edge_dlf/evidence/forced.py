"""One pass of some members over given answers, whose results are kept on disk as they come.

The pass reads prompts and answers, and generates nothing. What it finds of an example is appended to a file in the
user's cache as soon as the example is done, so that a pass that was stopped continues, and one that is done is only
read. The results stay in that file and are mapped into memory.
"""

from __future__ import annotations

import json
import math
import struct
import tempfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import platformdirs

from ..answers.scoring import run_scores
from ..answers.stream import Answer, Driver
from ..api import FusedLlama
from ..engine.decoder import Decoder
from ..engine.ensemble import Roles
from ..engine.generation import Generation, GenerationRequest
from ..families.manifest import Manifest
from ..fusion.dispatch import Rows
from ..fusion.fuser import Fuser
from ..fusion.records import Draw, Pick
from ..params import FusionParams, SamplingParams
from ..system.durable import Appender
from .examples import Example

Arrays: TypeAlias = tuple[npt.NDArray[Any], ...]

_FORMAT = b"forced1"
_HEADER = struct.Struct("<IIII")  # number of the example, its tokens, bytes and checksum of what follows
_N_FILES = 3
"""Passes of one kind whose files stay in the cache."""
_GREEDY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)


class Column(NamedTuple):
    """An array that is kept of every example: its type, and the shape of what it has for one answer token."""

    dtype: type[np.generic]
    shape: tuple[int, ...]


Reduce: TypeAlias = Callable[[Sequence[Rows], Sequence[str], Sequence[Draw]], Arrays]
"""Reduces K rows of each member, given with names and draws, to one array (K, …) for each column of the pass."""


def known_tokens(draws: Sequence[Draw]) -> list[int]:
    """The given token of each draw."""
    return [-1 if draw.scored is None else draw.scored for draw in draws]


def read_answers(
    llm: FusedLlama,
    members: Sequence[str],
    examples: Sequence[Example],
    columns: Sequence[Column],
    reduce: Reduce,
    *,
    how: Sequence[Any],
    kind: str,
    folder: Path | None = None,
    tell: Callable[[int], None] = lambda n_done: None,
) -> list[Arrays]:
    """Let `members` read the examples; return the arrays of each, with a row for each token of its answer.

    how: all that `reduce` depends on beside the members' rows, as JSON.
    kind: a word for what the pass is for.
    folder: where the arrays are kept; by default in the user's cache.
    tell: called with the number of examples that are done, when that changes.

    Raises NonFiniteLogitsError where a member returns NaN.
    """
    llm.driver.decoder.ensemble.require(members)
    with tempfile.TemporaryDirectory() as spare:
        path = _path(llm, members, examples, how, folder or _cache(kind), Path(spare))
        done, n_bytes = _read(path, columns, examples)
        tell(len(done))
        while len(done) < len(examples):  # once, but where another process has cut the same file
            left = [number for number in range(len(examples)) if number not in done]
            with Appender(path, n_bytes) as file:
                for n_done in _run(llm, members, examples, left, _Recorder(reduce, file)):
                    tell(len(done) + n_done)
            done, _ = _read(path, columns, examples)
        return [done[number] for number in range(len(examples))]


def _run(
    llm: FusedLlama,
    members: Sequence[str],
    examples: Sequence[Example],
    numbers: Sequence[int],
    recorder: _Recorder,
) -> Iterator[int]:
    """Run the pass over the examples of these numbers, those that begin alike one after the other. Yields how many are
    done."""
    llm.score(())  # ends what runs, and forgets an interrupt that came while nothing ran
    roles, order = Roles(tuple(members)), sorted(numbers, key=lambda number: examples[number].prompt)

    def answer(number: int) -> Answer:
        example = examples[number]
        prompts = {**dict.fromkeys(roles.members, example.prompt), **dict(example.own)}
        sampling, n = replace(_GREEDY, seed=number), len(example.answer)
        request = GenerationRequest(roles, prompts, FusionParams(), sampling, max_tokens=n, forced=example.answer)
        return Answer(Generation(request), piece=lambda token: b"")

    driver = Driver(Decoder(llm.driver.decoder.ensemble, cast("Fuser", recorder)))
    for n_done, (k, _) in enumerate(run_scores(driver, map(answer, order)), 1):
        recorder.finish(order[k])
        yield n_done


class _Recorder:
    """Stands in for the decoder's `Fuser`: picks the given tokens, and records what the rows say of them."""

    def __init__(self, reduce: Reduce, file: Appender) -> None:
        self._reduce = reduce
        self._file = file
        self._parts: dict[int, list[Arrays]] = {}

    def pick(
        self,
        members: Sequence[Rows],
        names: Sequence[str],
        params: FusionParams,
        weights: Sequence[Sequence[float]],
        draws: Sequence[Draw],
    ) -> list[Pick]:
        """Record K rows of each member. The seed of a draw is the number of its example."""
        arrays = self._reduce(members, names, draws)
        for k, draw in enumerate(draws):
            self._parts.setdefault(draw.seed, []).append(tuple(array[k] for array in arrays))
        return [Pick(gold, 0.0, ((gold, 0.0),), (), None) for gold in known_tokens(draws)]

    def finish(self, number: int) -> None:
        """Write the record of an example whose rows have all come."""
        parts = self._parts.pop(number)
        content = b"".join(np.stack(part).tobytes() for part in zip(*parts, strict=True))
        content += bytes(-len(content) % 4)
        self._file.append(_HEADER.pack(number, len(parts), len(content), zlib.crc32(content)) + content)


def _read(path: Path, columns: Sequence[Column], examples: Sequence[Example]) -> tuple[dict[int, Arrays], int]:
    """The arrays of each example whose record is whole, by its number, and the bytes of these records."""
    found: dict[int, Arrays] = {}
    start = 0
    if not path.is_file() or not path.stat().st_size:
        return found, start
    data = np.memmap(path, np.uint8, "r")
    row_bytes = [math.prod(column.shape) * np.dtype(column.dtype).itemsize for column in columns]
    while start + _HEADER.size <= len(data):
        number, n_rows, n_bytes, checksum = _HEADER.unpack(data[start : start + _HEADER.size].tobytes())
        content = data[start + _HEADER.size :][:n_bytes]
        is_ours = number < len(examples) and n_rows == len(examples[number].answer)
        is_whole = len(content) == n_bytes == -(-n_rows * sum(row_bytes) // 4) * 4
        if not is_ours or not is_whole or zlib.crc32(content.tobytes()) != checksum:
            break
        ends = n_rows * np.cumsum([0, *row_bytes])
        found[number] = tuple(
            content[ends[k] : ends[k + 1]].view(column.dtype).reshape(n_rows, *column.shape)
            for k, column in enumerate(columns)
        )
        start += _HEADER.size + n_bytes
    return found, start


def _cache(kind: str) -> Path:
    return Path(platformdirs.user_cache_dir("edge-dlf", appauthor=False)) / kind


def _path(
    llm: FusedLlama,
    members: Sequence[str],
    examples: Sequence[Example],
    how: Sequence[Any],
    folder: Path,
    spare: Path,
) -> Path:
    """The file of this pass, by all that it depends on. In `spare` where no cache can be kept."""
    family = {role: own for role, own in Manifest.of(llm.files, {}).contents().items() if role in members}
    digest = blake2b(_FORMAT, digest_size=12)
    digest.update(json.dumps([family, llm.cache_types, how], sort_keys=True).encode())
    for example in examples:
        digest.update(json.dumps([example.prompt, example.answer, *example.own]).encode())
    path = folder / f"{digest.hexdigest()}.rows"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        path.touch()
    except OSError:
        return spare / path.name
    others = sorted(folder.glob("*.rows"), key=lambda other: other.stat().st_mtime)
    for other in others[: -_N_FILES or None]:
        if other != path:
            with suppress(OSError):
                other.unlink()
    return path
