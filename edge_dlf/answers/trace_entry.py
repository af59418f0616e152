"""Lines of a trace: the beginning of an answer, or why one of its tokens was chosen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from .token import Token

FORMAT = "edge-dlf trace 1"
SEARCHED = ("objective", "kl_forward", "kl_reverse", "target_forward", "target_reverse")
"""Fields of AlphaChoice that a line has of the search for α."""


def answer_entry(label: str, family: str, method: str, experts: Sequence[str], alpha_max: float) -> dict[str, Any]:
    """Line that begins an answer.

    label: the question.
    alpha_max: upper bound of α.
    """
    return {
        "format": FORMAT, "answer": label, "family": family, "method": method, "experts": list(experts),
        "alpha_max": alpha_max,
    }  # fmt: skip


def token_entry(token: Token, name: Callable[[int], str]) -> dict[str, Any]:
    """Line of one traced token. Its candidates are [id, text, logprob].

    name: token id -> its text; the name of a control token.
    """
    trace = token.trace
    assert trace

    def named(top: Sequence[tuple[int, float]]) -> list[list[Any]]:
        return [[id, name(id), round(logprob, 4)] for id, logprob in top]

    large = trace.members.get("large")
    entry = {
        "id": token.id,
        "text": token.text,
        "name": name(token.id),
        "logprob": round(token.logprob, 4),
        "alphas": dict(trace.alphas),
        "expert": token.expert,
        "drafted": token.from_draft,
        "changed": large is not None and large.token != token.id,
    }
    if choice := trace.choice:
        entry["search"] = {name: float(f"{getattr(choice, name):.6g}") for name in SEARCHED}
    entry["fused"] = named(trace.fused)
    entry["members"] = {
        member: {"id": own.token, "name": name(own.token), "top": named(own.top_logprobs)}
        for member, own in trace.members.items()
    }
    return entry
