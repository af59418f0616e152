"""Chat templates, which are code from a file, run in a process of their own with limits of memory and time.

jinja2's sandbox keeps a template from files and from Python's internals, not from looping or from asking for ten
gigabytes. `serve` runs in that process; `TemplateProcess` is the other end.
"""

from __future__ import annotations

import datetime
import functools
import json
import os
import select
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import IO, Any, NoReturn

import psutil

from ..errors import EdgeDLFError, InvalidParameterError
from ..system.child import python_command
from .origin import ROLES, Literal, Marker, written

_START_S = 20.0  # a busy machine may take long to start a process
_RENDER_S = 5.0
_POLL_S = 0.05
_MEMORY_BYTES = 512 << 20
_MIN_LIMIT = 4 << 20  # characters; more than any context holds
_SERVE = f"from {__name__} import serve; serve()"


class NoTemplateError(InvalidParameterError):
    """The model has no chat template that can be used: no message at all can be answered."""


class TemplateProcess:
    """A compiled template in a process of its own, which is started again after it had to be killed.

    names: those of all control tokens, which are marked as `Marker` has it where the template itself writes them.
    Raises NoTemplateError where the template cannot be compiled.
    """

    def __init__(self, source: str, names: Sequence[str] = ()) -> None:
        self._source, self._names = source, list(names)
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.RLock()
        self._pid = os.getpid()
        self._is_closed = False
        self._start()

    def render(
        self, messages: Sequence[Mapping[str, Any]], variables: Mapping[str, Any], literals: Mapping[str, str]
    ) -> str:
        """Text that the template makes of `messages` and other variables, with the names that it writes itself marked.

        literals: variables that are as if the template wrote them.
        Raises InvalidParameterError if the template refuses them, fails, or exceeds its limit of time, memory or text.
        """
        self._forget_parents()
        with self._lock:
            if self._is_closed:
                raise EdgeDLFError("this chat template has been closed")
            self._start()
            question = {"variables": {**variables, "messages": messages}, "literals": literals}
            answer = self._ask(question, _RENDER_S)
        if "error" in answer:
            raise InvalidParameterError(f"the model's chat template refuses these messages: {answer['error']}")
        return str(answer["text"])

    def close(self) -> None:
        """End the process, and render nothing more. Calling it twice is no error."""
        self._forget_parents()
        with self._lock:
            self._is_closed = True
            self._end()

    def _end(self) -> None:
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            process.communicate()

    def _forget_parents(self) -> None:
        """In a forked child: the process and its pipes belong to the parent."""
        if os.getpid() != self._pid:
            self._pid, self._lock = os.getpid(), threading.RLock()
            self._parents, self._process = self._process, None

    def _start(self) -> None:
        """Start the process, unless it runs."""
        if self._process is not None:
            return
        # Its own session: Ctrl-C in the terminal is meant for this process.
        self._process = subprocess.Popen(
            python_command(_SERVE), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        answer = self._ask({"source": self._source, "names": self._names}, _START_S)
        if "error" in answer:
            self._end()
            raise NoTemplateError(
                f"the model's chat template is not valid: {answer['error']}; raw prompts (--raw) need none"
            )

    def _ask(self, question: dict[str, Any], patience_s: float) -> dict[str, Any]:
        """The answer of the process. Where there is none, the process is ended, and "error" says why."""
        process = self._process
        assert process is not None
        assert process.stdin is not None
        assert process.stdout is not None
        line, reason = b"", None
        try:
            process.stdin.write(json.dumps(question, default=str).encode() + b"\n")
            process.stdin.flush()
            reason = _excess(process.pid, process.stdout, time.monotonic() + patience_s)
            line = b"" if reason else process.stdout.readline()
        except BrokenPipeError:  # the process has ended
            pass
        except BaseException:  # an interrupt would leave an answer unread
            self._end()
            raise
        if not line.endswith(b"\n"):
            self._end()
            return {"error": reason or "its process ended"}
        answer: dict[str, Any] = json.loads(line)
        return answer


def _excess(pid: int, answers: IO[bytes], deadline_s: float) -> str | None:
    """Wait for the process to answer. Returns None, or the limit that it exceeds."""
    while not select.select([answers], [], [], _POLL_S)[0]:
        if time.monotonic() > deadline_s:
            return f"it takes more than {_RENDER_S:g} s"
        if _memory_bytes(pid) > _MEMORY_BYTES:  # where the system does not hold it to its limit
            return f"it takes more than {_MEMORY_BYTES >> 20} MiB of memory"
    return None


def _memory_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it has ended
        return 0


def serve() -> None:
    """Compile the template in the first line of stdin; then render it with the variables in each further line."""
    with suppress(ImportError, OSError, ValueError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    template = None
    while line := sys.stdin.buffer.readline():
        try:
            question = json.loads(line)
            if template is None:
                template = _compile(question["source"], question["names"])
                answer = json.dumps({"ready": True})
            else:
                answer = json.dumps({"text": _rendered(template, question, max(_MIN_LIMIT, 4 * len(line)))})
        except MemoryError:
            answer = json.dumps({"error": f"it takes more than {_MEMORY_BYTES >> 20} MiB of memory"})
        except Exception as error:  # whatever a template raises is about these messages
            answer = json.dumps({"error": str(error) or type(error).__name__})
        sys.stdout.buffer.write(answer.encode() + b"\n")
        sys.stdout.buffer.flush()


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
