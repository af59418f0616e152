"""A scripted stand-in for FusedLlama, and a chat over it: no model, the same face towards the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, cast

from edge_dlf import ContextOverflowError, FusedLlama, Token
from edge_dlf.cli.options import Options
from edge_dlf.cli.screen import Screen
from edge_dlf.cli.session import Session
from edge_dlf.completion import ChatCompletionShape, CompletionShape
from edge_dlf.params import METHODS
from edge_dlf.stream import Report

Step = str | tuple[str, float] | tuple[str, float, str] | BaseException
"""A token's text, its text and α, its text, α and expert, or what is raised in its place."""


class FakeStream(Iterator[Token]):
    """Tokens of one scripted answer, with a `report` as TokenStream has it."""

    def __init__(self, steps: Sequence[Step], report: Report, max_tokens: int) -> None:
        self.report = report
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
        text, alpha, *expert = (step, 0.0) if isinstance(step, str) else step
        name = [*expert, *report.experts][0] if alpha > 0 else None
        token = Token(report.n_generated, text, -0.5, alpha, name)
        report.add(token, [alpha if expert == name else 0.0 for expert in report.experts])
        if report.n_generated > 1:
            report.n_steps += 1
            report.n_decoded += 1
            report.decode_s += 0.1
        if report.n_generated == self._max_tokens:
            report.finish_reason = "length"
        return token


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
        self.requests: list[tuple[str, dict[str, Any]]] = []
        self.options: Options | None = None
        self.is_closed = False
        self._answers = iter(answers)

    def __enter__(self) -> FakeLlama:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.is_closed = True

    def interrupt(self) -> None:
        pass

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]]) -> list[int]:
        text = "".join(f"{message['role']}: {message['content']}\n" for message in messages)
        return list(text.encode("utf-8", "surrogateescape"))

    def stream(self, prompt: str | Sequence[int], *, max_tokens: int | None = None, **settings: Any) -> FakeStream:
        text = prompt if isinstance(prompt, str) else bytes(prompt).decode("utf-8", "surrogateescape")
        n_prompt = len(text.encode("utf-8", "surrogateescape"))
        if n_prompt + (max_tokens or 1) > self.n_ctx:
            raise ContextOverflowError(f"the prompt has {n_prompt} tokens, more than the context of {self.n_ctx}")
        self.requests.append((text, settings | ({"max_tokens": max_tokens} if max_tokens else {})))
        method = settings.get("method", METHODS[0])
        report = Report(method, self.experts if method in ("dynamic", "static") else (), n_prompt)
        report.n_prefilled, report.prefill_s = n_prompt, 1.0
        return FakeStream(next(self._answers, ["ok"]), report, max_tokens or self.n_ctx - n_prompt)

    def create_completion(self, prompt: str, **settings: Any) -> dict[str, Any]:
        stream = self.stream(prompt, **settings)
        return CompletionShape(self.name, False, lambda _: b"").result(list(stream), stream.report)

    def create_chat_completion(self, messages: Sequence[Mapping[str, Any]], **settings: Any) -> dict[str, Any]:
        stream = self.stream(self.apply_chat_template(messages), **settings)
        return ChatCompletionShape(self.name, False, lambda _: b"").result(list(stream), stream.report)


class Terminal(Screen):
    """A screen that takes itself for a terminal."""

    is_terminal = True

    @staticmethod
    def keys_kept_back() -> Any:
        return nullcontext()


def fake_session(llm: FakeLlama, **given: Any) -> Session:
    """A chat over `llm` as on a terminal, with the given arguments of Session."""
    arguments = {"settings": {}, "defaults": {}, **given}
    return Session(cast(FusedLlama, llm), Terminal(), **arguments)
