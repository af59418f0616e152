"""Text and its bytes: text that may be no valid Unicode, and text that comes in pieces."""

from __future__ import annotations

import codecs
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


class TextStream:
    """Decoder of the bytes of successive tokens into text that can be shown.

    Text is held back while it ends inside a UTF-8 character, or while it may be the beginning of a stop string.

    stop: texts that end the answer; they and all that follows are never shown.
    stopped: whether a stop string has appeared.
    """

    def __init__(self, stop: Sequence[str] = ()) -> None:
        self.stopped = False
        self._stop = tuple(stop)
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._held = ""

    def push(self, piece: bytes) -> str:
        """Add the bytes of a token. Returns the text that can be shown now."""
        return self.add(self._decoder.decode(piece))

    def finish(self) -> str:
        """End the text. Returns what was held back."""
        shown = self.add(self._decoder.decode(b"", final=True)) + self._held
        self._held = ""
        return shown

    @property
    def holding(self) -> bool:
        """Whether text is held back."""
        return bool(self._held or self._decoder.getstate()[0])

    def add(self, text: str) -> str:
        """Add decoded text. Returns the text that can be shown now."""
        if self.stopped:
            return ""
        self._held += text
        starts = [start for stop in self._stop if (start := self._held.find(stop)) >= 0]
        if starts:
            shown, self._held = self._held[: min(starts)], ""
            self.stopped = True
            return shown
        n_held = max((overlap(self._held, stop) for stop in self._stop), default=0)
        cut = len(self._held) - n_held
        shown, self._held = self._held[:cut], self._held[cut:]
        return shown
