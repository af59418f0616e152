"""An answer's text, taken apart as it comes: thinking, content and tool calls, by the marks of its dialect."""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple, TypeAlias

from .dialects import Dialect, ToolSchemas, as_object, value_end
from .text import StopStrings, overlap
from .tools import ToolCall

_State: TypeAlias = Literal["content", "reasoning", "call", "after call", "bare", "header", "arguments"]
_BLOCK = re.compile(r"\s*(```(json|xml)?\s*)?")
_MAY_BEGIN_BLOCK = re.compile(r"\s*(`{0,3}|```(j|js|jso|json|x|xm|xml)?\s*)")
_BLOCK_END = re.compile(r"\A\s*```")
_MAY_END_BLOCK = re.compile(r"\s*`{0,2}")
_HEADER_END = "<|message|>"
_MESSAGE_ENDS = ("<|end|>", "<|return|>", "<|call|>", "<|start|>", "<|channel|>")
_HEADER_STARTS = ("<|start|>", "<|channel|>", "to=", "<|end|>", "<|return|>", "<|call|>")
_HEADER_WORDS = re.compile(r"<\|\w*\|?>?|\bto=\S*|\b(assistant|analysis|commentary|final|json)\b")
_MAX_HEADER = 300


class Delta(NamedTuple):
    """What a piece of text adds to an answer: content, thinking, and calls that are complete with it."""

    text: str = ""
    reasoning: str = ""
    tool_calls: tuple[ToolCall, ...] = ()


class MessageParser:
    """Takes the text of one answer apart, however it is cut.

    Every character comes out once, but for the marks themselves and white space beside them. What begins like a tool
    call and turns out to be none is content.

    tools: those that may be called; none where calls are left as they are. is_thinking: whether the prompt ends within
    thinking.
    """

    def __init__(self, dialect: Dialect, tools: ToolSchemas | None = None, *, is_thinking: bool = False) -> None:
        self._dialect = dialect
        self._tools = tools or {}
        self._calls = dialect.calls if tools else None
        self._text = ""
        self._trims = is_thinking  # white space is left out until other text has come
        self._has_answer = False  # thinking comes before all else: later tags are text about tags
        self._name = ""
        self._opened = ""
        self._is_in_block = False
        self._parts: list[Delta] = []
        is_bare = bool(self._calls and self._calls.is_bare)
        self._begins: _State = "header" if dialect.is_harmony else "bare" if is_bare else "content"
        self._state: _State = "reasoning" if is_thinking else self._begins

    def push(self, text: str) -> list[Delta]:
        """Add text. Returns what is certain now."""
        self._text += text
        return self._take(is_last=False)

    def finish(self) -> list[Delta]:
        """End the text. Returns what was held back."""
        return self._take(is_last=True)

    @property
    def is_holding(self) -> bool:
        """Whether text is held back."""
        return bool(self._text)

    @property
    def is_reasoning(self) -> bool:
        """Whether the next text is thinking, as far as that is known."""
        return self._state == "reasoning"

    def _take(self, *, is_last: bool) -> list[Delta]:
        while self._advance(is_last):
            pass
        parts, self._parts = self._parts, []
        return parts

    def _advance(self, is_last: bool) -> bool:
        """Read on in the present state. Returns whether the state has changed."""
        match self._state:
            case "content" | "reasoning":
                return self._read_text(is_last)
            case "header":
                return self._read_header(is_last)
            case "bare":
                return self._read_bare(is_last)
            case "after call":
                return self._read_after_call(is_last)
            case _:
                return self._read_call(is_last)

    def _marks(self) -> Mapping[str, _State]:
        """Return the marks that end what is read now, and the state after each."""
        if self._dialect.is_harmony:
            return dict.fromkeys(_MESSAGE_ENDS, "header")
        if self._state == "reasoning":
            assert self._dialect.tags
            return {self._dialect.tags[1]: self._begins}
        opens, text = (self._dialect.tags or ("", ""))[0], self._text.lstrip()
        may_think = opens and not self._has_answer and (text.startswith(opens) or opens.startswith(text))
        marks: dict[str, _State] = {opens: "reasoning"} if may_think else {}
        return {**marks, self._calls.opens: "call"} if self._calls else marks

    def _read_text(self, is_last: bool) -> bool:
        """Give text on, up to the next mark."""
        if self._trims:
            self._text = self._text.lstrip()
        text, marks = self._text, self._marks()
        found = min(((at, mark) for mark in marks if (at := text.find(mark)) >= 0), default=None)
        if found:
            at, mark = found
            self._give(text[:at].rstrip())
            is_header = self._dialect.is_harmony
            self._opened, self._text = mark, text[at:] if is_header else text[at + len(mark) :]
            self._state, self._trims = marks[mark], True
            return True
        if is_last:
            self._give(text.rstrip() if self._state == "reasoning" else text)
            self._text = ""
            return False
        certain = text[: len(text) - max((overlap(text, mark) for mark in marks), default=0)].rstrip()
        self._give(certain)
        self._text = text[len(certain) :]
        return False

    def _give(self, text: str) -> None:
        if text:
            self._trims = False
            self._has_answer = self._has_answer or (self._state != "reasoning" and not text.isspace())
            self._parts.append(Delta(reasoning=text) if self._state == "reasoning" else Delta(text))

    def _give_calls(self, calls: Sequence[tuple[str, str]]) -> None:
        self._has_answer = True
        self._parts += [Delta(tool_calls=(ToolCall.new(name, arguments),)) for name, arguments in calls]

    def _read_call(self, is_last: bool) -> bool:
        """Read calls after their mark, or the arguments of the one that a header names."""
        calls, text = self._calls, self._text
        try:
            if self._state == "arguments":
                end = None if not text.strip() else value_end(text, len(text) - len(text.lstrip()))
                found = None if end is None else ([(self._name, as_object(text[:end]))], end)
            else:
                assert calls
                found = calls.read(text, self._tools)
        except (ValueError, RecursionError):
            return self._is_none()
        if found is None:
            return is_last and bool(text or self._opened) and self._is_none()
        self._give_calls(found[0])
        self._text = text[found[1] :]
        self._state, self._opened = "after call", ""
        return True

    def _is_none(self) -> bool:
        """What began like a call is content, with its mark."""
        self._state = "content"
        self._give(self._opened)
        self._opened = ""
        return True

    def _read_after_call(self, is_last: bool) -> bool:
        """Read what may stand after a call: its end, or the next one."""
        self._text, self._trims = self._text.lstrip(), True
        closes = self._calls.closes if self._calls else ""
        if self._dialect.is_harmony:
            self._state = "header"
        elif closes and self._text.startswith(closes):
            self._text = self._text[len(closes) :]
            self._state = "content"
        elif closes.startswith(self._text) and not is_last:
            return False
        elif closes and self._text[:1] == "{":
            self._state = "call"
        else:
            self._state = self._begins
        return True

    def _read_bare(self, is_last: bool) -> bool:
        """Read a call that has no mark before it, perhaps in a code block, if the text is one."""
        assert self._calls
        text = self._text
        if self._is_in_block:
            if _MAY_END_BLOCK.fullmatch(text) and not is_last:
                return False
            text = _BLOCK_END.sub("", text)
        if self._has_answer:
            text = text.lstrip("; \t\r\n")
        if not is_last and _MAY_BEGIN_BLOCK.fullmatch(text):
            return False
        begins = _BLOCK.match(text)
        start = begins.end() if begins else 0
        if text.startswith("{", start):
            try:
                found = self._calls.read(text[start:], self._tools)
            except (ValueError, RecursionError):
                found = [], 0
            if found is None and not is_last:
                return False
            if found and found[0] and all(name in self._tools for name, _ in found[0]):
                self._give_calls(found[0])
                self._is_in_block = bool(begins and begins[1])
                self._text, self._trims = text[start + found[1] :], True
                return True
        self._text, self._state, self._is_in_block = text, "content", False
        return True

    def _read_header(self, is_last: bool) -> bool:
        """Read the header of a message of gpt-oss, which says what it is and whom it is for."""
        text = re.sub(r"\A\s*(<\|(end|call|return)\|>\s*)*", "", self._text)
        end = text.find(_HEADER_END)
        is_begun = any(text.startswith(mark[: len(text)]) for mark in _HEADER_STARTS)
        if not (is_begun and 0 <= end <= _MAX_HEADER):
            if is_begun and end < 0 and len(text) < _MAX_HEADER + len(_HEADER_END):
                if is_last:
                    self._text, self._state = "", "content"
                    self._give(text if _HEADER_WORDS.sub("", text).strip() else "")
                return False
            self._state = "content"
            self._give(text[:1])  # without it, a mark that begins no header is text
            self._text = text[1:]
            return True
        head, self._text, self._trims = text[:end], text[end + len(_HEADER_END) :], True
        to = re.search(r"\bto=(?:functions\.)?([\w.-]+)", head)
        channel = re.search(r"<\|channel\|>\s*(\w+)", head)
        if to and self._calls:
            self._name, self._state, self._opened = to[1], "arguments", head + _HEADER_END
        else:
            self._state = "reasoning" if channel and channel[1] == "analysis" else "content"
        return True


class MessageStream:
    """Decoder of the bytes of successive tokens into what can be shown.

    stop: texts that end the content; they and all that follows are never shown.
    parser: what takes the text apart; None where all of it is content.
    one_call: whether the answer ends after a call.
    """

    def __init__(
        self, stop: Sequence[str] = (), parser: MessageParser | None = None, *, one_call: bool = False
    ) -> None:
        self.n_calls = 0
        self._content = StopStrings(stop)
        self._parser = parser
        self._one_call = one_call
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    @property
    def stopped(self) -> bool:
        """Whether a stop string or the only call has come."""
        return self._content.stopped or (self._one_call and self.n_calls > 0)

    @property
    def holding(self) -> bool:
        """Whether text is held back."""
        is_parsing = self._parser is not None and self._parser.is_holding
        return is_parsing or bool(self._content.held or self._decoder.getstate()[0])

    @property
    def is_reasoning(self) -> bool:
        """Whether thinking comes next."""
        return self._parser is not None and self._parser.is_reasoning

    def push(self, piece: bytes) -> Delta:
        """Add the bytes of a token. Returns what can be shown now."""
        return self._read(self._decoder.decode(piece))

    def finish(self) -> Delta:
        """End the text. Returns what was held back."""
        rest = self._read(self._decoder.decode(b"", final=True), is_last=True)
        return rest._replace(text=rest.text + self._content.finish())

    def _read(self, decoded: str, *, is_last: bool = False) -> Delta:
        parser = self._parser
        if parser is None:
            return Delta(self._content.push(decoded))
        text, reasoning, calls = "", "", []
        for part in [*parser.push(decoded), *(parser.finish() if is_last else ())]:
            if self.stopped:
                break
            text += self._content.push(part.text)
            reasoning += part.reasoning
            calls += part.tool_calls
            self.n_calls += len(part.tool_calls)
        return Delta(text, reasoning, tuple(calls))
