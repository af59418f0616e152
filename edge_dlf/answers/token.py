"""One generated token, as callers see it."""

from __future__ import annotations

from dataclasses import dataclass

from ..fusion.records import Trace
from .tools import ToolCall


@dataclass(frozen=True)
class Token:
    """One generated token.

    text: what this token adds to the visible text; empty while a character or a stop string is still incomplete.
    logprob: natural log of its probability in the fused distribution, before penalties and filters.
    alpha, expert: the weight used at this step and the expert that had it; None where no expert took part.
    from_draft: whether it was drafted and then accepted.
    top_logprobs: the most likely tokens of the step, (id, logprob), best first; empty unless asked for.
    trace: why it was chosen; None unless asked for.
    reasoning: what it adds to the thinking before the answer, which is no part of `text`.
    tool_calls: calls that are complete with this token.
    """

    id: int
    text: str
    logprob: float
    alpha: float
    expert: str | None
    from_draft: bool = False
    top_logprobs: tuple[tuple[int, float], ...] = ()
    trace: Trace | None = None
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()
