"""The members of a family in lock-step: what each KV cache holds, and batches for all of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from ..errors import EdgeDLFError, InvalidParameterError, shown
from ..params import METHODS, FusionParams, Overlap, check_names
from .backend import N_ROWS, Backend, Logits, Run
from .cache_index import CacheIndex, common_prefix
from .prompt_cache import WORTH_KEEPING, WORTH_READING, PromptCache, Tokens
from .threads import GroupThreads
from .token_map import TokenMap


@dataclass(frozen=True)
class Roles:
    """Members that a method decodes.

    members: their names. Penalties and noise go by the text of the first one.
    experts: those of them whose weights α are reported, the last of the members.
    weights: fixed weights: α of each expert, or, with "weighted", "blend" or correctors, the weight of each member; ()
        where one member answers alone, None where α is searched for at each step.
    """

    members: tuple[str, ...]
    experts: tuple[str, ...] = ()
    weights: tuple[float, ...] | None = ()

    @classmethod
    def of(cls, params: FusionParams, names: Sequence[str], correctors: Collection[str] = ()) -> Roles:
        """Return who takes part in `params.method` of all members `names`: "large", "base" and the experts.

        correctors: those experts whose logits are added to the large model's as they are, without the base's.

        Raises InvalidParameterError for a name that no member has, and for what a corrector cannot do.
        """
        experts = tuple(name for name in names if name not in ("large", "base"))
        check_names(params, experts)
        roles = cls._unchecked(params, names, experts, correctors)
        if correctors:
            _check_correctors(params, names, roles, [name for name in experts if name in correctors])
        return roles

    @classmethod
    def _unchecked(
        cls, params: FusionParams, names: Sequence[str], experts: tuple[str, ...], correctors: Collection[str]
    ) -> Roles:
        if params.method == "dynamic":
            return cls(("large", "base", *experts), experts, None)
        if params.method == "static":
            alpha = params.alpha if isinstance(params.alpha, Mapping) else dict.fromkeys(experts, params.alpha)
            alphas = {name: float(alpha.get(name, 0.0)) for name in experts}
            if not correctors:
                return cls(("large", "base", *experts), experts, tuple(alphas.values()))
            to_base = -sum(alphas[name] for name in experts if name not in correctors)
            return cls._weighted({"large": 1.0, "base": to_base, **alphas}, names, experts)
        if params.method == "blend":
            return cls._weighted({"large": 0.5, **dict.fromkeys(experts, 0.5 / len(experts))}, names, experts)
        if params.method == "weighted":
            return cls._weighted(params.weights or {}, names, experts)
        if params.method not in (*names, "base"):
            methods = ", ".join((*METHODS, *experts))
            raise InvalidParameterError(f"method must be one of {methods}, not {shown(params.method)}")
        return cls((params.method,))

    @classmethod
    def _weighted(cls, weights: Mapping[str, float], names: Sequence[str], experts: Sequence[str]) -> Roles:
        """Return the members whose weight is not 0."""
        members = tuple(name for name in names if weights.get(name))
        taking_part = tuple(name for name in members if name in experts)
        return cls(members, taking_part, tuple(float(weights[name]) for name in members))

    def alphas(self, weights: Sequence[float] | None = None) -> tuple[float, ...]:
        """Return α of each expert among the weights of a pick, or among the fixed ones; () if none are fixed."""
        weights = tuple(self.weights or () if weights is None else weights)
        return weights[len(weights) - len(self.experts) :] if weights else ()


def _check_correctors(params: FusionParams, names: Sequence[str], roles: Roles, correctors: Sequence[str]) -> None:
    """Raise InvalidParameterError where a method asks of these correctors, or of a base, what they cannot do."""
    who = " and ".join(correctors)
    asks_for_base = params.method == "base" or (params.method == "weighted" and (params.weights or {}).get("base"))
    if asks_for_base and "base" not in names:
        raise InvalidParameterError(f"there is no base to decode: {who} is added to the large model as it is")
    if params.method == "dynamic":
        raise InvalidParameterError(
            f"method dynamic finds α from what experts change in a base; {who} is added without one: "
            "use static or weighted"
        )
    if params.method == "blend":
        raise InvalidParameterError(
            f"method blend takes a half of the large model; {who} corrects the whole of it: use static or weighted"
        )
    taking_part = [name for name in correctors if name in roles.members]
    if taking_part and "large" not in roles.members:
        raise InvalidParameterError(
            f"{taking_part[0]} is a corrector: its logits mean nothing unless the large model's are added to them; "
            "use static, or weighted with a weight for large"
        )
    if taking_part and params.plausibility:
        raise InvalidParameterError(
            f"plausibility goes by what an expert finds likely alone; {taking_part[0]} is a corrector"
        )


class Ensemble:
    """The members of a family by role name: "large", "base" and the experts' own names.

    members: those in memory. names: those, and the ones that `require` can load.
    correctors: experts that correct the large model without the base, as `Roles.of` takes them.
    n_vocab: tokens that all members share. What lies beyond in longer rows is padding.
    maps: ids of those members whose own ids differ from the family's.
    prompt_cache: what keeps texts for later processes. state_keys: for it, all that each member's states depend on.
    n_ctx: positions that every member has for one sequence.
    n_batch: tokens that every member can evaluate in one batch.
    n_rows: rows of logits that every member can give for one batch.
    groups: names of members that share a device, a tuple for each device. Members of one group run one after the
        other; groups overlap as `overlap` says. Groups whose calls return early, as a GPU's do, come first.
    """

    def __init__(
        self,
        members: Mapping[str, Backend],
        n_vocab: int,
        groups: Sequence[Sequence[str]] = (),
        clock: Callable[[], float] = time.perf_counter,
        names: Sequence[str] = (),
        load: Callable[[Sequence[str]], Mapping[str, Backend]] = lambda names: {},
        correctors: Collection[str] = (),
        maps: Mapping[str, TokenMap] | None = None,
        prompt_cache: PromptCache | None = None,
        state_keys: Mapping[str, bytes] | None = None,
    ) -> None:
        self.members = dict(members)
        self.maps = maps or {}
        self.prompt_cache, self._state_keys = prompt_cache, state_keys or {}
        self.names = tuple(names) or tuple(members)
        self.correctors = frozenset(correctors)
        self._load, self._loading = load, threading.Lock()
        self.clock = clock
        self.groups = tuple(groups) or (self.names,)
        self.overlap: Overlap = "queue"
        self.experts = tuple(name for name in self.names if name not in ("large", "base"))
        self.n_vocab = n_vocab
        self.n_ctx = min(member.n_ctx for member in members.values())
        self.n_batch = min(member.n_batch for member in members.values())
        self.n_seq_max = min(member.n_seq_max for member in members.values())
        self.n_rows = max(N_ROWS, self.n_seq_max)
        self.has_streams = all(member.has_streams for member in members.values())
        self._threads = GroupThreads()
        self._caches = {name: CacheIndex() for name in members}

    def roles(self, params: FusionParams) -> Roles:
        """Return who takes part in `params.method`. Raises InvalidParameterError as `Roles.of`."""
        return Roles.of(params, self.names, self.correctors)

    def require(self, names: Iterable[str]) -> None:
        """Load those of `names` that are not in memory. May be called from any thread, beside a step.

        Raises LoadError or OutOfMemoryError; those in memory go on.
        """
        with self._loading:
            if missing := [name for name in names if name not in self.members]:
                known = {**self.members, **self._load(missing)}
                self._caches = {**self._caches, **{name: CacheIndex() for name in missing}}
                self.members = {name: known[name] for name in self.names if name in known}

    def decode(
        self, runs: Mapping[str, Sequence[Run]], on_decode: Callable[[], None] | None = None
    ) -> dict[str, Logits]:
        """Append to each member what `runs` has for it, in one batch per member.

        on_decode: called just before members compute, which is when other threads may run Python.
        Returns the rows of each member that was asked for any, (K, width), valid until the member's next call.
        Raises what a member raises. Then others may have been decoded or not, and none is still computing.
        """
        if on_decode:
            on_decode()
        groups = [[name for name in group if runs.get(name)] for group in self.groups]
        jobs = [partial(self._decode_group, group, runs) for group in groups if group]
        if self.overlap == "threads" and len(jobs) > 1:
            self._threads.run(jobs)
        else:
            for job in jobs:
                job()
        return {name: self._rows(name) for name in runs if any(run.n_rows for run in runs[name])}

    def _rows(self, name: str) -> Logits:
        """The rows that a member was asked for, in the family's ids."""
        rows, ids = self.members[name].logits(), self.maps.get(name)
        return ids.rows(rows) if ids else rows

    def _decode_group(self, names: Sequence[str], runs: Mapping[str, Sequence[Run]]) -> None:
        """Decode the members of one group, one after the other."""
        for name in names:
            cache = self._caches[name]
            if cache.unsure:
                self._repair(name)
            cache.unsure.update(run.seq for run in runs[name])
            ids = self.maps.get(name)
            self.members[name].decode(ids.runs(runs[name]) if ids else runs[name])
            for run in runs[name]:
                cache.append(run.seq, run.tokens)
            cache.unsure.clear()
            if self.overlap == "off":
                self.members[name].wait()

    def begin(self, name: str, seq: int, tokens: Sequence[int]) -> int:
        """Make `seq` of the member `name` hold the longest known prefix of `tokens`, at most all but the last token:
        its own, one shared with another sequence, or one that the prompt cache has. Returns the length of that prefix.
        """
        self._repair(name)
        if n_read := self._read_kept(name, seq, tokens[:-1]):
            return n_read
        own = self.members[name].reach(seq, min(self.n_common(name, seq, tokens), len(tokens) - 1))
        best, shared = self._best_known(name, tokens[:-1])
        if shared <= own:
            self.shorten(name, seq, own)
            return own
        self.shorten(name, seq, 0)
        self._caches[name].unsure.add(seq)
        self.members[name].copy(best, seq, shared)
        self._caches[name].copy(best, seq, shared)
        self._caches[name].unsure.discard(seq)
        return shared

    def _read_kept(self, name: str, seq: int, tokens: Sequence[int]) -> int:
        """Make `seq` hold what the prompt cache has of `tokens`, if that is worth it beside what is known. Returns
        their number, or 0."""
        kept, member, cache = self.prompt_cache, self.members[name], self._caches[name]
        if kept is None or len(tokens) < (n_known := self.n_known(name, tokens)) + WORTH_READING:
            return 0
        key, own = self._state_keys[name], self._own_ids(name, tokens)
        n_room = min(member.n_ctx, member.n_cells - cache.n_used + cache.n_alone(seq))
        while found := kept.find(key, own, can_cut=member.can_cut, n_most=n_room):
            if found.n_common - n_known < max(WORTH_READING, len(found.tokens) // 32):
                break
            if (state := kept.read(key, found)) is None:
                continue
            self.shorten(name, seq, 0)
            cache.unsure.add(seq)
            if is_loaded := member.load(seq, len(found.tokens), state):
                member.trim(seq, found.n_common)
                cache.append(seq, tokens[: found.n_common])
            cache.unsure.discard(seq)
            if is_loaded:
                member.checkpoint(seq, lasting=True)
                return found.n_common
            kept.reject(key, found.name, f"is nothing that llama.cpp takes for {name}")
        return 0

    def keep(self, names: Iterable[str], seq: int, n_new: int = WORTH_KEEPING) -> None:
        """Let the prompt cache keep what `seq` of these members holds, of each that has `n_new` tokens more than is
        kept already."""
        if (kept := self.prompt_cache) is None:
            return
        texts = []
        for name in names:
            self._repair(name)
            member, key, own = self.members[name], self._state_keys[name], self._own_ids(name, self.held(name, seq))
            if len(own) >= n_new and len(own) - kept.n_kept(key, own, can_cut=member.can_cut) >= n_new:
                try:
                    texts.append((key, own, member.save(seq), member.can_cut))
                except EdgeDLFError as error:
                    kept.note(f"prompts are not kept: {error}")
        if texts:
            kept.keep(texts)

    def keep_all(self, n_new: int = WORTH_READING) -> None:
        """Let the prompt cache keep what every sequence holds, as `keep` does."""
        for seq in range(self.n_seq_max):
            self.keep(tuple(self.members), seq, n_new)

    def kept_parting(self, name: str, tokens: Sequence[int]) -> int:
        """Return the most tokens that a text has in common with one that the prompt cache has of this member, if a
        later text with the same beginning could profit from it; else 0."""
        if self.prompt_cache is None:
            return 0
        n_common = self.prompt_cache.parting(self._state_keys[name], self._own_ids(name, tokens))
        return n_common if n_common >= WORTH_KEEPING else 0

    def can_cut(self, name: str) -> bool:
        """Return whether every later text can use any part of what the member `name` reads now."""
        member = self.members[name]
        return member.can_trim if self.prompt_cache is None else member.can_cut

    def _own_ids(self, name: str, tokens: Sequence[int]) -> Tokens:
        ids = self.maps.get(name)
        return (ids.reads[list(tokens)] if ids else np.array(tokens)).astype(np.int32)

    def swap(self, a: int, b: int) -> None:
        """Exchange what two sequences hold, in every member. An exception leaves both empty. Needs `has_streams`."""
        try:
            for name, member in self.members.items():
                self._repair(name)
                member.swap(a, b)
                self._caches[name].swap(a, b)
        except BaseException:
            for cache in self._caches.values():
                cache.shorten(a, 0)
                cache.shorten(b, 0)
                cache.unsure.update((a, b))
            raise

    def _repair(self, name: str) -> None:
        """Make the cache match its record after an interrupt, as far as the member can still reach it."""
        cache, member = self._caches[name], self.members[name]
        for seq in sorted(cache.unsure):
            cache.shorten(seq, member.reach(seq, self.n_held(name, seq)))
            member.trim(seq, self.n_held(name, seq))
            cache.unsure.discard(seq)

    def texts(self, name: str) -> Collection[Sequence[int]]:
        """Return what each sequence of the member `name` holds."""
        return self._caches[name].tokens.values()

    def held(self, name: str, seq: int) -> Sequence[int]:
        """Return the tokens of `seq` that the member `name` has evaluated."""
        return self._caches[name].tokens.get(seq, ())

    def n_held(self, name: str, seq: int) -> int:
        """Count them."""
        return len(self._caches[name].tokens.get(seq, ()))

    def n_common(self, name: str, seq: int, tokens: Sequence[int]) -> int:
        """Return the length of the longest common prefix of `tokens` and what `seq` of the member `name` holds."""
        return common_prefix(self.held(name, seq), tokens)

    def n_known(self, name: str, tokens: Sequence[int]) -> int:
        """Return the length of the longest prefix of `tokens` that any sequence of the member `name` can share."""
        return self._best_known(name, tokens)[1]

    def _best_known(self, name: str, tokens: Sequence[int]) -> tuple[int, int]:
        """Return the sequence of the member `name` that can share the longest prefix of `tokens`, and its length."""
        best, n_best = 0, 0
        for seq, held in self._caches[name].tokens.items():
            if n_best < min(len(held), len(tokens)) and held[n_best] == tokens[n_best]:
                n_common = self.members[name].reach(seq, common_prefix(held, tokens))
                if n_common > n_best:
                    best, n_best = seq, n_common
        return best, n_best

    def n_used(self, name: str) -> int:
        """Count the positions that the member `name` holds. Those that sequences share count once."""
        return self._caches[name].n_used

    def n_free(self) -> int:
        """Count the positions that every member still has room for."""
        return min(member.n_cells - self._caches[name].n_used for name, member in self.members.items())

    def shorten(self, name: str, seq: int, n_tokens: int) -> None:
        """Let the member `name` forget all of `seq` from position `n_tokens` on, and more where it cannot go back to
        just there."""
        self._repair(name)
        if n_tokens < self.n_held(name, seq):
            n_tokens = self.members[name].reach(seq, n_tokens)
            self.members[name].trim(seq, n_tokens)
            self._caches[name].shorten(seq, n_tokens)

    def forget(self, seqs: Iterable[int] | None = None) -> None:
        """Let every member forget these sequences, or all."""
        for seq in range(self.n_seq_max) if seqs is None else seqs:
            for name in self.members:
                self.shorten(name, seq, 0)

    def close(self) -> None:
        """Close every member, once what is being kept is written."""
        if self.prompt_cache:
            self.prompt_cache.close()
        self._threads.close()
        for member in self.members.values():
            member.close()
