"""From picks to tokens with text: every answer, streamed or not, alone or beside others, goes through `Driver`."""

from __future__ import annotations

import dataclasses
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any, Literal

from ..engine.decoder import Decoder
from ..engine.generation import Counts, Generation, StepResult
from ..engine.scheduler import Scheduler
from ..errors import EdgeDLFError
from ..fusion.records import Pick
from .message import Delta, MessageStream
from .token import Token

FinishReason = Literal["stop", "length", "tool_calls"]


@dataclass
class Report:
    """What one request did, filled in while its tokens come.

    n_prompt: tokens of the prompt.
    alpha_max: the upper bound of α.
    finish_reason: None until the answer has ended.
    n_reasoning: tokens of thinking, its tags included.
    counts: tokens, steps and seconds of the engine.
    """

    method: str
    experts: tuple[str, ...]
    n_prompt: int
    alpha_max: float = 0.0
    finish_reason: FinishReason | None = None
    n_generated: int = 0
    n_reasoning: int = 0
    alpha_sum: float = 0.0
    n_weighted: dict[str, int] = field(default_factory=dict)
    counts: Counts = field(default_factory=Counts)

    def add(self, token: Token, alphas: Sequence[float]) -> None:
        """Count one token and α of each expert behind it."""
        self.n_generated += 1
        self.alpha_sum += token.alpha
        for name, alpha in zip(self.experts, alphas, strict=False):
            self.n_weighted[name] = self.n_weighted.get(name, 0) + (alpha > 0)

    @property
    def alpha_mean(self) -> float:
        return self.alpha_sum / max(self.n_generated, 1)

    @property
    def expert_share(self) -> dict[str, float]:
        return {name: self.n_weighted.get(name, 0) / max(self.n_generated, 1) for name in self.experts}

    @property
    def n_cached(self) -> int:
        """Tokens of the prompt that were in the KV cache."""
        return max(0, self.n_prompt - self.counts.n_prefilled)

    @property
    def prompt_tps(self) -> float:
        return self.counts.n_prefilled / self.counts.prefill_s if self.counts.prefill_s else 0.0

    @property
    def generation_tps(self) -> float:
        return self.counts.n_decoded / self.counts.decode_s if self.counts.decode_s else 0.0

    def usage(self) -> dict[str, Any]:
        thought = {"completion_tokens_details": {"reasoning_tokens": self.n_reasoning}} if self.n_reasoning else {}
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_generated,
            "total_tokens": self.n_prompt + self.n_generated,
            **thought,
        }

    def summary(self) -> dict[str, Any]:
        """Return the `edge_dlf` field of a result."""
        return {
            "method": self.method,
            "alpha_mean": self.alpha_mean,
            "expert_share": self.expert_share,
            "prompt_tps": self.prompt_tps,
            "generation_tps": self.generation_tps,
            "n_drafted": self.counts.n_drafted,
            "n_accepted": self.counts.n_accepted,
        }


class Answer:
    """One request on its way: picks in, tokens out.

    tokens: those that have come and were not taken yet.
    piece: token -> bytes that it adds to the text.
    report: what was done, and whether the answer has ended.
    error: why the answer cannot go on.
    """

    def __init__(
        self, generation: Generation, piece: Callable[[int], bytes], text: MessageStream | None = None
    ) -> None:
        """piece: token -> bytes. text: what makes text of them."""
        request = generation.request
        self.generation = generation
        self.tokens: list[Token] = []
        self.error: EdgeDLFError | None = None
        roles = request.roles
        alpha_max = request.fusion.alpha_max if roles.weights is None else max(roles.alphas(), default=0.0)
        self.report = Report(
            request.fusion.method, roles.experts, generation.n_prompt, alpha_max, counts=generation.counts
        )
        self._text = text or MessageStream()
        self.piece = piece
        self._held: Token | None = None

    @property
    def has_ended(self) -> bool:
        return self.error is not None or self.report.finish_reason is not None

    def take(self) -> list[Token]:
        """Return the tokens that have come since the last call."""
        tokens, self.tokens = self.tokens, []
        return tokens

    def add(self, result: StepResult) -> int:
        """Take in what a step gave. Returns how many of its picks belong to the answer: none follow its end."""
        self.error = result.error
        for n, pick in enumerate(result.picks, 1):
            self._push(pick)
            if self.has_ended:
                return n
        return len(result.picks)

    def _push(self, pick: Pick) -> None:
        """Make a pick a token. It is held back while its text may be the beginning of a stop string."""
        request, text = self.generation.request, self._text
        if request.is_end(pick.token):
            self._finish("stop")
            return
        alphas = request.roles.alphas(pick.weights)
        was_reasoning = text.is_reasoning
        token = self._token(pick, alphas, text.push(self.piece(pick.token)))
        self.report.add(token, alphas)
        self.report.n_reasoning += was_reasoning or text.is_reasoning
        self.tokens += [self._held] if self._held else []
        self._held = token
        if text.stopped or self.report.n_generated == request.max_tokens:
            self._finish("stop" if text.stopped else "length")
        elif not text.holding:
            self.tokens.append(token)
            self._held = None

    def _finish(self, reason: FinishReason) -> None:
        last, rest = self._held, self._text.finish()
        self.report.finish_reason = "tool_calls" if reason == "stop" and self._text.n_calls else reason
        if last:
            text, reasoning = last.text + rest.text, last.reasoning + rest.reasoning
            calls = (*last.tool_calls, *rest.tool_calls)
            self.tokens.append(dataclasses.replace(last, text=text, reasoning=reasoning, tool_calls=calls))

    def _token(self, pick: Pick, alphas: Sequence[float], delta: Delta) -> Token:
        """Return the pick with its text. Of several weighted experts it names the first of the most weighted."""
        experts = self.generation.request.roles.experts
        t = max(range(len(alphas)), key=alphas.__getitem__, default=None)
        alpha = 0.0 if t is None else alphas[t]
        expert = experts[t] if t is not None and alpha > 0 else None
        return Token(
            pick.token, delta.text, pick.logprob, alpha, expert, pick.from_draft, pick.top_logprobs, pick.trace,
            delta.reasoning, delta.tool_calls,
        )  # fmt: skip


class Driver:
    """Steps the engine for every answer: of a stream, a batch, a score, or the server.

    Several threads may use it: each step is one thread's alone. A forked child may not: its models live in the parent.

    n_parallel: answers that are decoded at once. Further ones wait.
    decoder: for measurements.
    """

    def __init__(self, decoder: Decoder) -> None:
        self.decoder = decoder
        self.n_parallel = decoder.ensemble.n_seq_max
        self._scheduler = Scheduler(decoder)
        self._answers: dict[Generation, Answer] = {}
        self._lock = threading.RLock()
        self._is_closed = self._is_stepping = False
        self._leaving: list[Answer] = []
        self._pid = os.getpid()

    def __contains__(self, answer: Answer) -> bool:
        return answer.generation in self._answers

    def add(self, answer: Answer) -> None:
        """Let an answer join the line."""
        with self._alone():
            self._answers[answer.generation] = answer
            self._scheduler.add(answer.generation)

    def remove(self, answer: Answer) -> None:
        """Take an answer out, whether it has ended or not. What it leaves in the KV caches serves later ones."""
        if os.getpid() != self._pid:
            return
        with self._lock:
            if self._is_stepping:  # an abandoned generator is collected at any time
                self._leaving.append(answer)
            elif not self._is_closed:
                self._drop(answer)

    def _drop(self, answer: Answer) -> None:
        if self._answers.pop(answer.generation, None):
            self._scheduler.remove(answer.generation)

    def clear(self) -> list[Answer]:
        """Take every answer out, and return them."""
        with self._alone():
            answers = list(self._answers.values())
            for answer in answers:
                self._drop(answer)
            return answers

    def require_open(self) -> None:
        """Raise EdgeDLFError where no request can begin."""
        with self._alone():
            pass

    def close(self, *free: Callable[[], None]) -> None:
        """Take every answer out, and call `free` while no thread decodes. Every later request raises EdgeDLFError."""
        if self._is_closed or os.getpid() != self._pid:  # what a forked child has belongs to its parent
            return
        with self._alone():
            self.clear()
            self._is_closed = True
            for each in free:
                each()

    def forget(self) -> None:
        """Empty the KV caches, as after a step that failed."""
        with self._alone():
            self.decoder.ensemble.forget()

    def keep(self) -> None:
        """Let the prompt cache, if there is one, keep whatever the KV caches hold."""
        with self._alone():
            self.decoder.ensemble.keep_all()

    @property
    def n_active(self) -> int:
        """Answers that are being decoded."""
        return self._scheduler.n_active

    @property
    def n_waiting(self) -> int:
        """Answers that wait for a sequence."""
        return self._scheduler.n_waiting

    @property
    def n_picked(self) -> int:
        """Tokens picked so far for answers that have not ended; may be read from another thread."""
        return self._scheduler.n_picked

    def cache_usage(self) -> dict[str, tuple[int, int]]:
        """Return the positions in use of each member's KV cache, and all it has; may be called from another thread."""
        ensemble = self.decoder.ensemble
        return {name: (ensemble.n_used(name), member.n_cells) for name, member in ensemble.members.items()}

    def step(self, n_prefill: int | None = None, on_decode: Callable[[], None] | None = None) -> list[Answer]:
        """Run one step of all answers that have their turn, and return those. An answer that has ended is taken out.

        n_prefill: prompt tokens that the step evaluates beside what it decodes; None for as many as fit into a batch.
        on_decode: called just before the members compute.
        """
        advanced = []
        with self._alone():
            self._is_stepping = True
            try:
                for result in self._scheduler.step(n_prefill, on_decode):
                    answer = self._answers[result.generation]
                    n_used = answer.add(result)
                    advanced.append(answer)
                    if answer.has_ended:
                        self._scheduler.rewind(answer.generation, len(result.picks) - n_used)
                        self._drop(answer)
                        if not answer.error:
                            self.decoder.keep(answer.generation)
            finally:
                self._is_stepping = False
                while self._leaving:
                    self._drop(self._leaving.pop())
        return advanced

    @contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep other threads out. Raises EdgeDLFError in a forked child, after `close`, and within a step."""
        if os.getpid() != self._pid:
            raise EdgeDLFError("this family was loaded in the parent of this process; load it in this one")
        with self._lock:
            if self._is_closed:
                raise EdgeDLFError("this FusedLlama has been closed")
            if self._is_stepping:
                raise EdgeDLFError("this thread is decoding already: a signal handler cannot begin or end a request")
            yield

    def run(self, answer: Answer) -> list[Token]:
        """Step until the answer has tokens, and return them, or has ended. Raises its error."""
        while not answer.tokens and not answer.has_ended:
            if answer not in self:
                raise EdgeDLFError("this answer was ended by a newer request, or by close()")
            self.step()
        with self._lock:
            tokens = answer.take()
        if answer.error and not tokens:
            raise answer.error
        return tokens


class TokenStream(Iterator[Token]):
    """The tokens of one request, decoded as they are asked for. `.report` is complete once the last has come."""

    def __init__(self, driver: Driver, answer: Answer) -> None:
        self.answer = answer
        self.report = answer.report
        self._driver = driver
        self._ready: list[Token] = []
        driver.add(answer)

    def __next__(self) -> Token:
        while True:
            with suppress(IndexError):
                return self._ready.pop()
            tokens = self._driver.run(self.answer)
            if not tokens:
                raise StopIteration
            self._ready[:0] = tokens[::-1]  # another thread may have put some there

    def close(self) -> None:
        """End the request."""
        self._driver.remove(self.answer)
