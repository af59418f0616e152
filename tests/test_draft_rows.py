"""Drafts for several rows at once: each row equals itself alone, and one batch of each member verifies all drafts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from edge_dlf import FusionParams, NonFiniteLogitsError, SamplingParams
from edge_dlf.engine.backend import N_ROWS
from edge_dlf.engine.decoder import Decoder
from edge_dlf.engine.ensemble import Ensemble
from edge_dlf.engine.generation import Generation, GenerationRequest
from edge_dlf.engine.scheduler import Scheduler
from edge_dlf.fusion.fuser import Fuser

from .fake_backend import FakeBackend
from .test_decode import N_VOCAB, EachThird, alike, begin, generate
from .test_draft_length import COSTS, Clock, timed_family

FUSIONS = [
    FusionParams(),
    FusionParams(method="static", alpha={"e0": 0.9, "e1": 0.2}),
    FusionParams(method="weighted", weights={"large": 0.5, "e1": 0.5}),
    FusionParams(method="large"),
]
SAMPLINGS = [
    SamplingParams(temperature=0.0),
    SamplingParams(temperature=0.9, seed=4),
    SamplingParams(temperature=0.0, repeat_penalty=1.4, repeat_last_n=5),
    SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=9),
]
PROMPTS = [[1, 2], [3], [1, 2, 5, 6], [7, 8, 9, 10, 11, 12]]


def together(
    members: Mapping[str, FakeBackend], fusions: list[FusionParams], lengths: list[int], **settings: Any
) -> tuple[list[list[int]], list[Generation]]:
    """Tokens of rows of different sampling, decoded at once until each has its length."""
    scheduler = Scheduler(Decoder(Ensemble(members, N_VOCAB), Fuser(N_VOCAB)))
    generations = []
    for n, length in enumerate(lengths):
        prompts = dict.fromkeys(members, PROMPTS[n % 4])
        roles = scheduler.decoder.ensemble.roles(fusions[n % len(fusions)])
        sampling = SAMPLINGS[n % 4]
        generations.append(
            Generation(GenerationRequest(roles, prompts, fusions[n % len(fusions)], sampling, length, **settings))
        )
        scheduler.add(generations[-1])
    while scheduler.n_active or scheduler.n_waiting:
        for result in scheduler.step():
            assert result.error is None
            if result.generation.n_left == 0:
                scheduler.remove(result.generation)
    return [list(generation.tokens[generation.n_prompt :]) for generation in generations], generations


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: fusion.method)
@pytest.mark.parametrize("agreement", [0.0, 0.8, 1.0])
@pytest.mark.parametrize("n_draft", [None, 1, 3, 8])
def test_drafts_for_rows_change_no_token(fusion: FusionParams, agreement: float, n_draft: int | None) -> None:
    lengths = [30, 17, 9, 24]
    expected = [
        [pick.token for pick in generate(alike(2, agreement), PROMPTS[n], length, fusion, SAMPLINGS[n])]
        for n, length in enumerate(lengths)
    ]
    for settings in ({}, {"has_streams": True}, {"n_batch": 7}, {"n_cells": 100, "n_ctx": 60}):
        tokens, generations = together(alike(2, agreement, **settings), [fusion], lengths, n_draft=n_draft)
        assert tokens == expected
        if agreement == 1.0 and n_draft:
            assert all(generation.counts.n_accepted for generation in generations)


def test_rows_of_different_methods_equal_each_alone() -> None:
    lengths = [12, 20, 16, 9]
    tokens, _ = together(alike(2, 0.9), FUSIONS, lengths, n_draft=2)
    for n, length in enumerate(lengths):
        assert tokens[n] == [
            pick.token for pick in generate(alike(2, 0.9), PROMPTS[n], length, FUSIONS[n], SAMPLINGS[n])
        ]


def test_one_batch_of_each_member_verifies_the_drafts_of_all_rows() -> None:
    members = alike(1, 1.0)
    decoder = Decoder(Ensemble(members, N_VOCAB), Fuser(N_VOCAB))
    prompts = [[1, 2], [3, 9], [1, 2, 5, 6], [7, 8, 9, 10]]
    texts = [dict.fromkeys(members, prompt) for prompt in prompts]
    sampling = SamplingParams(temperature=0.0)
    rows = [begin(decoder, text, FusionParams(), sampling, seq=n, n_draft=8) for n, text in enumerate(texts)]
    decoder.step(rows)
    n_calls = {name: len(member.calls) for name, member in members.items()}
    results = decoder.step(rows)
    n_draft = (N_ROWS - 4) // 4
    assert [[pick.from_draft for pick in result.picks] for result in results] == [[True] * n_draft + [False]] * 4
    for name in ("large", "base"):
        assert len(members[name].calls) == n_calls[name] + 1
        assert [len(run.tokens) for run in members[name].calls[-1]] == [n_draft + 1] * 4
    guessing = members["e0"].calls[n_calls["e0"] :]
    assert [[len(run.tokens) for run in call] for call in guessing] == [[1] * 4] * (n_draft + 1)
    assert [row.counts.n_accepted for row in rows] == [n_draft] * 4
    for member in members.values():
        assert [member.cache[n] for n in range(4)] == [list(row.tokens[:-1]) for row in rows]


def test_drafts_leave_room_for_the_rows_of_prompts_that_end_in_the_same_step() -> None:
    members = alike(1, 1.0, n_seq_max=10)
    decoder = Decoder(Ensemble(members, N_VOCAB), Fuser(N_VOCAB))
    sampling = SamplingParams(temperature=0.0)
    rows = [
        begin(decoder, dict.fromkeys(members, prompt), FusionParams(), sampling, seq=n, n_draft=8)
        for n, prompt in enumerate([PROMPTS[0], PROMPTS[2], PROMPTS[3], PROMPTS[0][::-1], [5, 6]] * 2)
    ]
    decoder.step(rows[:1])
    results = decoder.step(rows)
    assert [len(result.picks) for result in results] == [N_ROWS - 9, *[1] * 9]


def test_a_row_is_drafted_for_while_another_reads_its_prompt() -> None:
    members = alike(1, 1.0)
    decoder = Decoder(Ensemble(members, N_VOCAB), Fuser(N_VOCAB))
    sampling = SamplingParams(temperature=0.0)
    first = begin(decoder, dict.fromkeys(members, PROMPTS[0]), FusionParams(), sampling, seq=0, n_draft=3)
    decoder.step([first])
    prompt = list(range(1, 40))
    second = begin(decoder, dict.fromkeys(members, prompt), FusionParams(), sampling, seq=1, n_draft=3)
    results = decoder.step([first, second], n_prefill=20)
    assert [len(result.picks) for result in results] == [4, 0]
    while second.n_picked < 6:
        decoder.step([first, second], n_prefill=20)
    assert list(second.tokens[39:45]) == [
        pick.token for pick in generate(alike(1, 1.0), prompt, 6, FusionParams(), sampling)
    ]


def test_a_row_that_fails_leaves_the_others_their_drafts() -> None:
    sampling = SamplingParams(temperature=0.0)
    members = alike(1, 1.0)
    decoder = Decoder(Ensemble(members, N_VOCAB), Fuser(N_VOCAB))
    rows = [
        begin(decoder, dict.fromkeys(members, prompt), FusionParams(), sampling, seq=n, n_draft=3)
        for n, prompt in enumerate(([1, 2], [7, 8]))
    ]
    decoder.step(rows)
    members["large"].poison = (rows[0].tokens[-1], float("nan"))
    bad, good = decoder.step(rows)
    assert isinstance(bad.error, NonFiniteLogitsError)
    assert not bad.picks
    assert [pick.from_draft for pick in good.picks] == [True, True, True, False]


@pytest.mark.parametrize("member", ["large", "e0"])
@pytest.mark.parametrize("n_calls", [0, 1, 2, 3])
def test_an_interrupt_amid_drafts_leaves_no_trace(member: str, n_calls: int) -> None:
    sampling = SamplingParams(temperature=0.0)
    members = alike(1, 0.95)
    decoder = Decoder(Ensemble(members, N_VOCAB), Fuser(N_VOCAB))
    rows = [
        begin(decoder, dict.fromkeys(members, prompt), FusionParams(), sampling, EachThird(), n, n_draft=2)
        for n, prompt in enumerate(PROMPTS[:3])
    ]
    decoder.step(rows)
    for _ in range(8):
        before = [list(row.tokens) for row in rows]
        members[member].fail_at = n_calls
        try:
            decoder.step(rows)
        except KeyboardInterrupt:
            assert [list(row.tokens) for row in rows] == before
        members[member].fail_at = None
        decoder.step(rows)
    for n, row in enumerate(rows):
        alone = generate(alike(1, 0.95), PROMPTS[n], row.n_picked, FusionParams(), sampling, constraint=EachThird())
        assert list(row.tokens[row.n_prompt :]) == [pick.token for pick in alone][: row.n_picked]


def tokens_a_second(costs: str, common: float, n_draft: int | None, n_rows: int, n_tokens: int = 80) -> float:
    """Of rows that are decoded at once, after their prompts, by a clock that only the members' batches turn."""
    clock = Clock()
    large, small = ([*own, *(own[-1] + (n + 1) * (own[-1] - own[-2]) for n in range(99))] for own in COSTS[costs])
    members = timed_family(clock, large, small, common, n_seq_max=n_rows)
    decoder = Decoder(Ensemble(members, N_VOCAB, clock=clock), Fuser(N_VOCAB))
    rows = []
    for n in range(n_rows):
        prompt = [1, 2, n]
        texts, sampling = dict.fromkeys(members, prompt), SamplingParams(temperature=0.0)
        rows.append(begin(decoder, texts, FusionParams(), sampling, seq=n, n_draft=n_draft, max_tokens=n_tokens))
    decoder.step(rows)
    started = clock.now
    while left := [row for row in rows if row.n_left > 0]:
        decoder.step(left)
    return n_rows * (n_tokens - 1) / (clock.now - started)


@pytest.mark.parametrize("costs", COSTS)
@pytest.mark.parametrize("n_rows", [2, 4, 12])
@pytest.mark.parametrize("common", [0.0, 0.8])
def test_auto_for_rows_is_never_slower_than_plain(costs: str, n_rows: int, common: float) -> None:
    plain, auto = (tokens_a_second(costs, common, n_draft, n_rows) for n_draft in (0, None))
    assert auto >= 0.96 * plain


@pytest.mark.parametrize(("n_rows", "gain"), [(2, 1.7), (4, 1.5)])
def test_auto_for_rows_is_fast_where_batches_are_cheap_and_guesses_right(n_rows: int, gain: float) -> None:
    plain, auto = (tokens_a_second("flat", 1.0, n_draft, n_rows) for n_draft in (0, None))
    assert auto >= gain * plain
