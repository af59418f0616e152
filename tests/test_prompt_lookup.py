"""Drafts by prompt lookup."""

from __future__ import annotations

import pytest

from edge_dlf.engine.prompt_lookup import lookup

END = 99


@pytest.mark.parametrize(
    ("tokens", "n_draft", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 4, [4, 5, 1, 2]),
        ([1, 2, 3, 4, 5, 1, 2, 3], 8, [4, 5, 1, 2, 3, 4, 5, 1]),
        ([1, 2, 3, 4, 5, 1, 2, 3], 1, [4]),
        ([1, 2, 3, 9, 1, 2, 3, 4, 1, 2, 3], 2, [4, 1]),
        ([7, 7, 7, 7, 7], 3, [7, 7, 7]),
        ([1, 2, 3, 4], 3, []),
        ([1, 2], 3, []),
        ([1, 2, 3, 1, 2, 3], 0, []),
        ([256, 0, 0, 1, 0, 0], 3, []),
        ([1, 2, 3, 4, END, 5, 1, 2, 3], 4, [4]),
        ([1, 2, 3, END, 1, 2, 3], 4, []),
    ],
)
def test_what_followed_the_last_time(tokens: list[int], n_draft: int, expected: list[int]) -> None:
    guesses, probabilities = lookup(tokens, n_draft, END.__eq__)
    assert guesses == expected
    assert len(probabilities) == len(expected)


def test_a_longer_match_is_likelier_to_go_on() -> None:
    texts = [9, 2, 3, 4, 5, 8, 2, 3, 4], [1, 2, 3, 4, 5, 1, 2, 3, 4]
    short, long = (lookup(tokens, 2, END.__eq__)[1] for tokens in texts)
    assert short == [1 - 1 / 3, 1 - 1 / 4]
    assert long == [1 - 1 / 4, 1 - 1 / 5]
