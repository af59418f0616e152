"""Text and its bytes: text that may be no valid Unicode, and text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


def to_bytes(text: str) -> bytes:
    """UTF-8 of `text`. Surrogates that stand for undecoded bytes become these bytes, other lone surrogates U+FFFD."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")


def overlap(text: str, mark: str) -> int:
    """Length of the longest end of `text` with which `mark` begins."""
    return next((n for n in range(min(len(text), len(mark) - 1), 0, -1) if text.endswith(mark[:n])), 0)


class StopStrings:
    """Texts that end an answer, looked for in pieces of it. They and all that follows are never shown.

    stopped: whether one of them has appeared.
    held: the end of the text, which is not shown while it may be the beginning of one of them.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self.held = ""
        self._stop = tuple(stop)

    def push(self, text: str) -> str:
        """Add text. Returns what can be shown now."""
        if self.stopped:
            return ""
        if not self._stop:
            return text
        self.held += text
        starts = [start for stop in self._stop if (start := self.held.find(stop)) >= 0]
        if starts:
            shown, self.held = self.held[: min(starts)], ""
            self.stopped = True
            return shown
        n_held = max((overlap(self.held, stop) for stop in self._stop), default=0)
        cut = len(self.held) - n_held
        shown, self.held = self.held[:cut], self.held[cut:]
        return shown

    def finish(self) -> str:
        """End the text. Returns what was held back."""
        shown, self.held = self.held, ""
        return shown
