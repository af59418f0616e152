"""Continuous batching: which generations take part in the next step, and in which sequence of the KV caches.

Generations wait in line, join as soon as a sequence and room in the caches are free, and leave when they are done.
Where the caches run full, first the texts that finished generations left are forgotten, then the youngest generation
gives its place up and waits again: its picks depend on (seed, position, text) alone, so that it goes on as if nothing
had happened once there is room.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from itertools import islice

from ..params import MAX_DRAFT
from .decoder import WORTH_SHARING, Decoder
from .generation import Generation, StepResult

HEADROOM = 16
"""Positions kept free for each generation that is being decoded when another one joins."""
_IDLE_S = 0.05
"""Seconds to wait for a constraint while there is nothing else to decode."""

FEW = 8
"""Tokens that a text may differ by at the end from the one that it goes on with: what ends an answer is not kept."""


class Scheduler:
    """Runs generations over one decoder, up to as many at once as its members have sequences."""

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self._ensemble = decoder.ensemble
        self._waiting: deque[Generation] = deque()
        self._active: list[Generation] = []
        self._idle = list(range(decoder.ensemble.n_seq_max))

    @property
    def n_waiting(self) -> int:
        """Generations that have no sequence yet."""
        return len(self._waiting)

    @property
    def n_active(self) -> int:
        """Generations that are being decoded."""
        return len(self._active)

    @property
    def n_picked(self) -> int:
        """Tokens picked so far for generations that are still here; may be asked from another thread."""
        return sum(generation.n_picked for generation in [*self._active, *self._waiting])

    def add(self, generation: Generation) -> None:
        """Let a generation join the line."""
        self._waiting.append(generation)

    def remove(self, generation: Generation) -> None:
        """Take a generation out, done or not. What it leaves in the caches serves later ones that begin alike."""
        if generation in self._active:
            self._active.remove(generation)
            self._idle.append(generation.seq)
        elif generation in self._waiting:
            self._waiting.remove(generation)

    def rewind(self, generation: Generation, n_tokens: int) -> None:
        """Take back the last `n_tokens` picks of an active generation."""
        if n_tokens:
            self.decoder.rewind(generation, n_tokens)

    def step(self, n_prefill: int | None = None, on_decode: Callable[[], None] | None = None) -> list[StepResult]:
        """Run one step of all generations that have a sequence. A generation stays until it is removed.

        n_prefill: prompt tokens that the step evaluates beside what it decodes; None for as many as fit into a batch.
        on_decode: called just before the members compute.
        """
        started = self._ensemble.clock()
        self._admit()
        n_room = self._make_room()
        if self._ensemble.has_streams:
            self._pack()
        n_most = n_room if n_prefill is None else min(n_room, n_prefill)
        ready = [active for active in self._active if not active.is_waiting()]
        if self._active and not ready:
            if on_decode:
                on_decode()
            self._active[0].is_waiting(_IDLE_S)
        results = self.decoder.step(ready, n_most, on_decode) if ready else []
        elapsed = self._ensemble.clock() - started
        for result in results:
            result.generation.count_step(len(result.picks), elapsed)
        return results

    def _admit(self) -> None:
        """Give sequences to those who wait, in order."""
        while self._waiting and self._idle:
            generation = self._waiting[0]
            if self._active and (self._should_wait(generation) or not self._has_room(generation)):
                return
            generation.seq = self._sequence_for(generation)
            self.decoder.begin(generation, islice(self._waiting, 1, 1 + self._ensemble.n_seq_max))
            self._waiting.popleft()
            self._idle.remove(generation.seq)
            self._active.append(generation)

    def _should_wait(self, generation: Generation) -> bool:
        """Whether another generation is about to evaluate a prefix that this one can share then."""
        name = generation.members[0]
        text = generation.text(name)
        n_shared = self._ensemble.n_known(name, text) + WORTH_SHARING
        begun = text[:n_shared]
        return len(begun) == n_shared and any(
            [*active.request.prompts.get(name, ())[:n_shared]] == begun and self.decoder.n_due(active) > 1
            for active in self._active
        )

    def _has_room(self, generation: Generation) -> bool:
        """Whether the whole text fits, and the others can grow a bit, once idle texts that are in the way are gone, of
        which the one that this text begins with goes last."""
        n_others = sum(self.decoder.n_due(active) for active in self._active) + HEADROOM * (len(self._active) + 1)
        n_longest = max(map(generation.n_text, generation.members))

        def fits() -> bool:
            n_left = self._ensemble.n_free() - n_others
            return n_longest <= n_left or self.decoder.n_new(generation) <= n_left

        if fits():
            return True
        begun = self._begun_in(generation)
        for seq in [*(seq for seq in self._idle if seq != begun), begun]:
            self._ensemble.forget([seq])
            if fits():
                return True
        return False

    def _sequence_for(self, generation: Generation) -> int:
        """The idle sequence whose text this one goes on with, else the one idle for longest: a prefix that it has in
        common with another can be shared, and the other's text may be gone on with later."""
        name, seq = generation.members[0], self._begun_in(generation)
        n_common = self._ensemble.n_common(name, seq, generation.text(name))
        if self._ensemble.n_held(name, seq) - n_common > FEW:
            return self._idle[0]
        return seq

    def _begun_in(self, generation: Generation) -> int:
        """The idle sequence that holds the longest prefix of the text; of several the one idle for longest."""
        name = generation.members[0]
        text = generation.text(name)
        return max(self._idle, key=lambda seq: self._ensemble.n_common(name, seq, text))

    def _pack(self) -> None:
        """Let the sequences in use follow each other, with as few of them moved as that takes."""
        in_use = {generation.seq for generation in self._active}
        if not in_use or max(in_use) - min(in_use) < len(in_use):
            return
        starts = range(self._ensemble.n_seq_max - len(in_use) + 1)
        first = max(starts, key=lambda start: len(in_use.intersection(range(start, start + len(in_use)))))
        wanted = range(first, first + len(in_use))
        free = (seq for seq in wanted if seq not in in_use)
        for generation in self._active:
            if generation.seq not in wanted:
                seq = next(free)
                self._ensemble.swap(generation.seq, seq)
                self._idle[self._idle.index(seq)] = generation.seq
                generation.seq = seq

    def _make_room(self) -> int:
        """See to it that the next step finds room; returns the tokens of prompts that it has room for."""
        idle = iter(list(self._idle))
        while True:
            n_picking = sum(self.decoder.n_due(active) == 1 for active in self._active)
            n_wanted = n_picking + (MAX_DRAFT if len(self._active) == 1 else 0) + (n_picking < len(self._active))
            n_free = self._ensemble.n_free()
            if n_free >= n_wanted:
                return n_free - n_picking
            if (seq := next(idle, None)) is not None:
                self._ensemble.forget([seq])
            elif len(self._active) > 1:
                youngest = self._active.pop()
                self._ensemble.forget([youngest.seq])
                self._idle.append(youngest.seq)
                self._waiting.appendleft(youngest)
            else:
                return max(0, n_free - n_picking)
