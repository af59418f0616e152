"""What all members say of given answers: reduced rows of logits, and how well each fixed method foretells them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..api import FusedLlama
from ..engine.ensemble import Roles
from ..families.files import FamilyFiles
from ..fusion import fit
from ..fusion.dispatch import Rows
from ..fusion.fuser import Fuser
from ..fusion.records import Draw, Pick
from ..params import FusionParams
from .examples import Example
from .forced import Found, known_tokens, read_answers

KEPT_BYTES = 500 * 10**6
"""Most bytes of reduced rows."""
_FEWEST, _MOST = 48, 128
"""Tokens that are kept of a row, at least and at most."""
PLAUSIBILITY = 0.1
_SEARCH = ("search", "alpha_max", "alpha_step")
"""Settings of dynamic that hold where the family has them."""


class Method(NamedTuple):
    """A way to answer: its name in a table, the settings of a request for it, who takes part."""

    name: str
    settings: dict[str, Any]
    roles: Roles


@dataclass(frozen=True)
class AnswerLosses:
    """What the pass found, example by example.

    methods: the C fixed methods; the first are each member alone. A corrector is among these, though it is no method:
        its loss tells whether it gives the answers any probability.
    correctors: those members that are no use without the large model.
    rows: of every answer token in turn, reduced, with a column for each member.
    starts: number of the first row of each of the n examples, and the number of all rows, (n + 1,).
    kept: of each example its reduced rows as `fit.keep` lays them out, (rows, M + 1, N).
    losses: −log p of each token by each method, in nats, (R, C).
    right: whether the token is the one that the method chooses greedily, (R, C).
    """

    methods: tuple[Method, ...]
    correctors: frozenset[str]
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
        return replace(
            self, rows=self.rows.take(rows), starts=starts, kept=kept, losses=self.losses[rows], right=self.right[rows]
        )


def fixed_methods(files: FamilyFiles) -> tuple[Method, ...]:
    """Every member alone, static, and dynamic unless there are correctors. Of several experts, static gives each an
    equal share of α."""
    n_experts = len(files.spec.experts)
    each = " each" if n_experts > 1 else ""
    alphas = [share / n_experts for share in (0.5, 1.0)]
    fused: dict[str, dict[str, Any]] = {f"static, α = {a:g}{each}": {"method": "static", "alpha": a} for a in alphas}
    if "dynamic" in files.methods:
        fused["dynamic"] = {"method": "dynamic"}
        fused[f"dynamic, β = {PLAUSIBILITY:g}"] = {"method": "dynamic", "plausibility": PLAUSIBILITY}
    roles = {name: Roles.of(FusionParams(**s), tuple(files.models), files.correctors) for name, s in fused.items()}
    return (
        *(Method(f"{name} alone", {"method": name}, Roles((name,))) for name in files.models),
        *(Method(name, settings, roles[name]) for name, settings in fused.items()),
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
    folder, tell: as for `read_answers`.

    Raises NonFiniteLogitsError where a member returns NaN.
    """
    names = llm.driver.decoder.ensemble.names
    methods = fixed_methods(llm.files)
    n_kept = n_kept_tokens(llm.n_vocab, len(names) + 1, examples, _MOST)
    search = {name: value for name, value in llm.files.spec.defaults.items() if name in _SEARCH}
    each = (len(methods),)
    kept = ("kept", np.float32, (len(names) + 1, n_kept))
    dtype = np.dtype([kept, ("losses", np.float32, each), ("right", np.bool_, each)], align=True)
    reduce = _Reduction(Fuser(llm.n_vocab, n_threads, llm.files.tokens.lacking), methods, search, dtype, n_threads)
    found = read_answers(
        llm, names, examples, dtype, reduce, how=[n_kept, search], kind="tune", folder=folder, tell=tell
    )
    return _joined(names, methods, llm.files.correctors, found)


def n_kept_tokens(n_vocab: int, n_columns: int, examples: Sequence[Example], most: int) -> int:
    """Tokens to keep of each row, so that the rows of all examples stay within `KEPT_BYTES`.

    n_columns: numbers that are kept of each token.
    """
    n_rows = sum(len(example.answer) for example in examples)
    n_fitting = KEPT_BYTES // (4 * n_columns * n_rows)
    return min(n_vocab, max(_FEWEST, min(most, n_fitting)))


@dataclass(frozen=True)
class _Reduction:
    """Reduces the rows of all members, and scores them by each method."""

    fuser: Fuser
    methods: Sequence[Method]
    search: Mapping[str, Any]
    dtype: np.dtype[np.void]
    n_threads: int

    def __call__(self, members: Sequence[Rows], names: Sequence[str], draws: Sequence[Draw]) -> Found:
        golds = known_tokens(draws)
        reduced = np.zeros(len(draws), self.dtype)
        kept, losses, right = (reduced[field] for field in ("kept", "losses", "right"))
        whole = fit.whole(self.fuser.weighed(members, names), names, golds, self.fuser.n_vocab)
        (kept[:],) = fit.keep(whole, kept.shape[-1], sample_seed(draws), n_threads=self.n_threads).arrays
        given = [replace(draw, n_top=1) for draw in draws]
        found: list[Pick] = []
        for c, (_, settings, roles) in enumerate(self.methods):
            params = FusionParams(**{**self.search, **settings})
            if params.plausibility:  # a filter on what `dynamic`, the method before, has found: losses are the same
                filtered = [replace(draw, scored=None, plausibility=params.plausibility) for draw in draws]
                alphas = [pick.weights for pick in found]
                picks = self.fuser.pick(members, names, FusionParams(method="static"), alphas, filtered)
                right[:, c] = [_checked(pick).token == gold for pick, gold in zip(picks, golds, strict=True)]
                losses[:, c] = losses[:, c - 1]
                continue
            taken = [rows for rows, name in zip(members, names, strict=True) if name in roles.members]
            weights = [roles.weights or ()] * len(draws)
            found = [_checked(pick) for pick in self.fuser.pick(taken, roles.members, params, weights, given)]
            losses[:, c] = [-pick.logprob for pick in found]
            right[:, c] = [pick.top_logprobs[0][0] == gold for pick, gold in zip(found, golds, strict=True)]
        return reduced


def _checked(pick: Pick) -> Pick:
    if pick.error:
        raise pick.error
    return pick


def sample_seed(draws: Sequence[Draw]) -> int:
    """A seed of its own for the sample of each call's rows, the same in every run."""
    return draws[0].seed << 32 | draws[0].position


def _joined(
    names: tuple[str, ...], methods: tuple[Method, ...], correctors: frozenset[str], found: Sequence[Found]
) -> AnswerLosses:
    kept, losses, right = ([part[field] for part in found] for field in ("kept", "losses", "right"))
    starts = np.cumsum([0, *map(len, kept)])
    first = np.concatenate([part.ctypes.data + part.strides[0] * np.arange(len(part)) for part in kept])
    columns = first[:, None] + kept[0].strides[1] * np.arange(len(names) + 1)
    golds = np.zeros(len(first), np.int64)
    rows = fit.AnswerRows(names, kept[0].shape[-1], columns[:, :-1], golds, columns[:, -1], tuple(kept))
    return AnswerLosses(methods, correctors, rows, starts, tuple(kept), np.concatenate(losses), np.concatenate(right))
