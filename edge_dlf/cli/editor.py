"""The prompt of the chat, with line editing, completion and a history."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import Completer, NestedCompleter, PathCompleter, WordCompleter, merge_completers
from prompt_toolkit.document import Document
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.keys import Keys
from prompt_toolkit.layout.processors import TabsProcessor

from ..params import settable
from ..system.paths import user_dir
from .commands import COMMANDS, LEAVE

_QUOTES = '"""'
_PASTE_ENDS, _CTRL_C = "\x1b[201~", "\x03"


class Editor:
    """Reader of messages from a terminal.

    methods: names that complete after /method.
    note: called with one line where the history cannot be kept.
    """

    def __init__(self, methods: Iterable[str], note: Callable[[str], None]) -> None:
        self._session: PromptSession[str] = PromptSession(
            ">>> ",
            multiline=True,
            prompt_continuation=lambda _width, _line, wraps: "" if wraps else "... ",
            history=_history(note),
            key_bindings=_key_bindings(),
            completer=completer(methods),
            complete_while_typing=False,
            enable_suspend=True,
            input_processors=[TabsProcessor(char1=" ", char2=" ")],
        )
        _let_ctrl_c_end_a_paste(getattr(self._session.app.input, "vt100_parser", None))

    def read(self) -> str:
        """Read the next message or command. Raises EOFError at Ctrl-D and KeyboardInterrupt at Ctrl-C."""
        text = self._session.prompt()
        block = text.strip()
        if not block.startswith(_QUOTES):
            return text
        inside = block.removeprefix(_QUOTES).removesuffix(_QUOTES).strip("\n")
        return f"/{inside}" if inside.startswith("/") else inside

    @property
    def was_empty(self) -> bool:
        """Whether nothing was typed when `read` ended."""
        return not self._session.default_buffer.text


def _let_ctrl_c_end_a_paste(parser: Any) -> None:
    """Let Ctrl-C end a paste whose own end was lost on its way, which would take in every key that follows.

    parser: prompt_toolkit's parser of what a terminal sends; None where there is none.
    """
    if parser is None:
        return
    feed = parser.feed

    def feed_and_look(data: str) -> None:
        feed(data)
        if data.endswith(_CTRL_C) and getattr(parser, "_in_bracketed_paste", False):
            feed(f"{_PASTE_ENDS}{_CTRL_C}")

    parser.feed = feed_and_look


def _is_open_block(text: str) -> bool:
    block = text.strip()
    return block.startswith(_QUOTES) and (len(block) < 6 or not block.endswith(_QUOTES))


def _is_more_than_text(paste: str) -> bool:
    """Whether a pasted text would be read as a block, or as a command with lines after it."""
    is_command = paste.startswith("/") and "\n" in paste.strip()
    return is_command or (paste.lstrip().startswith(_QUOTES) and paste.strip() != _QUOTES)


def _key_bindings() -> KeyBindings:
    """Keys: Enter sends the message, unless the text asks for another line; Alt-Enter always begins one. What a paste
    holds is text, and is put into a block where it would be read as more."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.text_before_cursor.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        elif _is_open_block(buffer.text):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add(Keys.Vt100MouseEvent)
    def _(event: KeyPressEvent) -> None:
        # No mouse was asked for: this is a colour in a text that is pasted as if it was typed.
        event.current_buffer.insert_text(event.data)

    @bindings.add(Keys.BracketedPaste)
    def _(event: KeyPressEvent) -> None:
        buffer, paste = event.current_buffer, event.data.replace("\r\n", "\n").replace("\r", "\n")
        if buffer.document.text_before_cursor.strip() or not _is_more_than_text(paste):
            buffer.insert_text(paste)
        else:
            above = f"{_QUOTES}\n{paste}"
            buffer.document = Document(f"{above}{buffer.document.text_after_cursor}\n{_QUOTES}", len(above))

    return bindings


def completer(methods: Iterable[str]) -> Completer:
    """Completion of commands, methods, settings and files on lines that begin with a slash."""
    arguments = {"/method": [*methods], "/alpha": ["on", "off"], "/set": [*settable("chat")]}
    nested: dict[str, Completer | None] = {f"/{name}": None for name in (*COMMANDS, *LEAVE)}
    nested |= {name: WordCompleter(words, sentence=True) for name, words in arguments.items()}
    nested |= dict.fromkeys(("/save", "/load"), PathCompleter(expanduser=True))
    # One completes the word after the slash, which holds a sign that the other takes for the end of a word.
    return merge_completers([WordCompleter([*nested], sentence=True), NestedCompleter(nested)], deduplicate=True)


def _history(note: Callable[[str], None]) -> History:
    """History of earlier lines, in a file that only its owner can read."""
    file = user_dir("state") / "chat_history"
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(file, os.O_RDWR | os.O_CREAT, 0o600))
    except OSError as error:
        note(f"note: the history cannot be kept in {file} ({(error.strerror or str(error)).lower()})")
        return InMemoryHistory()
    return _History(str(file))


class _History(FileHistory):
    """History that does not end the chat when its file cannot be written."""

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string.encode("utf-8", "replace").decode())
