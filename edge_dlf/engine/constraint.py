"""What restricts the tokens of an answer, such as a grammar or a JSON schema."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt


class Constraint(Protocol):
    """A grammar, and how far one answer has gone in it."""

    def allows(self, guesses: Sequence[int], token: int) -> bool:
        """Tell whether `token` may follow the answer and `guesses`. True where the guesses themselves may not follow:
        nothing after them is ever used."""

    def banned(self, guesses: Sequence[int]) -> npt.NDArray[np.int64]:
        """Return the tokens that may not follow the answer and `guesses`, ascending; none where the guesses themselves
        may not follow."""

    def accept(self, token: int) -> None:
        """Append `token`, which is allowed, to the answer."""
