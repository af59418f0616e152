"""One request: picks become `Token`s with text, until a stop string, a token that ends generation, or the limit."""

from __future__ import annotations

import dataclasses
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from ..engine.generation import Generation, Pick
from ..engine.scheduler import Scheduler
from ..errors import EdgeDLFError
from .text import TextStream
from .token import Token

FinishReason = Literal["stop", "length"]


@dataclass
class Report:
    """What one request did, filled in while its tokens are consumed.

    n_prompt: tokens of the prompt. n_prefilled: those that were not in the KV cache yet, evaluated in prefill_s.
    n_steps: decoding steps after it, which gave n_decoded tokens in decode_s. n_drafted, n_accepted: tokens that were
    drafted, and those that were kept: as many steps were saved. finish_reason: None until the request has ended.
    prompt_tps, generation_tps: tokens a second of both parts; 0 where there were none.
    alpha_max: upper bound of α.
    """

    method: str
    experts: tuple[str, ...]
    n_prompt: int
    finish_reason: FinishReason | None = None
    n_generated: int = 0
    n_steps: int = 0
    n_decoded: int = 0
    n_drafted: int = 0
    n_accepted: int = 0
    n_prefilled: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    alpha_sum: float = 0.0
    n_weighted: dict[str, int] = field(default_factory=dict)
    alpha_max: float = 0.0

    def add(self, token: Token, weights: Sequence[float]) -> None:
        """Count one token and the weight of each expert behind it."""
        self.n_generated += 1
        self.alpha_sum += token.alpha
        for name, weight in zip(self.experts, weights, strict=False):
            self.n_weighted[name] = self.n_weighted.get(name, 0) + (weight > 0)

    @property
    def alpha_mean(self) -> float:
        return self.alpha_sum / max(self.n_generated, 1)

    @property
    def expert_share(self) -> dict[str, float]:
        return {name: self.n_weighted.get(name, 0) / max(self.n_generated, 1) for name in self.experts}

    @property
    def n_cached(self) -> int:
        """Tokens of the prompt that were in the KV cache."""
        return max(0, self.n_prompt - self.n_prefilled)

    @property
    def prompt_tps(self) -> float:
        return self.n_prefilled / self.prefill_s if self.prefill_s else 0.0

    @property
    def generation_tps(self) -> float:
        return self.n_decoded / self.decode_s if self.decode_s else 0.0

    def usage(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self.n_prompt,
            "completion_tokens": self.n_generated,
            "total_tokens": self.n_prompt + self.n_generated,
        }

    def summary(self) -> dict[str, Any]:
        """The `edge_dlf` field of a result."""
        return {
            "method": self.method,
            "alpha_mean": self.alpha_mean,
            "expert_share": self.expert_share,
            "prompt_tps": self.prompt_tps,
            "generation_tps": self.generation_tps,
            "n_drafted": self.n_drafted,
            "n_accepted": self.n_accepted,
        }


class Answer:
    """Picks of one generation in, tokens out. `report` tells what was done, and whether the answer has ended.

    max_tokens: most tokens of the answer. stop: strings that end it, as do tokens that `generation.ends` tells. piece:
    token -> bytes.
    """

    def __init__(
        self,
        generation: Generation,
        *,
        max_tokens: int,
        stop: Sequence[str],
        piece: Callable[[int], bytes],
    ) -> None:
        self.generation = generation
        self.report = Report(generation.fusion.method, generation.roles.experts, generation.n_prompt)
        fusion = generation.fusion
        self.report.alpha_max = fusion.alpha_max if fusion.method == "dynamic" else max(generation.alphas, default=0.0)
        generation.n_most = max_tokens
        self._max_tokens = max_tokens
        self._text = TextStream(stop)
        self._piece = piece
        self._waiting: Token | None = None

    def push(self, pick: Pick) -> list[Token]:
        """Tokens that are complete after this pick: none while a stop string may have begun."""
        report, text = self.report, self._text
        if self.generation.ends(pick.token):
            return self._finish("stop")
        token = self._token(pick, text.push(self._piece(pick.token)))
        report.add(token, pick.alphas)
        self.generation.n_most = self._max_tokens - report.n_generated
        ready = [self._waiting] if self._waiting else []
        self._waiting = token
        if text.stopped or report.n_generated == self._max_tokens:
            return [*ready, *self._finish("stop" if text.stopped else "length")]
        if not text.holding:
            ready.append(token)
            self._waiting = None
        return ready

    def _finish(self, reason: FinishReason) -> list[Token]:
        self.report.finish_reason = reason
        self.report.n_drafted, self.report.n_accepted = self.generation.n_drafted, self.generation.n_accepted
        last, rest = self._waiting, self._text.finish()
        return [dataclasses.replace(last, text=last.text + rest)] if last else []

    def _token(self, pick: Pick, text: str) -> Token:
        """The pick with its text; of several weighted experts it names the first of the most weighted."""
        experts = self.generation.roles.experts
        t = max(range(len(pick.alphas)), key=pick.alphas.__getitem__, default=None)
        alpha = 0.0 if t is None else pick.alphas[t]
        expert = experts[t] if t is not None and alpha > 0 else None
        return Token(pick.token, text, pick.logprob, alpha, expert, pick.from_draft, pick.top_logprobs, pick.trace)


class TokenStream(Iterator[Token]):
    """The tokens of one request, decoded as they are asked for. `.report` is complete once the last has come."""

    def __init__(self, scheduler: Scheduler, answer: Answer) -> None:
        self.report = answer.report
        self._scheduler = scheduler
        self._answer = answer
        self._picks: deque[Pick] = deque()
        self._tokens: deque[Token] = deque()
        scheduler.add(answer.generation)

    def __next__(self) -> Token:
        while not self._tokens:
            if self.report.finish_reason:
                raise StopIteration
            if self._answer.generation not in self._scheduler:
                raise EdgeDLFError("this answer was ended by a newer request, or by close()")
            if not self._picks:
                self._step()
                continue
            self._tokens.extend(self._answer.push(self._picks.popleft()))
            if self.report.finish_reason:
                self.close()
        return self._tokens.popleft()

    def close(self) -> None:
        """End the request. What a draft gave beyond the tokens that came leaves no trace."""
        generation = self._answer.generation
        if generation in self._scheduler:
            self._scheduler.decoder.rewind(generation, len(generation.tokens) - len(self._picks))
            self._scheduler.remove(generation)
        self._picks.clear()

    def _step(self) -> None:
        """Decode a step, and time it."""
        report, generation = self.report, self._answer.generation
        started = time.perf_counter()
        for _, outcome in self._scheduler.step():
            if isinstance(outcome, EdgeDLFError):
                raise outcome
            self._picks.extend(outcome)
        elapsed = time.perf_counter() - started
        if len(generation.tokens) - len(self._picks) == report.n_prompt:
            report.n_prefilled = generation.n_prefilled
            report.prefill_s += elapsed
        else:
            report.n_steps += 1
            report.n_decoded += len(self._picks)
            report.decode_s += elapsed
