"""A scripted stand-in for FusedLlama, and a chat over it: no model, the same face towards the terminal."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from edge_dlf import ContextOverflowError, RequestInterruptedError, Token
from edge_dlf.answers.batch import LATER
from edge_dlf.answers.completion import ChatCompletion, Completion
from edge_dlf.answers.stream import Report
from edge_dlf.answers.template import MemberPrompts
from edge_dlf.cli.conversation import Conversation
from edge_dlf.cli.options import Options
from edge_dlf.cli.screen import Screen
from edge_dlf.cli.session import Session
from edge_dlf.families.files import FamilyFiles
from edge_dlf.families.spec import FamilySpec, ModelSource
from edge_dlf.families.tokens import SharedTokens
from edge_dlf.params import METHODS

if TYPE_CHECKING:
    from edge_dlf import FusedLlama

_N_PARALLEL = 4

Step = str | Token | tuple[str, float] | tuple[str, float, str] | BaseException
"""A token's text, the token itself, its text and α, its text, α and expert, or what is raised in its place."""


class FakeStream(Iterator[Token]):
    """Tokens of one scripted answer, with a `report` and an `answer` as TokenStream has them."""

    def __init__(self, steps: Sequence[Step], report: Report, max_tokens: int) -> None:
        self.report = report
        self.answer: Any = self
        self._steps = iter(steps)
        self._max_tokens = max_tokens

    def __next__(self) -> Token:
        report = self.report
        if report.finish_reason:
            raise StopIteration
        step = next(self._steps, None)
        if isinstance(step, BaseException):
            raise step
        if step is None:
            report.finish_reason = "stop"
            raise StopIteration
        if isinstance(step, Token):
            token, alpha, name = step, step.alpha, step.expert
        else:
            text, alpha, *expert = (step, 0.0) if isinstance(step, str) else step
            name = [*expert, *report.experts][0] if alpha > 0 else None
            token = Token(report.n_generated, text, -0.5, alpha, name)
        report.add(token, [alpha if expert == name else 0.0 for expert in report.experts])
        if report.n_generated > 1:
            report.counts.n_steps += 1
            report.counts.n_decoded += 1
            report.counts.decode_s += 0.1
        if report.n_generated == self._max_tokens:
            report.finish_reason = "length"
        return token


class FakeDriver:
    """Counts in n_kept how often the prompt cache was to keep what was read. has_cache: whether there is one."""

    def __init__(self) -> None:
        self.n_kept, self.has_cache = 0, False

    def keep(self) -> bool:
        self.n_kept += 1
        return self.has_cache


class FakeLlama:
    """Gives the scripted `answers` in turn, then "ok" for ever. A token of a prompt is one byte of its text.

    requests: the text of every prompt and the settings that came with it. options: what it was loaded with.
    """

    def __init__(
        self, *answers: Sequence[Step], name: str = "fake", n_ctx: int = 4096, experts: Sequence[str] = ("math",)
    ) -> None:
        self.name = name
        self.n_ctx = n_ctx
        self.experts = tuple(experts)
        spec = FamilySpec.from_files("large.gguf", "base.gguf", dict.fromkeys(experts, "expert.gguf"))
        models: dict[str, Any] = dict.fromkeys(("large", "base", *experts))
        self.files = FamilyFiles(spec, {}, models, {}, SharedTokens(256))
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.options: Options | None = None
        self.is_closed = False
        self.is_interrupted = False
        self.driver = FakeDriver()
        self._answers = iter(answers)

    def __enter__(self) -> FakeLlama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.is_closed = True

    def interrupt(self) -> None:
        self.is_interrupted = True

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], think: str = "auto") -> MemberPrompts:
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return MemberPrompts(text.encode("utf-8", "surrogateescape"))

    def stream(self, prompt: str | Sequence[int], *, max_tokens: int | None = None, **settings: Any) -> FakeStream:
        text = prompt if isinstance(prompt, str) else bytes(prompt).decode("utf-8", "surrogateescape")
        n_prompt = len(text.encode("utf-8", "surrogateescape"))
        if n_prompt >= self.n_ctx:
            raise ContextOverflowError(f"the prompt has {n_prompt} tokens, more than the context of {self.n_ctx}")
        self.requests.append((text, settings | ({"max_tokens": max_tokens} if max_tokens else {})))
        method = settings.get("method", METHODS[0])
        report = Report(method, self.experts if method in ("dynamic", "static", "weighted") else (), n_prompt)
        report.counts.n_prefilled, report.counts.prefill_s = n_prompt, 1.0
        return FakeStream(next(self._answers, ["ok"]), report, min(max_tokens or self.n_ctx, self.n_ctx - n_prompt))

    def create_completion(self, prompt: str, **settings: Any) -> dict[str, Any]:
        stream = self.stream(prompt, **settings)
        return Completion(stream.answer, self.name, False, lambda _: b"").result(list(stream))

    def create_chat_completion(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> dict[str, Any]:
        stream = self.stream(self.apply_chat_template(messages), **settings)
        return ChatCompletion(stream.answer, self.name, False, lambda _: b"").result(list(stream))

    def n_picked(self) -> int:
        return 0

    def batch(
        self, requests: Iterable[Mapping[str, Any]], *, ordered: bool = False, **settings: Any
    ) -> Iterator[dict[str, Any]]:
        """A few rows at once, finished in any order. A row's answer depends on nothing but itself and the settings; a
        prompt with "fail" in it fails."""
        waiting, running, chance = iter(requests), [], random.Random(0)
        while True:
            is_late = False
            while len(running) < _N_PARALLEL and not is_late and (request := next(waiting, None)):
                is_late = request is LATER
                running += [] if is_late else [request]
            if self.is_interrupted:
                raise RequestInterruptedError("the request was interrupted")
            if not running:
                return
            yield self.row(running.pop(0 if ordered else chance.randrange(len(running))), settings)

    def row(self, request: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
        """The finished row of one request."""
        prompt = json.dumps({name: value for name, value in request.items() if name not in ("id", "custom_id")})
        self.requests.append((prompt, dict(settings)))
        id = request.get("custom_id") or request["id"]
        row: dict[str, Any] = {"id": f"batch_req_{id}", "custom_id": id, "response": None, "error": None}
        if "fail" in prompt:
            return {**row, "error": {"code": "non_finite_logits", "message": "large returned NaN in its logits"}}
        draw = blake2b(repr((settings, prompt, id)).encode("utf-8", "surrogatepass"), digest_size=4).hexdigest()
        report = Report("dynamic", self.experts, len(prompt))
        answer = FakeStream([draw[:4], draw[4:]], report, 100)
        body = Completion(answer.answer, self.name, False, lambda _: b"").result(list(answer))
        return {**row, "response": {"status_code": 200, "request_id": f"req_{id}", "body": body}}


class Terminal(Screen):
    """A screen that takes itself for a terminal."""

    is_terminal = True

    @staticmethod
    def keys_kept_back() -> Any:
        return nullcontext()


def fake_session(
    llm: FakeLlama,
    *,
    system: str | None = None,
    defaults: Mapping[str, Any] | None = None,
    profiles: Mapping[str, Mapping[str, Any]] | None = None,
    **given: Any,
) -> Session:
    """A chat over `llm` as on a terminal, with this system prompt, settings of the family, and arguments of Session."""
    file = ModelSource(Path("model.gguf"))
    spec = FamilySpec(llm.name, file, file, (), defaults or {}, profiles or {})
    arguments = {"settings": {}, "spec": spec, "conversation": Conversation(system), **given}
    return Session(cast("FusedLlama", llm), Terminal(), **arguments)
