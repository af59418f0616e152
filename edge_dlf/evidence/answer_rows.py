"""One pass of all members over given answers: reduced rows of logits, and how well each fixed method foretells them.

The pass reads prompts and answers, and generates nothing. What it finds of an example is appended to a file in the
user's cache as soon as the example is done, so that a pass that was stopped continues, and one that is done is only
read. The rows stay in that file and are mapped into memory.
"""

from __future__ import annotations

import json
import struct
import tempfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple, cast

import numpy as np
import numpy.typing as npt
import platformdirs

from ..api import FusedLlama
from ..engine.decoder import Decoder
from ..engine.ensemble import Roles
from ..engine.generation import Generation, GenerationRequest
from ..engine.scheduler import Scheduler
from ..families.manifest import Manifest
from ..fusion import fit
from ..fusion.dispatch import Rows
from ..fusion.fuser import Fuser
from ..fusion.records import Draw, Pick
from ..params import FusionParams, SamplingParams
from ..system.durable import Appender
from .examples import Example

_FORMAT = b"tune1"
_HEADER = struct.Struct("<IIII")  # number of the example, its tokens, bytes and checksum of what follows
_KEPT_BYTES = 500 * 10**6
"""Most bytes of reduced rows."""
_FEWEST, _MOST = 48, 128
"""Tokens that are kept of a row, at least and at most."""
_N_FILES = 3
"""Passes whose files stay in the cache."""
PLAUSIBILITY = 0.1
_SEARCH = ("search", "alpha_max", "alpha_step")
"""Settings of dynamic that hold where the family has them."""
_GREEDY = SamplingParams(temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)


class Method(NamedTuple):
    """A way to answer: its name in a table, the settings of a request for it, the members that it decodes."""

    name: str
    settings: dict[str, Any]
    members: tuple[str, ...]


@dataclass(frozen=True)
class AnswerLosses:
    """What the pass found, example by example.

    methods: the C fixed methods.
    rows: of every answer token in turn, reduced, with a column for each member.
    starts: number of the first row of each of the n examples, and the number of all rows, (n + 1,).
    kept: of each example its reduced rows as `fit.keep` lays them out, (rows, M + 1, N).
    losses: −log p of each token by each method, in nats, (R, C).
    right: whether the token is the one that the method chooses greedily, (R, C).
    """

    methods: tuple[Method, ...]
    rows: fit.AnswerRows
    starts: npt.NDArray[np.int64]
    kept: tuple[npt.NDArray[np.float32], ...]
    losses: npt.NDArray[np.float32]
    right: npt.NDArray[np.bool_]

    def take(self, numbers: Sequence[int]) -> AnswerLosses:
        """The examples of these numbers, in this order."""
        rows = np.concatenate([np.arange(self.starts[k], self.starts[k + 1]) for k in numbers])
        kept = tuple(self.kept[k] for k in numbers)
        starts = np.cumsum([0, *map(len, kept)])
        return AnswerLosses(self.methods, self.rows.take(rows), starts, kept, self.losses[rows], self.right[rows])


def fixed_methods(experts: Sequence[str]) -> tuple[Method, ...]:
    """Every member alone, static and dynamic. Of several experts, static gives each an equal share of α."""
    everyone = ("large", "base", *experts)
    each = " each" if len(experts) > 1 else ""
    alphas = [share / len(experts) for share in (0.5, 1.0)]
    return (
        *(Method(f"{name} alone", {"method": name}, (name,)) for name in everyone),
        *(Method(f"static, α = {a:g}{each}", {"method": "static", "alpha": a}, everyone) for a in alphas),
        Method("dynamic", {"method": "dynamic"}, everyone),
        Method(f"dynamic, β = {PLAUSIBILITY:g}", {"method": "dynamic", "plausibility": PLAUSIBILITY}, everyone),
    )


def evaluate(
    llm: FusedLlama,
    examples: Sequence[Example],
    n_threads: int,
    folder: Path | None = None,
    tell: Callable[[int], None] = lambda n_done: None,
) -> AnswerLosses:
    """Let every member read the examples.

    n_threads: that reduce and fuse rows.
    folder: where rows are kept; by default in the user's cache.
    tell: called with the number of examples that are done, when that changes.

    Raises NonFiniteLogitsError where a member returns NaN.
    """
    ensemble = llm.driver.decoder.ensemble
    names = ensemble.names
    ensemble.require(names)
    methods = fixed_methods(llm.experts)
    n_rows = sum(len(example.answer) for example in examples)
    n_fitting = _KEPT_BYTES // (4 * (len(names) + 1) * n_rows)
    n_kept = min(llm.n_vocab, max(_FEWEST, min(_MOST, n_fitting)))
    search = {name: value for name, value in llm.files.spec.defaults.items() if name in _SEARCH}
    with tempfile.TemporaryDirectory() as spare:
        path = _path(llm, examples, [n_kept, search], folder, Path(spare))
        shape = _Shape(len(names), n_kept, len(methods))
        done, n_bytes = _read(path, shape, examples)
        tell(len(done))
        while len(done) < len(examples):  # once, but where another process has cut the same file
            recorder = _Recorder(Fuser(llm.n_vocab, n_threads), methods, search, n_kept, n_threads)
            left = [number for number in range(len(examples)) if number not in done]
            with Appender(path, n_bytes) as file:
                _read_examples(llm, examples, left, recorder, file, partial(_tell_sum, tell, len(done)))
            done, _ = _read(path, shape, examples)
        return _joined(names, methods, shape, [done[number] for number in range(len(examples))])


def _tell_sum(tell: Callable[[int], None], n_before: int, n_done: int) -> None:
    tell(n_before + n_done)


def _read_examples(
    llm: FusedLlama,
    examples: Sequence[Example],
    numbers: Sequence[int],
    recorder: _Recorder,
    file: Appender,
    tell: Callable[[int], None],
) -> None:
    """Run the pass over the examples of these numbers, those that begin alike one after the other."""
    llm.score(())  # ends what runs, and forgets an interrupt that came while nothing ran
    ensemble = llm.driver.decoder.ensemble
    scheduler = Scheduler(Decoder(ensemble, cast("Fuser", recorder)))
    roles = Roles(ensemble.names)
    waiting = sorted(numbers, key=lambda number: examples[number].prompt, reverse=True)
    running: dict[Generation, int] = {}
    n_done = 0
    while waiting or running:
        while waiting and scheduler.n_waiting < 2:
            number = waiting.pop()
            prompt, answer = examples[number].prompt, examples[number].answer
            sampling = replace(_GREEDY, seed=number)
            request = GenerationRequest(
                roles,
                dict.fromkeys(roles.members, prompt),
                FusionParams(),
                sampling,
                max_tokens=len(answer),
                forced=answer,
            )
            generation = Generation(request)
            running[generation] = number
            scheduler.add(generation)
        for result in scheduler.step():
            if result.error:
                raise result.error
            if not result.generation.n_left:
                scheduler.remove(result.generation)
                file.append(recorder.take(running.pop(result.generation)))
                n_done += 1
                tell(n_done)


class _Recorder:
    """Stands in for the decoder's `Fuser`: picks the given tokens, and records what the rows say of them."""

    def __init__(
        self, fuser: Fuser, methods: Sequence[Method], search: Mapping[str, Any], n_kept: int, n_threads: int
    ) -> None:
        self._fuser = fuser
        self._methods = methods
        self._search = search
        self._n_kept = n_kept
        self._n_threads = n_threads
        self._parts: dict[int, list[tuple[npt.NDArray[Any], ...]]] = {}

    def pick(
        self,
        members: Sequence[Rows],
        names: Sequence[str],
        params: FusionParams,
        weights: Sequence[Sequence[float]],
        draws: Sequence[Draw],
    ) -> list[Pick]:
        """Record K rows of each member. The seed of a draw is the number of its example."""
        golds = [-1 if draw.scored is None else draw.scored for draw in draws]
        whole = fit.whole(members, names, golds, self._fuser.n_vocab)
        seed = draws[0].seed << 32 | draws[0].position
        (kept,) = fit.keep(whole, self._n_kept, seed, n_threads=self._n_threads).arrays
        losses, right = self._score(members, names, golds, draws)
        for k, draw in enumerate(draws):
            self._parts.setdefault(draw.seed, []).append((kept[k], losses[k], right[k]))
        return [Pick(gold, 0.0, (), (), None) for gold in golds]

    def _score(
        self, members: Sequence[Rows], names: Sequence[str], golds: Sequence[int], draws: Sequence[Draw]
    ) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.bool_]]:
        """Losses of the tokens by each method, and whether they are its choice, (K, C)."""
        given = [replace(draw, n_top=1) for draw in draws]
        losses = np.empty((len(draws), len(self._methods)), np.float32)
        right = np.empty(losses.shape, np.bool_)
        found: list[Pick] = []
        for c, (_, settings, own) in enumerate(self._methods):
            params = FusionParams(**{**self._search, **settings})
            if params.plausibility:  # a filter on what `dynamic`, the method before, has found: losses are the same
                filtered = [replace(draw, scored=None, plausibility=params.plausibility) for draw in draws]
                alphas = [pick.weights for pick in found]
                picks = self._fuser.pick(members, names, FusionParams(method="static"), alphas, filtered)
                right[:, c] = [_checked(pick).token == gold for pick, gold in zip(picks, golds, strict=True)]
                losses[:, c] = losses[:, c - 1]
                continue
            taken = [rows for rows, name in zip(members, names, strict=True) if name in own]
            alphas = [(float(settings.get("alpha", 0.0)),) * (len(own) - 2)] * len(draws)
            found = [_checked(pick) for pick in self._fuser.pick(taken, own, params, alphas, given)]
            losses[:, c] = [-pick.logprob for pick in found]
            right[:, c] = [pick.top_logprobs[0][0] == gold for pick, gold in zip(found, golds, strict=True)]
        return losses, right

    def take(self, number: int) -> bytes:
        """Return the record of an example whose rows have all come."""
        parts = self._parts.pop(number)
        arrays = [np.stack(part) for part in zip(*parts, strict=True)]
        content = b"".join(array.tobytes() for array in arrays)
        content += bytes(-len(content) % 4)
        return _HEADER.pack(number, len(parts), len(content), zlib.crc32(content)) + content


def _checked(pick: Pick) -> Pick:
    if pick.error:
        raise pick.error
    return pick


class _Shape(NamedTuple):
    """Sizes of what is recorded of a row: members, tokens kept, methods."""

    n_members: int
    n_kept: int
    n_methods: int

    def arrays(self, content: npt.NDArray[np.uint8], n_rows: int) -> tuple[npt.NDArray[Any], ...]:
        """Kept rows, losses and right choices in the content of a record, nothing copied."""
        n_floats = [n_rows * (self.n_members + 1) * self.n_kept, n_rows * self.n_methods]
        ends = 4 * n_floats[0], 4 * sum(n_floats)
        kept = content[: ends[0]].view(np.float32).reshape(n_rows, self.n_members + 1, self.n_kept)
        losses = content[ends[0] : ends[1]].view(np.float32).reshape(n_rows, self.n_methods)
        right = content[ends[1] : ends[1] + n_floats[1]].view(np.bool_).reshape(n_rows, self.n_methods)
        return kept, losses, right

    def n_bytes(self, n_rows: int) -> int:
        n_bytes = n_rows * (4 * (self.n_members + 1) * self.n_kept + 5 * self.n_methods)
        return n_bytes + -n_bytes % 4


def _read(
    path: Path, shape: _Shape, examples: Sequence[Example]
) -> tuple[dict[int, tuple[npt.NDArray[Any], ...]], int]:
    """The arrays of each example whose record is whole, by its number, and the bytes of these records."""
    found: dict[int, tuple[npt.NDArray[Any], ...]] = {}
    start = 0
    if not path.is_file() or not path.stat().st_size:
        return found, start
    data = np.memmap(path, np.uint8, "r")
    while start + _HEADER.size <= len(data):
        number, n_rows, n_bytes, checksum = _HEADER.unpack(data[start : start + _HEADER.size].tobytes())
        content = data[start + _HEADER.size :][:n_bytes]
        is_ours = number < len(examples) and n_rows == len(examples[number].answer) and n_bytes == shape.n_bytes(n_rows)
        if not is_ours or len(content) < n_bytes or zlib.crc32(content.tobytes()) != checksum:
            break
        found[number] = shape.arrays(content, n_rows)
        start += _HEADER.size + n_bytes
    return found, start


def _joined(
    names: tuple[str, ...],
    methods: tuple[Method, ...],
    shape: _Shape,
    arrays: Sequence[tuple[npt.NDArray[Any], ...]],
) -> AnswerLosses:
    kept, losses, right = zip(*arrays, strict=True)
    starts = np.cumsum([0, *map(len, kept)])
    row_bytes = 4 * (shape.n_members + 1) * shape.n_kept
    first = np.concatenate([part.ctypes.data + row_bytes * np.arange(len(part)) for part in kept])
    columns = first[:, None] + 4 * shape.n_kept * np.arange(shape.n_members + 1)
    golds = np.zeros(len(first), np.int64)
    rows = fit.AnswerRows(names, shape.n_kept, columns[:, :-1], golds, columns[:, -1], tuple(kept))
    return AnswerLosses(methods, rows, starts, tuple(kept), np.concatenate(losses), np.concatenate(right))


def _path(llm: FusedLlama, examples: Sequence[Example], how: Sequence[Any], folder: Path | None, spare: Path) -> Path:
    """The file of this pass, by all that it depends on. In `spare` where no cache can be kept.

    how: settings of the pass.
    """
    family = {
        role: [{key: value for key, value in entry.items() if key != "file"} for entry in entries]
        for role, entries in Manifest.of(llm.files, {}).family.items()
    }
    digest = blake2b(_FORMAT, digest_size=12)
    digest.update(json.dumps([family, llm.cache_types, how], sort_keys=True).encode())
    for example in examples:
        digest.update(json.dumps([example.prompt, example.answer]).encode())
    folder = folder or Path(platformdirs.user_cache_dir("edge-dlf", appauthor=False)) / "tune"
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
