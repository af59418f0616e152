"""Prompt lookup: drafts what followed the last time that the same tokens stood in the text."""

from __future__ import annotations

from array import array
from collections.abc import Callable, Sequence

NGRAM = 3
"""Tokens that must match for what followed them to be drafted."""
_LONGEST_MATCH = 32
"""Tokens of a match beyond which its length says no more."""


def lookup(tokens: Sequence[int], n_draft: int, is_end: Callable[[int], bool]) -> tuple[list[int], list[float]]:
    """Return up to `n_draft` tokens that followed the last occurrence of the last NGRAM tokens, and how likely each is.

    The likelihood grows with the length of the match. The draft stops before a token that ends an answer.

    >>> lookup([1, 2, 3, 4, 5, 1, 2, 3], 2, lambda token: False)[0]
    [4, 5]
    """
    text = array("i", tokens)
    width = text.itemsize
    raw = text.tobytes()
    pattern, end = raw[-NGRAM * width :], len(raw) - width
    while n_draft and len(tokens) > NGRAM and (found := raw.rfind(pattern, 0, end)) >= 0:
        if found % width == 0:
            start = found // width + NGRAM
            for n in range(n_draft):
                if is_end(text[start + n]):
                    break
                text.append(text[start + n])
            guesses = list(text[len(tokens) :])
            n_match = NGRAM
            while n_match < min(start, _LONGEST_MATCH) and text[start - n_match - 1] == tokens[-n_match - 1]:
                n_match += 1
            return guesses, [1 - 1 / (n_match + n) for n in range(len(guesses))]
        end = found + len(pattern) - 1
    return [], []
