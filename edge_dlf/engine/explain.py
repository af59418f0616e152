"""Why a step chose its token: the search for α, and what each member alone would have chosen."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from ..errors import EdgeDLFError
from ..fusion.records import N_CANDIDATES, AlphaChoice, Draw, Picked, Trace
from .backend import Logits

if TYPE_CHECKING:
    from ..fusion.fuser import Fuser


def explain(
    fuser: Fuser,
    members: Mapping[str, Logits],
    experts: Sequence[str],
    draws: Sequence[Draw],
    choices: Sequence[AlphaChoice | EdgeDLFError | None],
    weights: Sequence[tuple[float, ...]],
    picked: Sequence[Picked | EdgeDLFError],
) -> list[Trace | None]:
    """A trace for each of K rows; None where it has an error. Members whose own row is an error are left out.

    members: name -> rows (K, width). experts: names of those that `weights` are of. The rest as for `Fuser.pick`.
    """
    draws = [dataclasses.replace(draw, n_top=N_CANDIDATES) for draw in draws]
    alone: list[dict[str, Picked]] = [{} for _ in draws]
    for name, rows in members.items():
        for seen, taken in zip(alone, fuser.pick(rows, None, (), [()] * len(draws), draws, (name,)), strict=True):
            if isinstance(taken, Picked):
                seen[name] = taken
    return [
        None
        if isinstance(choice, EdgeDLFError) or isinstance(taken, EdgeDLFError)
        else Trace(choice, dict(zip(experts, alphas, strict=True)), taken.top_logprobs[:N_CANDIDATES], seen)
        for choice, alphas, taken, seen in zip(choices, weights, picked, alone, strict=True)
    ]
