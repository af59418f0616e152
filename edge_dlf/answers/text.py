"""Between text and bytes: characters and stop strings that span tokens, and text that is no Unicode."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Turns the bytes of successive tokens into text that is safe to show.

    Text is held back while it ends inside a UTF-8 character or could still become one of the `stop` strings. `stopped`
    is True once a stop string has appeared; it and all that follows is never shown.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, piece: bytes) -> str:
        """Add one token's bytes; returns the text that can be shown now."""
        return self._release(self._decoder.decode(piece))

    def finish(self) -> str:
        """Returns what was held back, once no token follows."""
        shown = self._release(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return shown

    @property
    def holding(self) -> bool:
        """Whether text is held back."""
        return bool(self._held or self._decoder.getstate()[0])

    def _release(self, text: str) -> str:
        if self.stopped:
            return ""
        self._held += text
        starts = [start for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if starts:
            shown, self._held = self._held[: min(starts)], ""
            self.stopped = True
            return shown
        n_held = max((_overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - n_held
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)


def to_bytes(text: str) -> bytes:
    """UTF-8; bytes that the terminal passed on undecoded come back as they were, lone surrogates as U+FFFD."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode("utf-8")
