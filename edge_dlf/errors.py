"""Every error that edge-dlf raises on purpose, and the exit code each has in the terminal.

EdgeDLFError                     1  the work failed
├── InvalidParameterError        2  an argument has a value that cannot be used (a ValueError too)
├── LoadError                    3  a model cannot be loaded
│   ├── ModelFileError           3  a file is missing, truncated, or no usable GGUF
│   └── FamilyError              3  the members do not make a family
│       └── VocabMismatchError   3  two members do not share one tokenizer
├── CapacityError                4  memory or context does not suffice
│   ├── ContextOverflowError     4  prompt, or prompt and answer, exceed the context
│   └── OutOfMemoryError         4  weights, KV cache or compute buffers could not be allocated
├── DownloadError                1  a file could not be brought from the Hugging Face hub
└── DecodeError                  1  a member failed while it evaluated tokens
    ├── NonFiniteLogitsError     1  a member returned NaN, +inf, or no finite logit at all
    └── RequestInterruptedError  130  the request was interrupted by `FusedLlama.interrupt`
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import islice
from os import PathLike
from reprlib import Repr
from typing import Any, ClassVar


class EdgeDLFError(Exception):
    """Base of all errors; `str(error)` is one line for a person."""

    exit_code: ClassVar[int] = 1


class InvalidParameterError(EdgeDLFError, ValueError):
    """An argument has a value that cannot be used."""

    exit_code = 2


def require(condition: object, message: str) -> None:
    """Raise InvalidParameterError with this message, which should cost little to write (`shown`), unless the condition
    holds."""
    if not condition:
        raise InvalidParameterError(message)


class _Beginning(Repr):
    """Writes the beginning of a value, in no more time however large it is."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict = 3, 4, 4, 4
        self.maxstring = self.maxlong = self.maxother = 60

    def repr_dict(self, x: Mapping[Any, Any], level: int) -> str:  # the inherited one sorts all keys
        return super().repr_dict(dict(islice(x.items(), self.maxdict + 1)), level)


_BEGINNING = _Beginning()


def shown(value: object) -> str:
    """Return a value as an error shows it: as Python would write it, cut where it is long."""
    try:
        return f"{_BEGINNING.repr(value):.60}".replace("\n", " ")
    except Exception:  # of a caller's own class, or of an integer with thousands of digits
        return f"<{type(value).__name__}>"


class LoadError(EdgeDLFError):
    """A model cannot be loaded."""

    exit_code = 3


class ModelFileError(LoadError):
    """A model file is missing, truncated, or not a GGUF that can be used.

    advice: what to do about it.
    """

    def __init__(
        self, path: str | PathLike[str], reason: str, advice: str = "correct the path, or download the file again"
    ) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason
        self.advice = advice


class FamilyError(LoadError):
    """The members, or the file that lists them, do not make a family."""


class VocabMismatchError(FamilyError):
    """Two members do not share one tokenizer."""


class CapacityError(EdgeDLFError):
    """Memory or context does not suffice for the request."""

    exit_code = 4


class ContextOverflowError(CapacityError):
    """The prompt, or the prompt and the answer asked for, exceed the context."""


class OutOfMemoryError(CapacityError):
    """Weights, KV cache or compute buffers could not be allocated."""


class DownloadError(EdgeDLFError):
    """A file could not be brought from the Hugging Face hub."""


class DecodeError(EdgeDLFError):
    """A member failed while it evaluated tokens."""


class NonFiniteLogitsError(DecodeError):
    """A member returned NaN, +inf, or a row with no finite logit."""

    def __init__(self, member: str, what: str) -> None:
        super().__init__(f"{member} returned {what} in its logits")
        self.member = member


class RequestInterruptedError(DecodeError):
    """The request was interrupted by `FusedLlama.interrupt`; the next one is not affected."""

    exit_code = 130
