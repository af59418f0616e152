"""The commands of a chat: lines that begin with a slash."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from ..errors import EdgeDLFError, InvalidParameterError, require
from ..params import settable
from . import conversation
from .screen import one_line, show
from .session import Session, known


def run(session: Session, line: str) -> bool:
    """Run the command in `line`; returns whether the chat goes on. Raises EdgeDLFError."""
    name, argument = [*line[1:].split(maxsplit=1), "", ""][:2]
    if name in LEAVE:
        return False
    if name not in COMMANDS:
        session.screen.say(
            f"unknown command /{one_line(name)[:40]}; /help lists them, and // sends a text that begins with /"
        )
    else:
        COMMANDS[name][-1](session, argument)
    return True


def _help(session: Session, _: str) -> None:
    for name, (arguments, about, _run) in COMMANDS.items():
        session.screen.say(f"{f'/{name} {arguments}':<28} {about}")
    session.screen.say(f"{'/exit':<28} leave, as /quit, /bye and Ctrl-D do")
    session.screen.say(
        'Alt-Enter, or a backslash before Enter, begins a new line; text between two """ may have many lines;'
    )
    session.screen.say("Ctrl-C stops an answer; // sends a text that begins with /")


def _system(session: Session, text: str) -> None:
    if text:
        session.conversation.system = None if text == '""' else text
    session.screen.say(f"system prompt: {session.conversation.system or 'none'}")


def _clear(session: Session, _: str) -> None:
    if session.kept:
        session.kept.begin()
    session.conversation.clear()
    session.screen.say(f"cleared{'; the system prompt stays' if session.conversation.system else ''}")


def _undo(session: Session, _: str) -> None:
    message = session.conversation.undo()
    session.screen.say("there is nothing to undo" if message is None else f"forgot: {one_line(message)[:60]}")


def _retry(session: Session, _: str) -> None:
    if session.conversation.retry():
        session.answer()
    else:
        session.screen.say("there is nothing to retry")


def _method(session: Session, name: str) -> None:
    if name:
        _choose(session, "method", name)
    names = ", ".join(session.llm.files.methods)
    session.screen.say(f"method: {session.value('method')}" + ("" if name else f" (of {names})"))


def _alpha(session: Session, text: str) -> None:
    if text == "on":
        paint = session.paint()
        session.paints = paint is not None
        if paint:
            session.screen.show(paint.legend())
        else:
            session.screen.say("this terminal shows no colours")
    elif text == "off":
        session.paints = False
        session.screen.say("tokens are not coloured")
    else:
        if text:
            _choose(session, "alpha", text)
        unused = "" if session.value("method") == "static" else ", which /method static uses"
        session.screen.say(
            f"alpha: {show(session.value('alpha'))}{unused}; colours: {'on' if session.paints else 'off'}"
        )


def _set(session: Session, text: str) -> None:
    name, value = [*text.split(maxsplit=1), "", ""][:2]
    name = name.replace("-", "_")
    if name:
        known(name)
    if value == "default":
        session.settings.pop(name, None)
    elif value:
        _choose(session, name, value)
    for setting in [name] if name else settable("chat"):
        session.screen.say(f"{setting} {show(session.value(setting))}{' (set)' if setting in session.settings else ''}")


def _choose(session: Session, name: str, text: str) -> None:
    """Set one setting, if the family can use it."""
    session.change({**session.settings, name: known(name).parse(text)})


def _save(session: Session, file: str) -> None:
    require(file, "usage: /save FILE")
    session.conversation.save(Path(file), session.llm.name, session.settings)
    n_messages = _count(len(session.conversation.messages), "message")
    session.screen.say(f"saved {n_messages} and the settings in {file}")
    session.llm.driver.keep()


def _load(session: Session, file: str) -> None:
    require(file, "usage: /load FILE")
    session.take(*conversation.load(Path(file)))
    if session.kept:
        session.kept.begin()
    session.screen.say(f"loaded {_count(len(session.conversation.messages), 'message')} and the settings from {file}")


def _sessions(session: Session, number: str) -> None:
    if not session.kept:
        raise InvalidParameterError("this chat keeps no conversations: it does on a terminal, and with --continue")
    files = session.kept.files()
    if not number:
        for n, path in enumerate(files, 1):
            here = "*" if path == session.kept.path else " "
            session.screen.say(f"{n:>3}{here} {_begun(path)}  {_about(path)}")
        session.screen.say("/sessions NUMBER goes on with one of them" if files else "no conversation is kept yet")
    elif number not in (numbers := list(map(str, range(1, len(files) + 1)))):
        raise InvalidParameterError(f"there is no conversation {one_line(number)[:40]!r}; /sessions lists them")
    else:
        reopen(session, files[numbers.index(number)])


def reopen(session: Session, path: Path, settings: Mapping[str, Any] = MappingProxyType({})) -> None:
    """Go on with a kept conversation. `settings` go before its own. Raises EdgeDLFError."""
    assert session.kept
    loaded, saved = session.kept.open(path)
    try:
        session.take(loaded, {**saved, **settings})
    except InvalidParameterError as error:
        session.screen.say(f"note: its settings are left out ({one_line(error)})")
        session.take(loaded, dict(settings))
    session.screen.say(f"going on with {_about(path)}")


def _begun(path: Path) -> str:
    date, time = [*path.stem.split("-"), ""][:2]
    return f"{date[:4]}-{date[4:6]}-{date[6:8]} {time[:2]}:{time[2:4]}"


def _about(path: Path) -> str:
    """How long a kept conversation is, and how it begins."""
    try:
        messages = conversation.load(path)[0].messages
    except EdgeDLFError as error:
        return one_line(error)
    return f"{_count(len(messages), 'message')}: {one_line(messages[0]['content'])[:50] if messages else ''}"


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"


def _stats(session: Session, _: str) -> None:
    say, last = session.screen.say, session.last
    say(f"family {session.llm.name} · method {session.value('method')} · context {session.llm.n_ctx} tokens")
    say(f"{_count(session.n_answers, 'answer')} · {_count(session.n_generated, 'token')} generated")
    if last:
        used = last.n_prompt + last.n_generated
        say(
            f"last answer: prompt {last.n_prompt} tokens, {last.counts.n_prefilled} of them evaluated at "
            f"{last.prompt_tps:.1f} tokens/s · {last.n_generated} tokens at {last.generation_tps:.1f} tokens/s · "
            f"context {used / session.llm.n_ctx:.0%} used"
        )
        if (counts := last.counts).n_drafted:
            say(
                f"drafted {counts.n_drafted} tokens, {counts.n_accepted} accepted: {counts.n_steps} steps in place of "
                f"{counts.n_steps + counts.n_accepted}"
            )


COMMANDS: dict[str, tuple[str, str, Callable[[Session, str], None]]] = {
    "help": ("", "this list", _help),
    "system": ("[TEXT]", 'show or set the system prompt; "" removes it', _system),
    "clear": ("", "begin a new conversation; the system prompt stays", _clear),
    "undo": ("", "forget the last message and its answer", _undo),
    "retry": ("", "answer the last message again", _retry),
    "method": ("[NAME]", "show or choose the method, or one expert alone", _method),
    "alpha": ("[on|off|NUMBER|NAME=NUMBER,…]", "colour tokens by their α, or set α for method static", _alpha),
    "set": ("[NAME [VALUE]]", "show or change settings; the value 'default' takes a change back", _set),
    "save": ("FILE", "write the conversation and the settings", _save),
    "load": ("FILE", "read them back", _load),
    "sessions": ("[NUMBER]", "list the conversations that are kept, or go on with one", _sessions),
    "stats": ("", "speed and use of the context", _stats),
}
"""Name -> what may follow it, one line of help, and the function that gets the session and the rest of the line."""
LEAVE = ("exit", "quit", "bye")
