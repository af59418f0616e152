"""One pass of some members over given answers, whose results are kept on disk as they come.

The pass reads prompts and answers, and generates nothing. What it finds of an example is appended to a file in the
user's cache as soon as the example is done, so that a pass that was stopped continues, and one that is done is only
read. The results stay in that file and are mapped into memory.
"""

from __future__ import annotations

import json
import struct
import tempfile
import zlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt

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
from ..system.file_locks import awaited, lock_name
from ..system.paths import user_dir
from .examples import Example

Found: TypeAlias = npt.NDArray[np.void]
"""What is kept of answer tokens: an array of structs, one for each token."""

_FORMAT = b"forced2"
_HEADER = struct.Struct("<III")  # number of the example, bytes and checksum of what follows
_N_FILES = 3
"""Passes of one kind whose files stay in the cache."""
_GREEDY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)


Reduce: TypeAlias = Callable[[Sequence[Rows], Sequence[str], Sequence[Draw]], Found]
"""Reduces K rows of each member, given with names and draws, to what is kept of them, (K,)."""


def known_tokens(draws: Sequence[Draw]) -> list[int]:
    """The given token of each draw."""
    return [-1 if draw.scored is None else draw.scored for draw in draws]


def read_answers(
    llm: FusedLlama,
    members: Sequence[str],
    examples: Sequence[Example],
    dtype: np.dtype[np.void],
    reduce: Reduce,
    *,
    how: Sequence[Any],
    kind: str,
    folder: Path | None = None,
    tell: Callable[[int], None] = lambda n_done: None,
) -> list[Found]:
    """Let `members` read the examples; return what `reduce` finds of each, (tokens of its answer,).

    dtype: of what is found, a multiple of 4 bytes for each token.
    how: all that `reduce` depends on beside the members' rows, as JSON.
    kind: a word for what the pass is for.
    folder: where it is kept; by default in the user's cache.
    tell: called with the number of examples that are done, when that changes.

    Raises NonFiniteLogitsError where a member returns NaN.
    """
    llm.driver.decoder.ensemble.require(members)
    with tempfile.TemporaryDirectory() as spare:
        path = _path(llm, members, examples, how, folder or _cache(kind), Path(spare))
        with awaited(path, lambda: tell(0)):  # a run that reads the same examples
            done, n_bytes = _read(path, dtype, examples)
            tell(len(done))
            if len(done) < len(examples):
                left = [number for number in range(len(examples)) if number not in done]
                with Appender(path, n_bytes) as file:
                    for n_done in _run(llm, members, examples, left, _Recorder(reduce, file)):
                        tell(len(done) + n_done)
                done, _ = _read(path, dtype, examples)
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
        self._content: defaultdict[int, bytearray] = defaultdict(bytearray)

    def pick(
        self,
        members: Sequence[Rows],
        names: Sequence[str],
        params: FusionParams,
        weights: Sequence[Sequence[float]],
        draws: Sequence[Draw],
    ) -> list[Pick]:
        """Record K rows of each member. The seed of a draw is the number of its example."""
        for draw, found in zip(draws, self._reduce(members, names, draws), strict=True):
            self._content[draw.seed] += found.tobytes()
        return [Pick(gold, 0.0, ((gold, 0.0),), (), None) for gold in known_tokens(draws)]

    def finish(self, number: int) -> None:
        """Write the record of an example whose rows have all come."""
        content = self._content.pop(number)
        self._file.append(_HEADER.pack(number, len(content), zlib.crc32(content)) + content)


def _read(path: Path, dtype: np.dtype[np.void], examples: Sequence[Example]) -> tuple[dict[int, Found], int]:
    """What was found of each example whose record is whole, by its number, and the bytes of these records."""
    found: dict[int, Found] = {}
    start = 0
    if not path.is_file() or not path.stat().st_size:
        return found, start
    data = np.memmap(path, np.uint8, "r")
    while start + _HEADER.size <= len(data):
        number, n_bytes, checksum = _HEADER.unpack_from(data.data, start)
        content = data[start + _HEADER.size :][:n_bytes]
        is_ours = number < len(examples) and n_bytes == dtype.itemsize * len(examples[number].answer)
        if not is_ours or len(content) < n_bytes or zlib.crc32(content.data) != checksum:
            break
        found[number] = content.view(dtype)
        start += _HEADER.size + n_bytes
    return found, start


def _cache(kind: str) -> Path:
    return user_dir("cache") / kind


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
        has_place = path.is_file()
    except OSError:
        has_place = False
    if not has_place:
        return spare / path.name
    others = sorted(folder.glob("*.rows"), key=lambda other: other.stat().st_mtime)
    for other in others[: -_N_FILES or None]:
        if other != path:
            with suppress(OSError):
                other.unlink()
                lock_name(other).unlink(missing_ok=True)
    return path
