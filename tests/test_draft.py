"""Drafters and the pace."""

from __future__ import annotations

import pytest

from edge_dlf.draft import NgramDrafter
from edge_dlf.pace import Pace


@pytest.mark.parametrize(
    ("tokens", "n_draft", "expected"),
    [
        ([1, 2, 3, 4, 5, 1, 2, 3], 4, [4, 5, 1, 2]),
        ([1, 2, 3, 4, 5, 1, 2, 3], 1, [4]),
        ([1, 2, 3, 9, 1, 2, 3, 4, 1, 2, 3], 2, [4, 1]),
        ([7, 7, 7, 7, 7], 3, [7]),
        ([1, 2, 3, 4], 3, []),
        ([1, 2], 3, []),
        ([256, 0, 0, 1, 0, 0], 3, []),
    ],
)
def test_what_followed_the_last_time(tokens: list[int], n_draft: int, expected: list[int]) -> None:
    assert NgramDrafter().draft(tokens, n_draft) == expected


MEMBERS = ("large", "base", "expert")
# Milliseconds of batches of 1 to 9 tokens, as measured on two CPU cores: Qwen2.5-Coder 1.5B and 0.5B.
LARGE = [58, 89, 110, 105, 134, 150, 168, 186, 200]
SMALL = [35, 43, 49, 53, 77, 78, 79, 79, 85]


def pace_with(accepted: int, large: list[int] = LARGE) -> Pace:
    """A pace that knows these costs, and that of ten drafted tokens `accepted` are right."""
    pace = Pace()
    for n, (big, small) in enumerate(zip(large, SMALL, strict=True), 1):
        pace.timed("large", n, big / 1e3)
        for name in ("base", "expert"):
            pace.timed(name, n, small / 1e3)
    for n in range(100):
        pace.judged("expert", 1, int(n % 10 < accepted))
    return pace


def test_a_drafter_that_is_mostly_right_drafts_three() -> None:
    pace = pace_with(9)
    n = pace.choose("expert", "expert", MEMBERS, 8)
    assert n == 3
    plain = pace.rate("expert", "expert", MEMBERS, 0)
    assert pace.rate("expert", "expert", MEMBERS, n) / plain > 1.4


def test_a_drafter_that_is_always_wrong_does_not_draft_but_for_rare_trials() -> None:
    pace = pace_with(0)
    choices = [pace.choose("expert", "expert", MEMBERS, 8) for _ in range(100)]
    assert choices.count(0) >= 97
    assert max(choices) == 1


def test_nothing_is_drafted_where_a_batch_costs_as_much_as_its_tokens_apart() -> None:
    pace = pace_with(9, large=[1000 * n for n in range(1, 10)])
    assert pace.choose("expert", "expert", MEMBERS, 8) == 0


def test_a_free_draft_needs_no_member() -> None:
    pace = pace_with(0)
    for _ in range(50):
        pace.judged("n-gram", 4, 4)
    assert pace.choose("n-gram", None, MEMBERS, 8) >= 3


def test_nothing_is_drafted_before_a_plain_step_was_timed() -> None:
    assert Pace().choose("expert", "expert", MEMBERS, 8) == 0


def test_costs_between_and_beyond_what_was_measured() -> None:
    pace = Pace()
    pace.timed("large", 1, 1.0)
    assert pace.cost("large", 3) == pytest.approx(1.3)
    pace.timed("large", 5, 3.0)
    assert pace.cost("large", 3) == pytest.approx(2.0)
    assert pace.cost("large", 6) == pytest.approx(3.15)
    for _ in range(3):
        pace.timed("large", 5, 2.0)
    assert pace.cost("large", 5) == 2.0
