"""Rows → picks: search α, fuse, choose a token, and say why where that was asked for."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..errors import EdgeDLFError
from ..fusion.records import AlphaChoice, Draw, Picked, Trace
from .ensemble import Rows
from .explain import explain
from .generation import Generation, Pick

if TYPE_CHECKING:
    from ..fusion.fuser import Fuser


class Picker:
    """Picks tokens for generations by one fuser."""

    def __init__(self, fuser: Fuser) -> None:
        self.fuser = fuser

    def pick(
        self, generations: Sequence[Generation], rows: Rows, guesses: Sequence[Sequence[int]]
    ) -> list[Pick | EdgeDLFError]:
        """The token that follows each generation's text and `guesses`, by its row."""
        roles, fusion = generations[0].roles, generations[0].fusion
        choices: Sequence[AlphaChoice | EdgeDLFError | None] = [None] * len(generations)
        if fusion.method == "dynamic" and rows.base is not None:
            choices = self.fuser.search(rows.primary, rows.base, rows.experts, fusion, roles.members)
        weights = [
            generation.alphas if choice is None else _weights(choice, len(rows.experts))
            for generation, choice in zip(generations, choices, strict=True)
        ]
        draws = [generation.draw(draft) for generation, draft in zip(generations, guesses, strict=True)]
        picked = self.choose(generations, rows, weights, draws, guesses, roles.members)
        traces: Sequence[Trace | None] = [None] * len(generations)
        if any(generation.traced for generation in generations):
            members = dict(zip(roles.members, rows.members, strict=True))
            traces = explain(self.fuser, members, roles.experts, draws, choices, weights, picked)
        outcomes: list[Pick | EdgeDLFError] = []
        for k, (generation, choice, taken) in enumerate(zip(generations, choices, picked, strict=True)):
            if isinstance(choice, EdgeDLFError):
                outcomes.append(choice)
            elif isinstance(taken, EdgeDLFError):
                outcomes.append(taken)
            else:
                top, trace = taken.top_logprobs[: generation.n_top], traces[k] if generation.traced else None
                outcomes.append(Pick(taken.token, taken.logprob, weights[k], top, trace=trace))
        return outcomes

    def choose(
        self,
        generations: Sequence[Generation],
        rows: Rows,
        weights: Sequence[tuple[float, ...]],
        draws: Sequence[Draw],
        guesses: Sequence[Sequence[int]],
        names: Sequence[str],
    ) -> list[Picked | EdgeDLFError]:
        """A token from each fused row. One that the generation's constraint forbids is chosen again among those it
        allows, as llama.cpp does: most often the first choice is right, and asking for all that are allowed costs
        more."""
        picked = self.fuser.pick(rows.primary, rows.base, rows.experts, weights, draws, names)
        for k, (generation, choice) in enumerate(zip(generations, picked, strict=True)):
            constraint = generation.constraint
            if not constraint or not isinstance(choice, Picked):
                continue
            before = [*generation.unsettled(), *guesses[k]]
            if constraint.allows(before, choice.token):
                continue
            (picked[k],) = self.fuser.pick(
                rows.primary[k : k + 1],
                None if rows.base is None else rows.base[k : k + 1],
                [expert[k : k + 1] for expert in rows.experts],
                weights[k : k + 1],
                [dataclasses.replace(draws[k], banned=constraint.banned(before))],
                names,
            )
        return picked


def _weights(choice: AlphaChoice | EdgeDLFError, n_experts: int) -> tuple[float, ...]:
    """α of each expert; zeros in place of an error."""
    if isinstance(choice, EdgeDLFError):
        return (0.0,) * n_experts
    return tuple(choice.alpha if t == choice.expert else 0.0 for t in range(n_experts))
