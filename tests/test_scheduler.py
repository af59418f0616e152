"""Many generations at once: each equals itself alone, whatever shares its batches, and the caches never overflow."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import pytest

from edge_dlf import EdgeDLFError, FusionParams, NonFiniteLogitsError, SamplingParams
from edge_dlf.engine.constraint import StillComputingError, Tokens
from edge_dlf.engine.decoder import Decoder
from edge_dlf.engine.ensemble import Ensemble
from edge_dlf.engine.generation import Generation, GenerationRequest
from edge_dlf.engine.scheduler import Scheduler
from edge_dlf.fusion.fuser import Fuser
from edge_dlf.fusion.records import Pick

from .fake_backend import FakeBackend
from .test_decode import N_VOCAB, EachThird, family, generate

FUSIONS = [
    FusionParams(),
    FusionParams(method="static", alpha=0.8),
    FusionParams(method="large"),
    FusionParams(method="e1"),
    FusionParams(alpha_max=1.0, alpha_step=0.25),
    FusionParams(method="static", alpha={"e0": 0.3, "e1": 0.5}),
    FusionParams(method="weighted", weights={"large": 0.54, "base": -0.37, "e0": 0.8}),
    FusionParams(method="weighted", weights={"large": 0.5, "e1": 0.5}),
    FusionParams(method="weighted", weights={"large": 0.9, "e0": -0.3, "e1": 0.6}),
    FusionParams(method="weighted", weights={"e0": 1.2}),
]
SAMPLINGS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=4),
    SamplingParams(temperature=0.0, repeat_penalty=1.4, repeat_last_n=5),
    SamplingParams(temperature=1.3, top_k=0, top_p=0.9, min_p=0.0, seed=9, presence_penalty=0.3),
]


def scheduler_of(members: dict[str, FakeBackend]) -> Scheduler:
    return Scheduler(Decoder(Ensemble(members, N_VOCAB), Fuser(N_VOCAB)))


def make(scheduler: Scheduler, prompt: Sequence[int], fusion: FusionParams, sampling: SamplingParams) -> Generation:
    ensemble = scheduler.decoder.ensemble
    prompts = dict.fromkeys(ensemble.members, prompt)
    return Generation(GenerationRequest(ensemble.roles(fusion), prompts, fusion, sampling))


def run(
    scheduler: Scheduler, lengths: dict[Generation, int], n_prefill: int | None = None
) -> dict[Generation, list[Pick] | EdgeDLFError]:
    """Run generations until each has its number of picks, or failed."""
    results: dict[Generation, list[Pick] | EdgeDLFError] = {}
    picks: dict[Generation, list[Pick]] = {generation: [] for generation in lengths}
    for generation in lengths:
        scheduler.add(generation)
    while scheduler.n_active or scheduler.n_waiting:
        for result in scheduler.step(n_prefill):
            generation = result.generation
            picks[generation] += result.picks
            results[generation] = result.error or picks[generation]
            if result.error or len(picks[generation]) >= lengths[generation]:
                scheduler.remove(generation)
    return results


def prompts(n: int, seed: int = 0) -> list[list[int]]:
    """Prompts of which most begin alike."""
    random = np.random.default_rng(seed)
    heads = [random.integers(N_VOCAB, size=20).tolist(), random.integers(N_VOCAB, size=33).tolist(), []]
    heads[1][:20] = heads[0]
    return [[*heads[random.integers(3)], *random.integers(N_VOCAB, size=random.integers(1, 30))] for _ in range(n)]


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"n_batch": 7},
        {"n_seq_max": 1},
        {"n_ctx": 100, "n_cells": 100},
        {"n_ctx": 100, "n_cells": 101, "n_seq_max": 16, "n_batch": 200},
        {"n_ctx": 100, "n_cells": 150, "n_seq_max": 16, "n_batch": 17},
        {"has_streams": True, "n_seq_max": 8},
        {"has_streams": True, "n_seq_max": 16, "n_batch": 17},
        {"can_trim": False},
        {"can_trim": False, "n_ctx": 100, "n_cells": 150},
    ],
    ids=str,
)
@pytest.mark.parametrize("n_prefill", [None, 5])
def test_each_generation_equals_itself_alone(settings: dict[str, int], n_prefill: int | None) -> None:
    scheduler = scheduler_of(family(**settings))
    kinds = itertools.cycle(itertools.product(FUSIONS, SAMPLINGS))
    cases = {}
    for n, prompt in enumerate(prompts(30)):
        fusion, sampling = next(kinds)
        cases[make(scheduler, prompt, fusion, sampling)] = (prompt, 1 + 7 * n % 30, fusion, sampling)
    results = run(scheduler, {generation: case[1] for generation, case in cases.items()}, n_prefill)
    for generation, case in cases.items():
        alone = generate(family(), *case)
        picks = results[generation]
        assert isinstance(picks, list)
        assert [(pick.token, pick.weights) for pick in picks] == [(pick.token, pick.weights) for pick in alone]


def test_a_common_prefix_is_evaluated_once() -> None:
    head = list(range(40))
    members = family(n_seq_max=8)
    scheduler = scheduler_of(members)
    run(scheduler, {make(scheduler, [*head, n, n], FUSIONS[0], SAMPLINGS[0]): 3 for n in range(20)})
    for member in members.values():
        assert member.n_evaluated == len(head) + 20 * (2 + 2)


def test_sequences_with_streams_follow_each_other_in_every_batch() -> None:
    members = family(n_seq_max=6, has_streams=True)
    scheduler = scheduler_of(members)
    cases = {make(scheduler, [n, 5], FUSIONS[n % 2], SAMPLINGS[1]): 2 + 7 * n % 13 for n in range(17)}
    results = run(scheduler, cases)
    for member in members.values():
        for call in member.calls:
            seqs = sorted(run.seq for run in call)
            assert seqs == [*range(seqs[0], seqs[0] + len(seqs))]
    assert members["large"].n_swapped == members["base"].n_swapped > 0
    assert [len(picks) for picks in results.values() if isinstance(picks, list)] == list(cases.values())


def test_what_an_idle_sequence_holds_is_gone_on_with_wherever_it_is_moved() -> None:
    members = family(n_seq_max=4, has_streams=True)
    scheduler = scheduler_of(members)
    texts = [[n, *range(20)] for n in range(4)]
    run(scheduler, {make(scheduler, text, FUSIONS[0], SAMPLINGS[0]): 3 + n for n, text in enumerate(texts)})
    n_evaluated = members["large"].n_evaluated
    # The first and the last of the four at once: one of them has to move next to the other.
    run(scheduler, {make(scheduler, [*texts[n], 7], FUSIONS[0], SAMPLINGS[0]): 2 for n in (0, 3)})
    assert members["large"].n_swapped > 0
    run(scheduler, {make(scheduler, [*text, 7, 7], FUSIONS[0], SAMPLINGS[0]): 1 for text in texts})
    assert members["large"].n_evaluated - n_evaluated < 25


@pytest.mark.parametrize("fails", ["swap_fails", "copy_fails"])
@pytest.mark.parametrize("n_before", [0, 1])
def test_an_interrupt_amid_a_move_or_a_copy_costs_evaluations_only(fails: str, n_before: int) -> None:
    members = family(n_seq_max=6, has_streams=True)
    scheduler = scheduler_of(members)
    texts = [[n % 3, 6, 7, n] for n in range(16)]
    cases = {make(scheduler, text, FUSIONS[n % 2], SAMPLINGS[1]): 2 + 7 * n % 13 for n, text in enumerate(texts)}
    setattr(members["base"], fails, n_before)
    picks: dict[Generation, list[Pick]] = {generation: [] for generation in cases}
    for generation in cases:
        scheduler.add(generation)
    n_interrupts = 0
    while scheduler.n_active or scheduler.n_waiting:
        try:
            results = scheduler.step()
        except KeyboardInterrupt:
            n_interrupts += 1
            continue
        for result in results:
            assert not result.error
            picks[result.generation] += result.picks
            if len(picks[result.generation]) >= cases[result.generation]:
                scheduler.remove(result.generation)
    assert n_interrupts == 1
    for n, (generation, n_picks) in enumerate(cases.items()):
        alone = generate(family(), texts[n], n_picks, FUSIONS[n % 2], SAMPLINGS[1])
        assert [pick.token for pick in picks[generation]] == [pick.token for pick in alone]


def test_prompts_that_came_first_are_evaluated_first() -> None:
    scheduler = scheduler_of(family(n_seq_max=4, n_ctx=256))
    texts = [[n, *range(20)] for n in (41, 42, 43)]
    run(scheduler, {make(scheduler, text, FUSIONS[2], SAMPLINGS[0]): 1 for text in texts})
    # The first goes on with the text of the last sequence, so that the others get sequences of lower numbers.
    first, *later = (make(scheduler, [*texts[n], *[n] * 60], FUSIONS[2], SAMPLINGS[0]) for n in (2, 0, 1))
    scheduler.add(first)
    scheduler.step(n_prefill=8)
    for generation in later:
        scheduler.add(generation)
    for _ in range(6):
        scheduler.step(n_prefill=8)
    assert first.seq > later[-1].seq
    assert scheduler.decoder.n_due(first) < 10 < scheduler.decoder.n_due(later[0])


def test_the_same_prompt_many_times_is_evaluated_once() -> None:
    members = family(n_seq_max=4)
    scheduler = scheduler_of(members)
    run(scheduler, {make(scheduler, list(range(30)), FUSIONS[0], SAMPLINGS[0]): 1 for _ in range(9)})
    assert {member.n_evaluated for member in members.values()} == {30 + 8}


def test_long_prompts_do_not_keep_others_from_decoding() -> None:
    scheduler = scheduler_of(family(n_ctx=256, n_batch=16, n_seq_max=4))
    quick = make(scheduler, [1, 2], FUSIONS[0], SAMPLINGS[0])
    scheduler.add(quick)
    scheduler.step()
    for n in range(3):
        scheduler.add(make(scheduler, [n] * 200, FUSIONS[0], SAMPLINGS[0]))
    for _ in range(30):
        assert [len(r.picks) for r in scheduler.step() if r.generation is quick] == [1]
    assert scheduler.n_active == 4


def test_memory_that_runs_out_makes_the_youngest_wait_not_fail() -> None:
    """Room for one long text and a bit: two grow until the second has to give its place up."""
    members = family(n_ctx=100, n_cells=110, n_seq_max=2)
    scheduler = scheduler_of(members)
    first, second = (make(scheduler, [n] * 10, FUSIONS[0], SAMPLINGS[1]) for n in (1, 2))
    for generation in (first, second):
        scheduler.add(generation)
    seen = set()
    while len(first.tokens) < 95:
        scheduler.step()
        seen.add(scheduler.n_active)
    assert seen == {1, 2}
    assert 20 < len(second.tokens) < 95
    scheduler.remove(first)
    while len(second.tokens) < 95:
        scheduler.step()
    alone = generate(family(), [2] * 10, 85, FUSIONS[0], SAMPLINGS[1])
    assert list(second.tokens[10:]) == [pick.token for pick in alone]


@pytest.mark.parametrize("fusion", FUSIONS[:3], ids=("dynamic", "static", "large"))
def test_a_nan_fails_its_own_generation_only(fusion: FusionParams) -> None:
    members = family()
    scheduler = scheduler_of(members)
    cases = {make(scheduler, [n], fusion, SAMPLINGS[0]): n for n in range(8)}
    members["large"].poison = (5, float("nan"))
    results = run(scheduler, dict.fromkeys(cases, 12))
    members["large"].poison = None
    for generation, n in cases.items():
        alone = [pick.token for pick in generate(family(), [n], 12, fusion, SAMPLINGS[0])]
        outcome = results[generation]
        if 5 in [n, *alone[:-1]]:
            assert isinstance(outcome, NonFiniteLogitsError)
            assert outcome.member == "large"
        else:
            assert isinstance(outcome, list)
            assert [pick.token for pick in outcome] == alone
    assert any(isinstance(outcome, list) for outcome in results.values())
    assert any(not isinstance(outcome, list) for outcome in results.values())


def test_an_interrupt_in_the_middle_of_a_batch_leaves_caches_that_go_on() -> None:
    members = family(n_seq_max=3)
    scheduler = scheduler_of(members)
    generations = [make(scheduler, [n, n], FUSIONS[0], SAMPLINGS[0]) for n in range(3)]
    for generation in generations:
        scheduler.add(generation)
    for _ in range(4):
        scheduler.step()
    members["e0"].fail_at = 0
    with pytest.raises(KeyboardInterrupt):
        scheduler.step()
    for _ in range(5):
        scheduler.step()
    for n, generation in enumerate(generations):
        alone = generate(family(), [n, n], 9, FUSIONS[0], SAMPLINGS[0])
        assert list(generation.tokens[2:]) == [pick.token for pick in alone]


def test_what_is_taken_out_makes_room_and_leaves_the_rest_alone() -> None:
    scheduler = scheduler_of(family(n_seq_max=2))
    first, second, third = (make(scheduler, [n], FUSIONS[0], SAMPLINGS[1]) for n in range(3))
    for generation in (first, second, third):
        scheduler.add(generation)
    scheduler.step()
    assert (scheduler.n_active, scheduler.n_waiting) == (2, 1)
    scheduler.remove(first)
    assert (scheduler.n_active, scheduler.n_waiting) == (1, 1)
    scheduler.step()
    assert (scheduler.n_active, scheduler.n_waiting) == (2, 0)
    for generation, n in ((second, 1), (third, 2)):
        while len(generation.tokens) < 12:
            scheduler.step()
        alone = generate(family(), [n], 11, FUSIONS[0], SAMPLINGS[1])
        assert list(generation.tokens[1:12]) == [pick.token for pick in alone]
    for generation in (second, third):
        scheduler.remove(generation)
    assert scheduler.n_active == scheduler.n_waiting == 0
    assert scheduler.step() == []


def test_picked_tokens_count_while_a_generation_is_there() -> None:
    scheduler = scheduler_of(family(2))
    first, second = (make(scheduler, [1, 2, 3], FUSIONS[0], SAMPLINGS[0]) for _ in range(2))
    scheduler.add(first)
    scheduler.add(second)
    scheduler.step()
    n_steps = 1
    while scheduler.n_picked < 6:
        scheduler.step()
        n_steps += 1
    assert n_steps <= 5
    scheduler.remove(first)
    assert scheduler.n_picked == 3


def test_a_text_is_gone_on_with_where_it_lies_and_others_keep_theirs() -> None:
    """Talks that begin alike, turn after turn: each evaluates only what is new."""
    members = family(n_seq_max=3)
    scheduler = scheduler_of(members)
    head = list(range(30))
    talks = [[*head, n, n, n, n, n, n, n, n, n] for n in range(40, 43)]
    for turn in range(4):
        for talk in talks:
            before = members["large"].n_evaluated
            generation = make(scheduler, talk, FUSIONS[0], SAMPLINGS[0])
            run(scheduler, {generation: 4})
            n_new = (9 if talk is not talks[0] else 39) if turn == 0 else 2 + 1
            assert members["large"].n_evaluated - before == n_new + 3
            talk[:] = [*generation.tokens, turn, turn]


def test_a_prefix_is_the_last_to_be_forgotten_for_room() -> None:
    members = family(n_seq_max=4, n_ctx=100, n_cells=200)
    scheduler = scheduler_of(members)
    head = list(range(45))
    run(scheduler, {make(scheduler, [*head, 1], FUSIONS[0], SAMPLINGS[0]): 1})
    for n in range(2):
        run(scheduler, {make(scheduler, [n, *range(44, 0, -1)], FUSIONS[0], SAMPLINGS[0]): 1})
    busy = make(scheduler, [7] * 40, FUSIONS[0], SAMPLINGS[0])
    scheduler.add(busy)
    scheduler.step()
    before = members["large"].n_evaluated
    late = make(scheduler, [*head, *range(20)], FUSIONS[0], SAMPLINGS[0])
    scheduler.add(late)
    scheduler.step()
    assert members["large"].n_evaluated - before == 20 + 1


class Stuck(EachThird):
    """A constraint that computes until it is freed."""

    is_free = False

    def banned(self, ahead: Sequence[int], token: int, patience_s: float | None) -> Tokens | None:
        if not self.is_free and self.taken:
            assert patience_s is not None
            raise StillComputingError
        return super().banned(ahead, token, patience_s)

    def is_computing(self, patience_s: float) -> bool:
        return not self.is_free and bool(self.taken)


def test_a_constraint_that_computes_keeps_no_other_generation_waiting() -> None:
    scheduler, greedy = scheduler_of(family(1, n_seq_max=3)), SamplingParams(temperature=0.0)
    stuck = Stuck()
    slow = Generation(make(scheduler, [1, 2], FUSIONS[0], greedy).request, stuck)
    scheduler.add(slow)
    scheduler.step()
    scheduler.step()
    assert slow.n_picked == 1
    assert scheduler.step() == []
    others = [make(scheduler, prompt, FUSIONS[0], greedy) for prompt in ([1, 3, 4], [5])]
    for other in others:
        scheduler.add(other)
    for _ in range(9):
        assert {result.generation for result in scheduler.step()} == {*others}
    assert [other.n_picked for other in others] == [9, 9]
    assert slow.n_picked == 1
    stuck.is_free = True
    for _ in range(4):
        scheduler.step()
    expected = generate(family(1), [1, 2], 5, FUSIONS[0], greedy, constraint=EachThird())
    assert list(slow.tokens[2:]) == [pick.token for pick in expected]
