"""Large, base and experts in lock-step: what each KV cache holds and so need not evaluate again, and their rows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import compress, count
from operator import ne

from ..errors import InvalidParameterError
from ..params import METHODS, FusionParams, Overlap
from .backend import Backend, Logits, Run
from .lanes import Lanes


@dataclass(frozen=True)
class Roles:
    """Members that a method decodes: `primary` gives the row to fuse into, `base` and `experts` the differences."""

    primary: str
    base: str | None = None
    experts: tuple[str, ...] = ()

    @cached_property
    def members(self) -> tuple[str, ...]:
        return (self.primary, *([self.base] if self.base else []), *self.experts)


@dataclass(frozen=True)
class Rows:
    """Logits of one step, read in place, (K, width) each, valid until the next call. base: None if nothing is fused."""

    primary: Logits
    base: Logits | None
    experts: tuple[Logits, ...]

    @property
    def members(self) -> tuple[Logits, ...]:
        """In the order of the members of the roles."""
        return (self.primary, *([] if self.base is None else [self.base]), *self.experts)


class _Account:
    """What one member's cache holds: the tokens of each sequence, and the cells they take.

    Sequences that share a prefix share its cells: each position of a sequence names its cell. n_used: cells in use.
    unsettled: sequences that an interrupt left with more than is accounted for.
    """

    def __init__(self) -> None:
        self.tokens: dict[int, list[int]] = {}
        self.n_used = 0
        self.unsettled: set[int] = set()
        self._cells: dict[int, list[int]] = {}
        self._sharers: Counter[int] = Counter()
        self._n_made = 0

    def append(self, seq: int, tokens: Sequence[int]) -> None:
        self.tokens.setdefault(seq, []).extend(tokens)
        self._cells.setdefault(seq, []).extend(range(self._n_made, self._n_made + len(tokens)))
        self._n_made += len(tokens)
        self.n_used += len(tokens)

    def shorten(self, seq: int, n_tokens: int) -> None:
        if seq in self.tokens:
            for cell in self._cells[seq][n_tokens:]:
                if self._sharers[cell]:
                    self._sharers[cell] -= 1
                else:
                    del self._sharers[cell]
                    self.n_used -= 1
            del self.tokens[seq][n_tokens:], self._cells[seq][n_tokens:]

    def copy(self, source: int, target: int, n_tokens: int) -> None:
        self.tokens[target] = self.tokens[source][:n_tokens]
        self._cells[target] = self._cells[source][:n_tokens]
        self._sharers.update(self._cells[target])

    def swap(self, a: int, b: int) -> None:
        for held in (self.tokens, self._cells):
            held[a], held[b] = held.get(b, []), held.get(a, [])


class Ensemble:
    """The members of a family by role name: "large", "base" and the experts' own names.

    n_vocab: tokens that all members share; what lies beyond in longer rows is padding. n_ctx: positions that every
    member has for one sequence. n_batch: tokens that every member can evaluate at once. lanes: members by what computes
    them; those of one lane, as all on the CPU are, are decoded in turn, the lanes as `overlap` says. Lanes that return
    before they are done, as a GPU's do, come first. before_decode: called before members compute, which is when other
    threads may run Python.
    """

    def __init__(self, members: Mapping[str, Backend], n_vocab: int, lanes: Sequence[Sequence[str]] = ()) -> None:
        self.members = dict(members)
        self.lanes = tuple(lanes) or (tuple(members),)
        self.overlap: Overlap = "queue"
        self.before_decode: Callable[[], None] = lambda: None
        self._threads = Lanes()
        self.experts = tuple(name for name in members if name not in ("large", "base"))
        self.n_vocab = n_vocab
        self.n_ctx = min(member.n_ctx for member in members.values())
        self.n_batch = min(member.n_batch for member in members.values())
        self.n_seq_max = min(member.n_seq_max for member in members.values())
        self._accounts = {name: _Account() for name in members}

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

    def begin(self, name: str, seq: int, tokens: Sequence[int]) -> int:
        """Make `seq` of the member `name` hold the longest known prefix of `tokens`, at most all but the last: its own,
        or one shared with another sequence. Returns the prefix's length."""
        self._settle(name)
        own = min(self.n_common(name, seq, tokens), len(tokens) - 1)
        if not self.members[name].can_trim:
            kept = own if own == self.n_held(name, seq) else 0
            self.shorten(name, seq, kept)
            return kept
        best, n_known = self._best_known(name, tokens)
        shared = min(n_known, len(tokens) - 1)
        if shared <= own:
            self.shorten(name, seq, own)
            return own
        self.shorten(name, seq, 0)
        self._accounts[name].unsettled.add(seq)
        self.members[name].copy(best, seq, shared)
        self._accounts[name].copy(best, seq, shared)
        self._accounts[name].unsettled.discard(seq)
        return shared

    @property
    def has_streams(self) -> bool:
        """Whether every member evaluates a batch sooner if its sequences follow each other."""
        return all(member.has_streams for member in self.members.values())

    def swap(self, a: int, b: int) -> None:
        """Exchange what two sequences hold, in every member. An exception leaves both empty. Needs `has_streams`."""
        try:
            for name, member in self.members.items():
                self._settle(name)
                member.swap(a, b)
                self._accounts[name].swap(a, b)
        except BaseException:
            for account in self._accounts.values():
                account.shorten(a, 0)
                account.shorten(b, 0)
                account.unsettled.update((a, b))
            raise

    def decode(self, name: str, runs: Sequence[Run]) -> None:
        """Append `runs` to the member `name`, in one batch."""
        self.before_decode()
        self._decode(name, runs)

    def _decode(self, name: str, runs: Sequence[Run]) -> None:
        self._settle(name)
        account = self._accounts[name]
        account.unsettled.update(run.seq for run in runs)
        self.members[name].decode(runs)
        for run in runs:
            account.append(run.seq, run.tokens)
        account.unsettled.clear()

    @property
    def overlaps(self) -> bool:
        """Whether members are decoded at the same time."""
        return len(self.lanes) > 1 and self.overlap != "off"

    def decode_all(self, runs: Mapping[str, Sequence[Run]]) -> None:
        """Append to each member what `runs` has for it, in one batch a member. Raises what one of them raises; then
        others may have been decoded or not, and none is still at it."""
        self.before_decode()
        lanes = [[name for name in lane if name in runs] for lane in self.lanes]
        jobs = [partial(self._decode_in_turn, lane, runs) for lane in lanes if lane]
        if self.overlap == "threads" and len(jobs) > 1:
            self._threads.run(jobs)
        else:
            for job in jobs:
                job()

    def _decode_in_turn(self, names: Sequence[str], runs: Mapping[str, Sequence[Run]]) -> None:
        for name in names:
            self._decode(name, runs[name])
            if self.overlap == "off":
                self.members[name].wait()

    def _settle(self, name: str) -> None:
        """After an interrupt, make the cache what the account says of it; what cannot be trimmed is emptied."""
        account, member = self._accounts[name], self.members[name]
        for seq in sorted(account.unsettled):
            if not member.can_trim:
                account.shorten(seq, 0)
            member.trim(seq, self.n_held(name, seq))
            account.unsettled.discard(seq)

    def n_held(self, name: str, seq: int) -> int:
        """Tokens of `seq` that the member `name` has evaluated."""
        return len(self._accounts[name].tokens.get(seq, ()))

    def n_common(self, name: str, seq: int, tokens: Sequence[int]) -> int:
        """Length of the longest common prefix of `tokens` and what `seq` of the member `name` holds."""
        return common_prefix(self._accounts[name].tokens.get(seq, ()), tokens)

    def n_known(self, name: str, tokens: Sequence[int]) -> int:
        """Length of the longest prefix of `tokens` that any sequence of the member `name` holds."""
        return self._best_known(name, tokens)[1]

    def _best_known(self, name: str, tokens: Sequence[int]) -> tuple[int, int]:
        """The sequence of the member `name` that holds the longest prefix of `tokens`, and the prefix's length."""
        best, n_best = 0, 0
        for seq, held in self._accounts[name].tokens.items():
            if n_best < min(len(held), len(tokens)) and held[n_best] == tokens[n_best]:
                n_common = common_prefix(held, tokens)
                if n_common > n_best:
                    best, n_best = seq, n_common
        return best, n_best

    def n_used(self, name: str) -> int:
        """Positions that the member `name` holds, those that sequences share counted once."""
        return self._accounts[name].n_used

    def n_free(self) -> int:
        """Positions that every member still has room for."""
        return min(member.n_cells - self._accounts[name].n_used for name, member in self.members.items())

    def shorten(self, name: str, seq: int, n_tokens: int) -> None:
        """Let the member `name` forget all of `seq` from position `n_tokens` on."""
        if n_tokens < self.n_held(name, seq):
            self.members[name].trim(seq, n_tokens)
            self._accounts[name].shorten(seq, n_tokens)

    def forget(self, seqs: Iterable[int]) -> None:
        """Let every member forget these sequences."""
        for seq in seqs:
            for name in self.members:
                self._settle(name)
                self.shorten(name, seq, 0)

    def rows(self, roles: Roles, first: Mapping[str, int], n_rows: int) -> Rows:
        """`n_rows` rows of the last `decode` of each member, from row `first` of the member on."""

        def of(name: str) -> Logits:
            start, logits = first.get(name, 0), self.members[name].logits()
            return logits if start == 0 and n_rows == len(logits) else logits[start : start + n_rows]

        return Rows(of(roles.primary), of(roles.base) if roles.base else None, tuple(map(of, roles.experts)))

    def close(self) -> None:
        """Close every member."""
        self._threads.close()
        for member in self.members.values():
            member.close()


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the longest common prefix."""
    return next(compress(count(), map(ne, a, b)), min(len(a), len(b)))
