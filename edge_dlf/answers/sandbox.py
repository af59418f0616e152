"""Chat templates, which are code from a file, run in a process of their own with limits of memory and time.

jinja2's sandbox keeps a template from files and from Python's internals, not from looping or from asking for ten
gigabytes. `prepare` runs in that process; `TemplateProcess` is the other end.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn

from ..errors import InvalidParameterError
from ..system.locks import ForkSafeLock
from ..system.workers import Connection, WorkerEndedError, Workers, at_most, limit_memory
from .origin import ROLES, Literal, Marker, written

_START_S = 20.0  # a busy machine may take long to start a process
_RENDER_S = 5.0
_POLL_S = 0.05
_MEMORY_BYTES = 512 << 20
_MIN_LIMIT = 4 << 20  # characters; more than any context holds


class NoTemplateError(InvalidParameterError):
    """The model has no chat template that can be used: no message at all can be answered."""


class TemplateProcess:
    """A compiled template in a process of its own, which is started again after it had to be killed.

    names: those of all control tokens, which are marked as `Marker` has it where the template itself writes them.
    Raises NoTemplateError where the template cannot be compiled.
    """

    def __init__(self, source: str, names: Sequence[str] = ()) -> None:
        self._workers = Workers(f"{__name__}:{prepare.__name__}", json.dumps([source, list(names)]).encode())
        self._worker: Connection | None = None
        self._lock, self._pid = ForkSafeLock(), os.getpid()
        answer = self._ask({}, _START_S)
        if "error" in answer:
            self.close()
            raise NoTemplateError(
                f"the model's chat template is not valid: {answer['error']}; raw prompts (--raw) need none"
            )

    def render(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], literals: Mapping[str, str]
    ) -> str:
        """Text that the template makes of `messages` and other variables, with the names that it writes itself marked.

        literals: variables that are as if the template wrote them.
        Raises InvalidParameterError if the template refuses them, fails, or exceeds its limit of time, memory or text.
        """
        question = {"variables": {**variables, "messages": messages}, "literals": literals}
        answer = self._ask(question, _RENDER_S)
        if "error" in answer:
            raise InvalidParameterError(f"the model's chat template refuses these messages: {answer['error']}")
        return str(answer["text"])

    def close(self) -> None:
        """End the process, and render nothing more. Calling it twice is no error."""
        self._workers.close()

    def _ask(self, question: Mapping[str, Any], patience_s: float) -> dict[str, Any]:
        """The answer of the process, in which "error" says why there is none."""
        with self._lock:
            if os.getpid() != self._pid:  # the worker is the parent's
                self._worker, self._pid = None, os.getpid()
            deadline_s = time.monotonic() + patience_s
            try:
                # Without an answer that is read to its end, a worker is asked nothing more.
                worker, self._worker = self._worker or self._workers.worker(), None
                worker.send(json.dumps(question, default=str).encode())
                while not worker.has_come(_POLL_S):
                    if time.monotonic() > deadline_s:
                        return {"error": f"it takes more than {_RENDER_S:g} s"}
                    self._workers.end_larger(_MEMORY_BYTES)  # where the system does not hold them to their limit
                answer: dict[str, Any] = json.loads(worker.receive())
            except WorkerEndedError:
                return {"error": "its process ended"}
            self._worker = worker
            return answer


def prepare(material: bytes) -> Callable[[Connection], None]:
    """Compile a template. Returns what answers questions about it."""
    limit_memory(_MEMORY_BYTES)
    try:
        template, refusal = _compile(*json.loads(material)), {}
    except Exception as error:
        template, refusal = None, _refusal(error)
    return functools.partial(_serve, template, refusal)


def _serve(template: Any, refusal: dict[str, str], connection: Connection) -> None:
    """Render the template with the variables in each question. A question without any is whether it was compiled."""
    while True:
        line, answer = connection.receive(), refusal
        if template and line != b"{}":
            with at_most(2 * _RENDER_S):  # nobody waits so long
                try:
                    answer = {"text": _rendered(template, json.loads(line), max(_MIN_LIMIT, 4 * len(line)))}
                except Exception as error:  # whatever a template raises is about these messages
                    answer = _refusal(error)
        connection.send(json.dumps(answer).encode())


def _refusal(error: Exception) -> dict[str, str]:
    if isinstance(error, MemoryError):
        return {"error": f"it takes more than {_MEMORY_BYTES >> 20} MiB of memory"}
    return {"error": str(error) or type(error).__name__}


def _compile(source: str, names: Sequence[str]) -> Any:
    from jinja2 import nodes
    from jinja2.sandbox import ImmutableSandboxedEnvironment
    from jinja2.visitor import NodeTransformer

    marker = Marker(names)

    class Environment(ImmutableSandboxedEnvironment):
        # What is intercepted is not computed while the template is compiled.
        intercepted_binops = frozenset({"*", "**"})

        @staticmethod
        @functools.cache
        def literal(text: str) -> str:
            """Return a text of the template's own."""
            marked = marker.mark(text)
            return text if marked == text else Literal.of(text, marked)

        def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
            owner, name = getattr(value, "__self__", None), getattr(value, "__name__", "")
            if type(owner) in (str, Literal) and name == "join":
                return lambda items: str(written(owner).join(map(written, items)))
            is_literal = isinstance(owner, Literal) and name in ("format", "format_map")
            return super().wrap_str_format(getattr(written(owner), name) if is_literal else value)

    class MarkedLiterals(NodeTransformer):
        def visit_Getitem(self, node: nodes.Getitem) -> nodes.Getitem:  # noqa: N802
            node.node = self.visit(node.node)
            node.arg = node.arg if isinstance(node.arg, nodes.Const) else self.visit(node.arg)
            return node

        def visit_TemplateData(self, node: nodes.TemplateData) -> nodes.TemplateData:  # noqa: N802
            node.data = marker.mark(node.data)
            return node

        def visit_Const(self, node: nodes.Const) -> nodes.Const:  # noqa: N802
            if isinstance(node.value, str):
                node.value = Environment.literal(node.value)
            return node

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters.update(tojson=_tojson, replace=_replaced)
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment.from_string(MarkedLiterals().visit(environment.parse(source)))


def _rendered(template: Any, question: dict[str, Any], limit: int) -> str:
    literal, variables = template.environment.literal, question["variables"]
    variables = {**{name: literal(text) for name, text in question["literals"].items()}, **variables}
    for message in variables["messages"]:
        if message.get("role") in ROLES:
            message["role"] = literal(message["role"])
    pieces, n_chars = [], 0
    for piece in template.generate(**variables):
        pieces.append(piece)
        n_chars += len(piece)
        if n_chars > limit:
            raise ValueError(f"it writes more than {limit:,} characters")
    return "".join(pieces)


def _tojson(value: Any, indent: int | None = None) -> str:
    """As transformers has it: no HTML escapes."""
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _replaced(text: Any, old: str, new: str, count: int | None = None) -> str:
    """As jinja2 has it, with literals as what they are: whether `new` is written is up to the text."""
    return str(text).replace(old, new, -1 if count is None else count)


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
