"""One request: picks become `Token`s with text, until a stop string, a token that ends generation, or the limit."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from .decode import Decoder, Generation, Pick
from .errors import EdgeDLFError
from .params import Token
from .text import TextStream

FinishReason = Literal["stop", "length"]


@dataclass
class Report:
    """What one request did, filled in while its tokens are consumed.

    n_prompt: tokens of the prompt. n_prefilled: those that were not in the KV cache yet, evaluated in prefill_s.
    n_steps: decoding steps after it, which gave n_decoded tokens in decode_s. n_drafted, n_accepted: tokens that were
    drafted, and those that were kept: as many steps were saved. finish_reason: None until the request has ended.
    prompt_tps, generation_tps: tokens a second of both parts; 0 where there were none.
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


class TokenStream(Iterator[Token]):
    """The tokens of one request, decoded as they are asked for. `.report` is complete once the last has come.

    prompts: tokens for each member that takes part. piece: token -> bytes. ends: whether a token ends generation.
    is_current: whether the members' caches still belong to this request.
    """

    def __init__(
        self,
        decoder: Decoder,
        generation: Generation,
        prompts: Mapping[str, Sequence[int]],
        *,
        max_tokens: int,
        stop: Sequence[str],
        piece: Callable[[int], bytes],
        ends: Callable[[int], bool],
        is_current: Callable[[], bool],
    ) -> None:
        roles = generation.roles
        self.report = Report(generation.fusion.method, roles.experts, n_prompt=len(prompts[roles.primary]))
        self._decoder = decoder
        self._generation = generation
        self._prompts = prompts
        self._is_current = is_current
        self._max_tokens = max_tokens
        self._tokens = self._run(TextStream(stop), piece, ends)

    def __next__(self) -> Token:
        return next(self._tokens)

    def _run(self, text: TextStream, piece: Callable[[int], bytes], ends: Callable[[int], bool]) -> Iterator[Token]:
        waiting: Token | None = None
        picks = self._picks()
        for pick in picks:
            if ends(pick.token):
                self.report.finish_reason = "stop"
                break
            token = self._token(pick, text.push(piece(pick.token)))
            self.report.add(token, pick.alphas)
            if waiting:
                yield waiting
            waiting = token
            if text.stopped or self.report.n_generated == self._max_tokens:
                self.report.finish_reason = "stop" if text.stopped else "length"
                break
            if not text.holding:
                yield waiting
                waiting = None
        picks.close()
        rest = text.finish()
        if waiting:
            yield dataclasses.replace(waiting, text=waiting.text + rest)

    def _picks(self) -> Generator[Pick, None, None]:
        """Every pick of the generation, timed."""
        report, generation = self.report, self._generation
        self._require_current()
        started = time.perf_counter()
        pick, report.n_prefilled = self._decoder.start(generation, self._prompts)
        report.prefill_s = time.perf_counter() - started
        yield pick
        while True:
            self._require_current()
            generation.n_most = self._max_tokens - report.n_generated
            started = time.perf_counter()
            (picks,) = self._decoder.step([generation])
            report.decode_s += time.perf_counter() - started
            report.n_steps += 1
            report.n_decoded += len(picks)
            report.n_drafted, report.n_accepted = generation.n_drafted, generation.n_accepted
            n_taken = 0
            try:
                for n_taken, pick in enumerate(picks, 1):
                    if n_taken > 1:
                        self._require_current()
                    yield pick
            finally:
                # Whoever stops in the middle of a draft leaves no trace of the rest.
                if n_taken < len(picks) and self._is_current():
                    self._decoder.rewind(generation, len(generation.tokens) - len(picks) + n_taken)

    def _require_current(self) -> None:
        if not self._is_current():
            raise EdgeDLFError("this answer was ended by a newer request, or by close()")

    def _token(self, pick: Pick, text: str) -> Token:
        """The pick with its text; of several weighted experts it names the first of the most weighted."""
        experts = self._generation.roles.experts
        t = max(range(len(pick.alphas)), key=pick.alphas.__getitem__, default=None)
        alpha = 0.0 if t is None else pick.alphas[t]
        expert = experts[t] if t is not None and alpha > 0 else None
        return Token(pick.token, text, pick.logprob, alpha, expert, pick.from_draft, pick.top_logprobs)
