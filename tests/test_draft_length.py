"""How long drafts are, on a clock that the tests turn: long where that pays, and never slower than plain decoding."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence

import pytest

from edge_dlf import FusionParams, SamplingParams
from edge_dlf.engine.backend import Logits, Run
from edge_dlf.engine.decoder import Decoder
from edge_dlf.engine.draft_length import Draft, DraftLength
from edge_dlf.engine.ensemble import Ensemble
from edge_dlf.engine.generation import Generation, GenerationRequest
from edge_dlf.fusion.fuser import Fuser
from edge_dlf.params import MAX_DRAFT

from .fake_backend import FakeBackend

Seconds = Callable[[int], float]
N_VOCAB = 50


def guessed(probabilities: Sequence[float], n_most: int) -> Draft:
    return Draft(n_most, probabilities=[*probabilities])


ANY = [guessed([], MAX_DRAFT)]
"""One row of which nothing was guessed yet."""
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


def flat(n: int) -> float:
    """A batch costs what a single step does, a guess a tenth."""
    return 1.0 + 0.1 * n


def dear(n: int) -> float:
    """A batch of two costs two steps."""
    return 1.0 + n


class Text:
    """A text of which each guess is right with a given chance, decoded by lengths that a `DraftLength` chooses."""

    def __init__(self, lengths: DraftLength) -> None:
        self.lengths = lengths
        self.random = random.Random(1)

    def decode(self, n_tokens: int, chance: float, seconds: Seconds, is_sure: bool = True) -> tuple[float, list[int]]:
        """Plain steps that `n_tokens` took, and the length of each draft. is_sure: whether the drafter thinks so."""
        n_left, spent = n_tokens, 0.0
        drafts = []
        while n_left > 0:
            n = self.lengths.best("expert", ANY)[1] if self.lengths.drafts else 0
            n_accepted = 0
            for _ in range(n):
                is_right = self.random.random() < chance
                self.lengths.experience.judged("expert", 0.95 if is_sure else 0.3, is_right)
                if not is_right:
                    break
                n_accepted += 1
            took = seconds(n) * self.random.uniform(0.95, 1.05)
            self.lengths.stepped("expert" if self.lengths.drafts else "", n, n_accepted + 1, took)
            spent += seconds(n)
            n_left -= n_accepted + 1
            drafts.append(n)
        return spent, drafts


def text() -> Text:
    return Text(DraftLength({"expert": 0.1}))


def plain_steps(lengths: DraftLength, seconds: float = 1.0) -> DraftLength:
    """As many as it takes: the first one may follow another kind of step, which costs time, and two are timed."""
    for _ in range(3):
        lengths.stepped("", 0, 1, seconds)
    return lengths


def test_nothing_is_drafted_before_a_plain_step_was_timed() -> None:
    lengths = DraftLength({})
    for _ in range(3):
        assert not lengths.drafts
        lengths.stepped("", 0, 1, 0.1)
    assert lengths.drafts


def test_a_plain_step_right_after_a_drafted_one_is_no_measure() -> None:
    """It takes longer, as each change of a batch's size does. A draft that only beats that one is a loss."""
    lengths = plain_steps(DraftLength({}))
    for _ in range(8):
        lengths.stepped("expert", 1, 2, 2.2)
        lengths.stepped("", 0, 1, 1.5)
    assert not lengths.drafts


def test_guesses_of_all_rows_are_weighed_by_what_their_batch_takes() -> None:
    lengths = DraftLength({}, n_rows=4)
    for _ in range(3):
        lengths.stepped("", 0, 4, 1.0)
    for n in range(1, 13):
        for _ in range(2):
            lengths.stepped("text", n, n + 4, 1.0 + (0.05 if n <= 4 else 0.2) * n)
    sure, unsure = guessed([0.999] * 3, 3), guessed([0.05] * 3, 3)
    assert lengths.best("text", [sure])[1] == 3
    assert lengths.best("text", [sure] * 4)[1] == 1
    assert lengths.best("text", [sure, unsure, unsure, unsure])[1] == 1
    assert lengths.best("text", [unsure] * 4)[1] == 0
    assert lengths.best("text", [guessed([], 0)] * 4)[1] == 0


def test_lengths_grow_step_by_step_where_guesses_are_cheap_and_right() -> None:
    spent, drafts = text().decode(300, 1.0, flat)
    assert spent < 100
    assert drafts[0] == 0
    assert max(drafts) > MAX_DRAFT // 2
    assert all(after <= 2 * max(drafts[: k + 1]) + 1 for k, after in enumerate(drafts[1:]))


@pytest.mark.parametrize("chance", [0.0, 0.5, 0.9])
def test_drafting_ends_where_a_batch_of_two_costs_two_steps(chance: float) -> None:
    spent, drafts = text().decode(400, chance, dear)
    assert spent < 1.05 * 400
    assert sum(drafts[200:]) < 30


@pytest.mark.parametrize("is_sure", [True, False])
def test_drafting_ends_where_guesses_are_wrong(is_sure: bool) -> None:
    spent, _ = text().decode(600, 0.0, lambda n: 1.0 + 0.3 * n, is_sure)
    assert spent < 1.03 * 600


def test_drafting_begins_again_when_guesses_become_right() -> None:
    answer = text()
    answer.decode(500, 0.0, lambda n: 1.0 + 0.3 * n)
    answer.decode(300, 1.0, lambda n: 1.0 + 0.3 * n)
    spent, _ = answer.decode(300, 1.0, lambda n: 1.0 + 0.3 * n)
    assert spent < 0.6 * 300


def test_drafting_begins_again_when_batches_become_cheap() -> None:
    answer = text()
    answer.decode(500, 1.0, dear)
    answer.decode(300, 1.0, flat)
    spent, _ = answer.decode(300, 1.0, flat)
    assert spent < 0.5 * 300


def test_a_step_that_something_else_disturbed_decides_nothing() -> None:
    n_steps = 0

    def disturbed(n: int) -> float:
        nonlocal n_steps
        n_steps += 1
        return flat(n) * (20 if n_steps % 25 == 1 and n else 1)

    _, drafts = text().decode(600, 1.0, disturbed)
    assert sum(drafts) > 0.7 * 600


def test_a_doubtful_guess_ends_a_draft_and_sure_ones_lengthen_it() -> None:
    lengths = plain_steps(DraftLength({"expert": 0.2}))
    for n in range(1, MAX_DRAFT + 1):
        for _ in range(3):
            lengths.stepped("expert", n, n + 1, 1.0 + 0.3 * n)
    for _ in range(30):
        lengths.experience.judged("expert", 0.9, True)
        lengths.experience.judged("expert", 0.1, False)
    rate, _ = lengths.best("expert", ANY)
    assert lengths.wanted("expert", [guessed([0.99], MAX_DRAFT)], rate) > 1
    assert lengths.wanted("expert", [guessed([0.99, 0.99, 0.05], MAX_DRAFT)], rate) == 2
    assert lengths.wanted("expert", [guessed([0.05], MAX_DRAFT)], rate) == 0
    assert lengths.wanted("expert", [guessed([0.99] * 3, 3)], rate) == 3


def test_a_guess_is_worth_what_its_drafter_was_right_by_when_so_sure() -> None:
    """A drafter that is often wrong though it is sure is not believed."""
    promises = []
    for accepted in (True, False):
        lengths = plain_steps(DraftLength({}))
        for _ in range(50):
            lengths.experience.judged("text", 0.8, accepted)
        promises.append(lengths.best("text", [guessed([0.8], 1)])[0])
    assert promises[0] > 1.5 > 1.3 > promises[1]


def test_a_clock_that_stands_still_divides_by_nothing() -> None:
    lengths = plain_steps(DraftLength({"expert": 0.5}), 0.0)
    for n in range(MAX_DRAFT):
        lengths.best("expert", ANY)
        lengths.wanted("expert", [guessed([0.5] * n, MAX_DRAFT)], 0.0)
        lengths.stepped("expert", n, 1, 0.0)
    assert lengths.best("expert", [guessed([], 0)])[1] == 0


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
    clock: Clock, large: Sequence[float], small: Sequence[float], common: float, **settings: int
) -> Mapping[str, FakeBackend]:
    members = {
        name: TimedBackend(seed, N_VOCAB, n_ctx=2000, **settings) for seed, name in enumerate(("large", "base", "e0"))
    }
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
    ensemble = Ensemble(timed_family(clock, *costs, common), N_VOCAB, clock=clock)
    decoder, fusion = Decoder(ensemble, Fuser(N_VOCAB)), FusionParams(method=method)
    prompts = {name: [1, 2, 3] for name in ensemble.members}
    request = GenerationRequest(
        ensemble.roles(fusion), prompts, fusion, sampling, max_tokens=n_tokens - 3, n_draft=n_draft
    )
    generation = Generation(request)
    decoder.begin(generation)
    decoder.step([generation])
    started = clock.now
    while generation.n_left > 0:
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
    assert auto <= 1.035 * plain


@pytest.mark.parametrize(("costs", "gain"), [("as measured", 1.4), ("flat", 2.2)])
def test_auto_is_fast_where_the_expert_is_right(costs: str, gain: float) -> None:
    plain, auto = (seconds(COSTS[costs], 1.0, SamplingParams(temperature=0.0), n, 80) for n in (0, None))
    assert plain / auto > gain


def test_a_draft_is_as_long_as_was_meant_when_it_is_surely_right() -> None:
    """Members that are one: every guess is right, and drafts grow to eight tokens once such batches were tried."""
    clock = Clock()
    ensemble = Ensemble(timed_family(clock, *COSTS["flat"], 1.0), N_VOCAB, clock=clock)
    for member in ensemble.members.values():
        member.scale = 60.0  # sure of its guesses
    decoder, fusion = Decoder(ensemble, Fuser(N_VOCAB)), FusionParams()
    prompts = {name: [1, 2, 3] for name in ensemble.members}
    sampling = SamplingParams(temperature=0.0)
    request = GenerationRequest(ensemble.roles(fusion), prompts, fusion, sampling, max_tokens=100, n_draft=None)
    generation = Generation(request)
    decoder.begin(generation)
    n_picks = [len(decoder.step([generation])[0].picks) for _ in range(16)]
    assert n_picks[:6] == [1, 1, 1, 1, 2, 4]
    assert max(n_picks) == 9
    assert generation.counts.n_drafted == generation.counts.n_accepted == sum(n_picks) - len(n_picks)


def test_a_base_that_is_much_smaller_drafts_for_the_large_model_alone() -> None:
    costs = (100, 110, 120, 130, 140, 150, 160, 170, 180), (5,) * 9
    plain, auto = (seconds(costs, 1.0, SamplingParams(temperature=0.0), n, 80, "large") for n in (0, None))
    assert plain / auto > 2


def test_the_lengths_chosen_depend_on_the_clock_alone() -> None:
    first, second = (seconds(COSTS["as measured"], 0.8, SamplingParams(seed=1), None, 60) for _ in range(2))
    assert first == second
