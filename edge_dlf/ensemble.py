"""Large, base and experts in lock-step: the same new tokens to every member that takes part, and their rows back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

from .backend import Backend, Logits
from .errors import ContextOverflowError, InvalidParameterError
from .params import METHODS, FusionParams


@dataclass(frozen=True)
class Roles:
    """Members that a method decodes: `primary` gives the row to fuse into, `base` and `experts` the differences."""

    primary: str
    base: str | None = None
    experts: tuple[str, ...] = ()

    @property
    def members(self) -> tuple[str, ...]:
        return (self.primary, *([self.base] if self.base else []), *self.experts)


@dataclass(frozen=True)
class Rows:
    """Logits of one step, read in place, (K, width) each, valid until the next call. base: None if nothing is fused."""

    primary: Logits
    base: Logits | None
    experts: tuple[Logits, ...]

    def part(self, start: int, stop: int | None) -> Rows:
        """Rows `start` to `stop` of every member."""
        base = None if self.base is None else self.base[start:stop]
        return Rows(self.primary[start:stop], base, tuple(expert[start:stop] for expert in self.experts))


class Ensemble:
    """The members of a family by role name: "large", "base" and the experts' own names.

    n_vocab: tokens that all members share; what lies beyond in longer rows is padding.
    n_ctx: positions that every member has for one sequence.
    """

    def __init__(self, members: Mapping[str, Backend], n_vocab: int) -> None:
        self.members = dict(members)
        self.experts = tuple(name for name in members if name not in ("large", "base"))
        self.n_vocab = n_vocab
        self.n_ctx = min(member.n_ctx for member in members.values())
        self._held: dict[str, dict[int, list[int]]] = {name: {} for name in members}

    def roles(self, params: FusionParams) -> Roles:
        """Who takes part in `params.method`. Raises InvalidParameterError for a name that no member has."""
        if params.method in ("dynamic", "static"):
            return Roles("large", "base", self.experts)
        if params.method not in self.members:
            raise InvalidParameterError(f"method {params.method!r} is none of {', '.join((*METHODS, *self.experts))}")
        return Roles(params.method)

    def static_alphas(self, params: FusionParams) -> tuple[float, ...]:
        """α of each expert for method "static". Raises InvalidParameterError for a name that no expert has."""
        if not isinstance(params.alpha, Mapping):
            return (float(params.alpha),) * len(self.experts)
        if unknown := sorted(set(params.alpha) - set(self.experts)):
            raise InvalidParameterError(f"alpha names {unknown[0]!r}; the experts are {', '.join(self.experts)}")
        return tuple(float(params.alpha.get(name, 0.0)) for name in self.experts)

    def prefill(self, seq: int, prompts: Mapping[str, Sequence[int]]) -> int:
        """Make `seq` hold each member's prompt, evaluating only what differs from what it holds already; `rows` is then
        the rows after the last tokens.

        Returns how many tokens of the longest prompt were evaluated. Raises ContextOverflowError before any decode.
        """
        for name, tokens in prompts.items():
            if len(tokens) > self.members[name].n_ctx:
                raise ContextOverflowError(
                    f"the prompt has {len(tokens)} tokens, the context of {name} only {self.members[name].n_ctx}"
                )
        n_evaluated = 0
        for name, tokens in prompts.items():
            member = self.members[name]
            held = self._held[name].pop(seq, [])
            n_common = _common_prefix(held, tokens)
            n_kept = min(n_common, len(tokens) - 1)
            if not member.can_trim and n_kept < max(len(held), member.n_past(seq)):
                n_kept = 0
            member.trim(seq, n_kept)
            self._held[name][seq] = list(tokens[:n_kept])
            rest = tokens[n_kept:]
            self._append(name, [(seq, rest)], partial(member.prefill, seq, rest))
            n_evaluated = max(n_evaluated, len(rest))
        return n_evaluated

    def decode(self, name: str, tokens: Sequence[tuple[int, Sequence[int]]]) -> None:
        """Append new tokens to the member `name`, in one batch."""
        self._append(name, tokens, partial(self.members[name].decode, tokens))

    def n_held(self, name: str, seq: int) -> int:
        """Tokens of `seq` that the member `name` has evaluated."""
        return len(self._held[name].get(seq, ()))

    def shorten(self, name: str, seq: int, n_tokens: int) -> None:
        """Let the member `name` forget all of `seq` from position `n_tokens` on."""
        held = self._held[name][seq]
        if n_tokens < len(held):
            self.members[name].trim(seq, n_tokens)
            del held[n_tokens:]

    def rows(self, roles: Roles) -> Rows:
        """Rows of the last `prefill` or `decode`."""
        return Rows(
            self.members[roles.primary].logits(),
            self.members[roles.base].logits() if roles.base else None,
            tuple(self.members[name].logits() for name in roles.experts),
        )

    def _append(self, name: str, tokens: Sequence[tuple[int, Sequence[int]]], evaluate: Callable[[], None]) -> None:
        """Call `evaluate`, by which the member `name` appends `tokens`, and keep account of what it holds."""
        before = {seq: self._held[name].pop(seq) for seq, _ in tokens}
        if self.members[name].can_trim:
            # An interrupt may strike after the member's cache has grown; the next prefill trims it back to this.
            self._held[name].update(before)
        evaluate()
        for seq, ids in tokens:
            before[seq].extend(ids)
        self._held[name].update(before)

    def close(self) -> None:
        """Close every member."""
        for member in self.members.values():
            member.close()


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    length = min(len(a), len(b))
    return next((i for i in range(length) if a[i] != b[i]), length)
