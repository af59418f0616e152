"""One chat with one family: it sends messages, shows answers and counts them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from ..errors import ContextOverflowError, InvalidParameterError, shown
from ..params import DEFAULTS, Setting, settable
from .conversation import Conversation
from .interrupts import interruptible
from .kept import Kept
from .paint import AlphaPaint, color_system
from .screen import Screen, cut_short, summary
from .tracing import Tracer

if TYPE_CHECKING:
    from ..answers.stream import Report
    from ..api import FusedLlama
    from ..families.spec import FamilySpec

_ROOM_FOR_ANSWER = 512


@dataclass
class Session:
    """State of a chat, on which its commands act.

    spec: the family, with the profile that the command line chose.
    settings: choices of the user, which go before the family's own `defaults`.
    kept: where the conversation is kept; None where it is not.
    paints: whether tokens are coloured by their α.
    last: report of the last answer.
    n_answers, n_generated: answers and their tokens since the start.
    """

    llm: FusedLlama
    screen: Screen
    settings: dict[str, Any]
    spec: FamilySpec
    conversation: Conversation
    tracer: Tracer = field(default_factory=lambda: Tracer(None, ""))
    kept: Kept | None = None
    paints: bool = False
    last: Report | None = None
    n_answers: int = 0
    n_generated: int = 0

    @property
    def defaults(self) -> Mapping[str, Any]:
        """Settings that hold where the user chooses none: the family's, or those of the profile in use."""
        return {"profile": self.spec.profile, **self.spec.settings(self.settings.get("profile"))}

    def value(self, name: str) -> Any:
        """Value of the setting `name`: the user's choice, the family's, or the general default."""
        return self.settings.get(name, self.defaults.get(name, DEFAULTS[name]))

    def change(self, settings: dict[str, Any]) -> None:
        """Take other choices of the user, if the family can use them. Raises InvalidParameterError."""
        self.llm.files.roles({**self.spec.settings(settings.get("profile")), **settings})
        self.settings = settings

    def keep(self) -> None:
        """Keep the conversation as it is now, if this chat keeps any."""
        if self.kept:
            self.kept.keep(self.conversation, self.settings)

    def take(self, conversation: Conversation, settings: dict[str, Any]) -> None:
        """Go on with another conversation and its settings. Raises InvalidParameterError, and then changes nothing."""
        self.change({name: known(name).read(value) for name, value in settings.items()})
        self.conversation = conversation

    def paint(self) -> AlphaPaint | None:
        """Colours of this family's experts; None where the terminal shows none."""
        system = color_system()
        return AlphaPaint(self.llm.experts, self.value("alpha_max"), system) if system else None

    def ask(self, text: str) -> None:
        """Send a message, and show its answer as `answer` does."""
        self.conversation.ask(text)
        self.answer()

    def answer(self) -> None:
        """Show an answer to the last message, and keep as much of it as has come.

        On a terminal Ctrl-C stops the answer. Raises EdgeDLFError, and KeyboardInterrupt where there is no terminal.
        """
        stream = self.llm.stream(self._prompt(), **self.settings, **self.tracer.settings)
        question = self.conversation.messages[-1]["content"]
        paint = self.paint() if self.paints else None
        text, stopped = "", False
        self.screen.begin_wait("…")
        try:
            with interruptible(self.screen, self.llm.interrupt):
                for token in self.tracer.tokens(stream, question, self.llm):
                    text += token.text
                    self.screen.think(token.reasoning)
                    self.screen.write(token.text, paint.brush(token.alpha, token.expert) if paint else None)
        except KeyboardInterrupt:
            stopped = True
            if not self.screen.is_terminal:
                raise
        finally:
            self.screen.end_wait()
            self.screen.end_thinking()
            self.conversation.answer(text)
            if text:
                self.screen.end_line()
        self._conclude(stream.report, stopped, text)

    def _prompt(self) -> list[int]:
        """Prompt tokens of the conversation. Tells the user where turns had to be dropped."""
        n_before, n_ctx = self.conversation.n_dropped, self.llm.n_ctx
        fit = partial(self.conversation.fit, partial(self.llm.apply_chat_template, think=self.value("think")), n_ctx)
        least = min(_ROOM_FOR_ANSWER, n_ctx // 4)
        try:
            prompt = fit(self.value("max_tokens") or least)
        except ContextOverflowError:
            prompt = fit(least)  # more is not promised: max_tokens beyond the context is cut
        if n_turns := (self.conversation.n_dropped - n_before) // 2:
            turns = "oldest turn" if n_turns == 1 else f"oldest {n_turns} turns"
            self.screen.say(f"note: the context of {n_ctx} tokens is full: dropped the {turns}")
        return prompt

    def _conclude(self, report: Report, stopped: bool, text: str) -> None:
        """Count the answer, and say in one line how it went."""
        self.last = report
        self.n_answers += bool(text)
        self.n_generated += report.n_generated
        notes = ["stopped"] if stopped else []
        if not text:
            notes = [f"{'stopped before an answer began' if stopped else 'an empty answer'}; /retry asks again"]
        elif note := cut_short(report, self.llm.n_ctx):
            notes = [note]
        if self.screen.is_terminal:
            figures = summary(report) if text else ""
            self.screen.say(" · ".join(filter(None, [*notes, figures])))
        elif notes:
            self.screen.say(f"note: {notes[0]}")


def known(name: str) -> Setting:
    """The setting of this name. Raises InvalidParameterError where a chat has none."""
    if name not in (settings := settable("chat")):
        raise InvalidParameterError(f"there is no setting {shown(name)}; the settings are {', '.join(settings)}")
    return settings[name]
