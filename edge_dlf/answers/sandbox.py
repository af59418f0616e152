"""Chat templates are code from a file: they run in a process of their own, with little memory and little time.

jinja2's sandbox keeps a template from files and from Python's internals, not from looping or from asking for ten
gigabytes. `serve` runs in that process; `TemplateProcess` is the other end.
"""

from __future__ import annotations

import datetime
import json
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, NoReturn

import psutil

from ..errors import InvalidParameterError
from ..system.child import python_command

_START_S = 20.0  # a busy machine may take long to start a process
_RENDER_S = 5.0
_POLL_S = 0.05
_MEMORY_BYTES = 512 << 20
_MIN_LIMIT = 4 << 20  # characters; more than any context holds
_SERVE = f"from {__name__} import serve; serve()"


class TemplateProcess:
    """A compiled template in a process of its own, which is started again after it had to be killed.

    Raises InvalidParameterError where the template cannot be compiled.
    """

    def __init__(self, source: str) -> None:
        self._source = source
        self._process: subprocess.Popen[bytes] | None = None
        self._started()

    def render(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str:
        """Text that the template makes of `messages`. Raises InvalidParameterError if it refuses them, fails, or takes
        more than its share of time, memory or text."""
        self._started()
        answer = self._ask({"messages": messages, **variables}, _RENDER_S)
        if "error" in answer:
            raise InvalidParameterError(f"the model's chat template refuses these messages: {answer['error']}")
        return str(answer["text"])

    def _started(self) -> None:
        if self._process is not None:
            return
        # Its own session: Ctrl-C in the terminal is meant for this process.
        self._process = subprocess.Popen(
            python_command(_SERVE), stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        answer = self._ask({"source": self._source}, _START_S)
        if "error" in answer:
            self.close()
            raise InvalidParameterError(f"the model's chat template is not valid: {answer['error']}")

    def _ask(self, question: dict[str, Any], patience_s: float) -> dict[str, Any]:
        process = self._process
        assert process is not None, "has been started"
        assert process.stdin is not None, "is a pipe"
        assert process.stdout is not None, "is a pipe"
        try:
            line = json.dumps(question, default=str).encode() + b"\n"
            process.stdin.write(line)
            process.stdin.flush()
            answer = self._line(process, time.monotonic() + patience_s)
        except BrokenPipeError:
            answer = b""
        except BaseException:  # an interrupt would leave an answer unread
            self.close()
            raise
        if isinstance(answer, str):
            self.close()
            return {"error": answer}
        if not answer.endswith(b"\n"):
            self.close()
            return {"error": "its process ended"}
        parsed: dict[str, Any] = json.loads(answer)
        return parsed

    def _line(self, process: subprocess.Popen[bytes], deadline_s: float) -> bytes | str:
        """The answer, or why there is none."""
        assert process.stdout is not None, "is a pipe"
        while not select.select([process.stdout], [], [], _POLL_S)[0]:
            if time.monotonic() > deadline_s:
                return f"it takes more than {_RENDER_S:g} s"
            if _memory_bytes(process.pid) > _MEMORY_BYTES:  # where the system does not hold it to its limit
                return f"it takes more than {_MEMORY_BYTES >> 20} MiB of memory"
        return process.stdout.readline()

    def close(self) -> None:
        """End the process. Calling it twice is no error."""
        if self._process is not None:
            process, self._process = self._process, None
            process.kill()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    with suppress(BrokenPipeError):  # what was still to be written
                        stream.close()
            process.wait()


def _memory_bytes(pid: int) -> int:
    try:
        return int(psutil.Process(pid).memory_info().rss)
    except psutil.Error:  # it has ended
        return 0


def serve() -> None:
    """Compile the template in the first line of stdin; then render the variables in each further one."""
    _limit_memory()
    questions, answers = sys.stdin.buffer, sys.stdout.buffer
    template = None
    while line := questions.readline():
        question = json.loads(line)
        answer: dict[str, Any]
        try:
            if template is None:
                template = _compile(question["source"])
                answer = {"ready": True}
            else:
                answer = {"text": _rendered(template, question, max(_MIN_LIMIT, 4 * len(line)))}
        except MemoryError:
            answer = {"error": f"it takes more than {_MEMORY_BYTES >> 20} MiB of memory"}
        except Exception as error:  # whatever a template raises is about these messages
            answer = {"error": str(error) or type(error).__name__}
        _answer(answers, answer)


def _answer(stream: BinaryIO, answer: dict[str, Any]) -> None:
    stream.write(json.dumps(answer).encode() + b"\n")
    stream.flush()


def _limit_memory() -> None:
    try:
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    except (ImportError, OSError, ValueError):
        return


def _compile(source: str) -> Any:
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    class Environment(ImmutableSandboxedEnvironment):
        # What is intercepted is not computed while the template is compiled.
        intercepted_binops = frozenset({"*", "**"})

    environment = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = _tojson
    environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment.from_string(source)


def _rendered(template: Any, variables: dict[str, Any], limit: int) -> str:
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


def _raise_exception(message: str) -> NoReturn:
    raise ValueError(message)


def _strftime_now(form: str) -> str:
    return datetime.datetime.now().strftime(form)
