"""What restricts the tokens of an answer, such as a grammar or a JSON schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from ..errors import EdgeDLFError

Tokens: TypeAlias = npt.NDArray[np.int64]


class StillComputingError(EdgeDLFError):
    """A constraint needs more time than it was given. The same question may be asked again later."""


class Constraint(Protocol):
    """A grammar, and how far one answer has gone in it. A constraint may take long to answer, and fail."""

    def banned(self, ahead: Sequence[int], token: int, patience_s: float | None) -> Tokens | None:
        """Return None if `token` may follow the answer and `ahead`, otherwise all tokens that may not, ascending.

        None where `ahead` itself may not follow: nothing after it is ever used. patience_s: how long to wait; None for
        as long as it takes. Raises StillComputingError where that does not suffice, and EdgeDLFError where the answer
        cannot go on.
        """

    def accept(self, token: int) -> None:
        """Append `token`, which is allowed, to the answer."""

    def is_computing(self, patience_s: float) -> bool:
        """Wait so long for the last question's answer. Returns whether there is still none."""
