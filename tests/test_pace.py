"""How long drafts are: by costs and acceptance, on a clock that the tests turn; never slower than plain."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pytest

from edge_dlf import FusionParams, SamplingParams
from edge_dlf.engine.backend import Logits, Run
from edge_dlf.engine.decode import Decoder
from edge_dlf.engine.ensemble import Ensemble
from edge_dlf.engine.generation import Generation
from edge_dlf.engine.pace import Contest, Pace, Way
from edge_dlf.fusion.fuser import Fuser

from .fake_backend import FakeBackend

N_VOCAB = 50
EXPERT = Way("e0", ("large", "base"), "e0")
# Milliseconds of batches of 1 to 9 tokens, as measured on two CPU cores: Qwen2.5-Coder 1.5B and 0.5B.
LARGE = (58, 89, 110, 105, 134, 150, 168, 186, 200)
SMALL = (35, 43, 49, 53, 77, 78, 79, 79, 85)
COSTS = {
    "as measured": (LARGE, SMALL),
    "each token costs": (tuple(range(60, 600, 60)), tuple(range(30, 300, 30))),
    "flat": ((10,) * 9, (3,) * 9),
    "an expert as large": (LARGE, LARGE),
    "dear from two on": ((58, *[140] * 8), (35, *[80] * 8)),
}


def pace_with(large: Sequence[int] = LARGE, small: Sequence[int] = SMALL) -> Pace:
    """A pace that knows these costs."""
    pace = Pace({})
    for n, (big, little) in enumerate(zip(large, small, strict=True), 1):
        for _ in range(2):
            pace.timed("large", n, big / 1e3)
            pace.timed("base", n, little / 1e3)
            pace.timed("e0", n, little / 1e3)
    return pace


def length(pace: Pace, chances: Sequence[float], n_most: int = 8) -> int:
    rate, _ = pace.best(EXPERT, pace.usual(EXPERT, n_most))
    return pace.length(EXPERT, chances, n_most, rate)


@pytest.mark.parametrize(
    ("chance", "n_draft", "gain"), [(0.9, 3, 1.5), (0.97, 8, 1.7), (0.6, 1, 1.05), (0.2, 0, 1.0)], ids=str
)
def test_the_best_fixed_length_and_what_it_gives(chance: float, n_draft: int, gain: float) -> None:
    pace = pace_with()
    rate, n = pace.best(EXPERT, [chance] * 8)
    plain, none = pace.best(EXPERT, [])
    assert (n, none) == (n_draft, 0)
    assert plain == pytest.approx(1e3 / (LARGE[0] + 2 * SMALL[0]))
    assert gain <= rate / plain < gain + 0.3


def test_guesses_that_are_sure_make_a_draft_longer_and_doubtful_ones_end_it() -> None:
    pace = pace_with()
    assert length(pace, [0.99]) > 1  # go on
    assert length(pace, [0.99, 0.99, 0.99, 0.1]) == 3
    assert length(pace, [0.05]) == 0
    assert length(pace, [0.99] * 3, n_most=3) == 3


def test_a_batch_of_four_that_costs_less_than_one_of_three_is_seen_from_afar() -> None:
    large, small = (58, 120, 125, 80, 150, 160, 170, 180, 190), (35,) * 9
    assert length(pace_with(large, small), [0.9, 0.9]) == 3


def test_nothing_is_drafted_before_a_plain_step_was_timed_and_no_leap_is_taken_beyond_that() -> None:
    pace = Pace({})
    assert length(pace, [1.0]) == 0
    for name in ("large", "base", "e0"):
        pace.timed(name, 1, 0.1)
    assert pace.n_dared(EXPERT) == 1
    pace.timed("large", 2, 0.1)
    assert pace.n_dared(EXPERT) == 1
    pace.timed("base", 2, 0.1)
    assert pace.n_dared(EXPERT) == 3


def test_costs_between_and_beyond_what_was_measured() -> None:
    pace = Pace({"large": 800, "base": 200})
    assert pace.cost("large", 1) == 0.0
    pace.timed("large", 1, 1.0)
    assert pace.cost("large", 3) == pytest.approx(1.3)
    assert pace.cost("base", 1) == pytest.approx(0.25)
    pace.timed("large", 5, 3.6)
    assert pace.cost("large", 5) == pytest.approx((3.6 + 1.6) / 2)  # timed only once: half a guess
    pace.timed("large", 5, 3.0)
    pace.timed("large", 5, 3.0)
    assert pace.cost("large", 5) == 3.0
    assert pace.cost("large", 3) == pytest.approx(1.3)
    assert pace.cost("large", 6) == pytest.approx(3.15)
    for _ in range(5):
        pace.timed("large", 5, 2.0)
    assert pace.cost("large", 5) == 2.0


def test_timings_that_were_not_renewed_are_doubted_ever_later() -> None:
    pace = Pace({})
    pace.timed("large", 1, 1.0)
    waits = []
    for _ in range(3):
        pace.timed("large", 2, 9.0)
        pace.timed("large", 2, 9.0)
        n_steps = 0
        while pace.cost("large", 2) == 9.0:
            pace.begin_step()
            n_steps += 1
        waits.append(n_steps)
        assert pace.cost("large", 2) == pytest.approx(1.15)
    assert waits == [129, 257, 513]


def test_the_choice_follows_costs_that_change_and_those_that_are_doubted() -> None:
    pace = pace_with()
    assert pace.best(EXPERT, [0.9] * 8)[1] == 3
    for n in range(2, 10):
        for _ in range(3):
            pace.timed("large", n, 9.0)
    assert pace.best(EXPERT, [0.9] * 8)[1] == 0
    for _ in range(144):
        pace.begin_step()
        for name, (alone, *_) in {"large": LARGE, "base": SMALL, "e0": SMALL}.items():
            pace.timed(name, 1, alone / 1e3)
    assert pace.best(EXPERT, [0.9] * 8)[1] > 0


def test_acceptance_is_learnt_for_each_degree_of_confidence() -> None:
    pace = Pace({})
    for n in range(200):
        pace.judged("e0", 0.99, n % 2 == 0)
        pace.judged("e0", 0.3, n % 10 != 0)
    sure, doubtful = pace.chances(EXPERT, [0.99, 0.3])
    assert sure == pytest.approx(0.5, abs=0.1)
    assert doubtful == pytest.approx(0.9, abs=0.1)
    assert pace.chances(Way("e1", ()), [0.7]) == [pytest.approx(0.7)]


class Clock:
    """Seconds that only what is simulated takes."""

    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


class TimedBackend(FakeBackend):
    """A scripted member that takes `costs[n - 1]` milliseconds for a batch of n tokens."""

    clock: Clock
    costs: Sequence[float]

    def row(self, text: Sequence[int]) -> Logits:
        return super().row([len(text), *text[-3:]])  # no two alike, and quickly

    def decode(self, runs: Sequence[Run]) -> None:
        super().decode(runs)
        n_tokens = sum(len(run.tokens) for run in runs)
        self.clock.now += self.costs[min(n_tokens, len(self.costs)) - 1] / 1e3


def timed_family(
    clock: Clock, large: Sequence[float], small: Sequence[float], common: float
) -> Mapping[str, FakeBackend]:
    members = {name: TimedBackend(seed, N_VOCAB, n_ctx=2000) for seed, name in enumerate(("large", "base", "e0"))}
    for name, member in members.items():
        member.n_bytes = 1000 * (large if name == "large" else small)[0]
        member.clock, member.costs, member.common = clock, large if name == "large" else small, common
    return members


def seconds(
    costs: tuple[Sequence[float], Sequence[float]],
    common: float,
    sampling: SamplingParams,
    n_draft: int | None,
    n_tokens: int,
    method: str = "dynamic",
) -> float:
    """What an answer takes, after its prompt."""
    clock = Clock()
    ensemble = Ensemble(timed_family(clock, *costs, common), N_VOCAB)
    decoder, fusion = Decoder(ensemble, Fuser(N_VOCAB), clock), FusionParams(method=method)
    prompts = {name: [1, 2, 3] for name in ensemble.members}
    generation = Generation(ensemble.roles(fusion), prompts, fusion, sampling, n_draft=n_draft)
    decoder.begin(generation)
    decoder.step([generation])
    started = clock.now
    while (n_left := n_tokens - len(generation.tokens)) > 0:
        generation.n_most = n_left
        decoder.step([generation])
    return clock.now - started


@pytest.mark.parametrize(
    ("costs", "method"), [*((costs, "dynamic") for costs in COSTS), ("as measured", "large"), ("flat", "large")]
)
@pytest.mark.parametrize(("common", "temperature"), [(0.0, 0.0), (0.6, 0.0), (0.9, 1.5)], ids=str)
def test_auto_is_never_slower_than_plain(costs: str, method: str, common: float, temperature: float) -> None:
    """Whether the expert is mostly wrong or right, the noise strong, and batches dear."""
    sampling = SamplingParams(temperature=temperature, seed=3, top_k=0, top_p=1.0, min_p=0.0)
    plain, auto = (seconds(COSTS[costs], common, sampling, n_draft, 120, method) for n_draft in (0, None))
    assert auto <= 1.03 * plain


@pytest.mark.parametrize(("costs", "gain"), [("as measured", 1.4), ("flat", 2.2)])
def test_auto_is_fast_where_the_expert_is_right(costs: str, gain: float) -> None:
    plain, auto = (seconds(COSTS[costs], 1.0, SamplingParams(temperature=0.0), n, 80) for n in (0, None))
    assert plain / auto > gain


def test_a_draft_is_as_long_as_was_meant_when_it_is_surely_right() -> None:
    """Members that are one: every guess is right, and drafts grow to eight tokens once such batches were tried."""
    clock = Clock()
    ensemble = Ensemble(timed_family(clock, *COSTS["flat"], 1.0), N_VOCAB)
    for member in ensemble.members.values():
        member.scale = 60.0  # sure of its guesses
    decoder, fusion = Decoder(ensemble, Fuser(N_VOCAB), clock), FusionParams()
    prompts = {name: [1, 2, 3] for name in ensemble.members}
    sampling = SamplingParams(temperature=0.0)
    generation = Generation(ensemble.roles(fusion), prompts, fusion, sampling, n_draft=None, n_most=100)
    decoder.begin(generation)
    n_picks = [len(decoder.step([generation])[0]) for _ in range(14)]
    assert n_picks[:4] == [1, 1, 2, 4]
    assert max(n_picks) == 9
    assert generation.n_drafted == generation.n_accepted == sum(n_picks) - len(n_picks)


def test_a_base_that_is_much_smaller_drafts_for_the_large_model_alone() -> None:
    costs = (100, 110, 120, 130, 140, 150, 160, 170, 180), (5,) * 9
    plain, auto = (seconds(costs, 1.0, SamplingParams(temperature=0.0), n, 80, "large") for n in (0, None))
    assert plain / auto > 2


def test_the_lengths_chosen_depend_on_the_clock_alone() -> None:
    first, second = (seconds(COSTS["as measured"], 0.8, SamplingParams(seed=1), None, 60) for _ in range(2))
    assert first == second


@pytest.mark.parametrize(("gain", "most"), [(0.8, 0.03), (0.5, 0.05), (1.2, 0.03), (3.0, 0.03)])
def test_the_slower_kind_of_step_is_tried_ever_more_rarely(gain: float, most: float) -> None:
    """Drafting gives `gain` times the tokens a second, which no estimate knows of."""
    contest, n_lost, n_steps = Contest(), 0.0, 6000
    for _ in range(n_steps):
        rate = gain if contest.drafts else 1.0
        n_lost += 1 - rate / max(gain, 1.0)
        contest.timed(3 if contest.drafts else 1, (3 if contest.drafts else 1) / rate)
    assert n_lost / n_steps < most


def test_steps_change_kind_where_the_text_does() -> None:
    contest = Contest()
    for n in range(12_000):
        is_easy = n > 6000
        contest.timed(2 if contest.drafts else 1, 1.3 if contest.drafts and is_easy else 2.5 if contest.drafts else 1.0)
        if n == 6000:
            assert not contest.drafts
    assert contest.drafts


def test_a_kind_that_is_hardly_slower_is_tried_often() -> None:
    contest, n_until = Contest(), 0
    for n in range(6000):
        gain = 0.97 if n < 3000 else 1.5
        contest.timed(2 if contest.drafts else 1, 2 / gain if contest.drafts else 1.0)
        n_until += n >= 3000 and not contest.drafts
    assert n_until < 250  # of 3,000, those included in which plain steps are tried later


def test_one_long_step_decides_nothing() -> None:
    contest = Contest()
    for n in range(400):
        contest.timed(2 if contest.drafts else 1, 40.0 if n % 50 == 0 else 1.0)
    assert contest.drafts


def test_a_step_that_is_long_by_its_draft_counts() -> None:
    contest, n_plain = Contest(), 0
    for n in range(800):
        long = n % 8 == 0
        contest.timed(*((9, 8.5) if long else (2, 3.4)) if contest.drafts else (1, 1.55))
        n_plain += not contest.drafts
    assert contest.drafts
    assert n_plain < 100
