"""The loop against a plain one: members one token at a time, the float64 oracle, the twin of the selection."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from edge_dlf import FusionParams, NonFiniteLogitsError, SamplingParams
from edge_dlf.cli.screen import show
from edge_dlf.engine.constraint import Constraint, StillComputingError
from edge_dlf.engine.decoder import Decoder
from edge_dlf.engine.ensemble import Ensemble
from edge_dlf.engine.generation import Generation, GenerationRequest
from edge_dlf.fusion.fuser import Fuser
from edge_dlf.fusion.records import Pick

from . import naive
from .fake_backend import FakeBackend

N_VOCAB = 50


def family(n_experts: int = 2, **settings: Any) -> dict[str, FakeBackend]:
    names = ["large", "base", *(f"e{t}" for t in range(n_experts))]
    return {name: FakeBackend(seed, N_VOCAB + 3 * seed, **settings) for seed, name in enumerate(names)}


def alike(n_experts: int, agreement: float, **settings: Any) -> dict[str, FakeBackend]:
    """A family whose rows are a common part, and the rest of them each member's own."""
    members = family(n_experts, **settings)
    for member in members.values():
        member.common = agreement
    return members


def generate(
    members: Mapping[str, FakeBackend],
    prompt: list[int],
    n_tokens: int,
    fusion: FusionParams,
    sampling: SamplingParams,
    prompts: Mapping[str, list[int]] | None = None,
    **settings: Any,
) -> list[Pick]:
    decoder = Decoder(Ensemble(members, N_VOCAB), Fuser(N_VOCAB))
    texts = {**dict.fromkeys(members, prompt), **(prompts or {})}
    generation = begin(decoder, texts, fusion, sampling, max_tokens=n_tokens, **settings)
    picks: list[Pick] = []
    while len(picks) < n_tokens and not (picks and generation.request.is_end(picks[-1].token)):
        picks += step(decoder, generation)
    return picks


def begin(
    decoder: Decoder,
    prompts: Mapping[str, list[int]],
    fusion: FusionParams,
    sampling: SamplingParams,
    constraint: Constraint | None = None,
    seq: int = 0,
    **settings: Any,
) -> Generation:
    """A generation that the decoder has begun."""
    request = GenerationRequest(decoder.ensemble.roles(fusion), prompts, fusion, sampling, **settings)
    generation = Generation(request, constraint, seq)
    decoder.begin(generation)
    return generation


def step(decoder: Decoder, generation: Generation) -> list[Pick]:
    """The picks of one step. Raises the error that it gave instead."""
    (result,) = decoder.step([generation])
    assert result.generation is generation
    if result.error:
        raise result.error
    return result.picks


class EachThird:
    """A constraint: at each place of the answer another third of the tokens may stand.

    n_asks: how often a question has to be asked until it is answered, then and later.
    """

    def __init__(self, n_asks: int = 1) -> None:
        self.taken: list[int] = []
        self.n_asks = n_asks
        self.asked: list[tuple[list[int], int]] = []

    def banned(self, ahead: Sequence[int], token: int, patience_s: float | None) -> npt.NDArray[np.int64] | None:
        self.asked.append(([*self.taken, *ahead], token))
        if patience_s is not None and self.asked.count(self.asked[-1]) < self.n_asks:
            raise StillComputingError
        allowed = (len(self.taken) + len(ahead) + np.arange(N_VOCAB)) % 3 == 0
        return None if allowed[token] else np.flatnonzero(~allowed)

    def accept(self, token: int) -> None:
        assert (len(self.taken) + token) % 3 == 0
        self.taken.append(token)

    def is_computing(self, patience_s: float) -> bool:
        return False


def plain(
    members: Mapping[str, FakeBackend],
    prompt: list[int],
    n_tokens: int,
    fusion: FusionParams,
    sampling: SamplingParams,
    prompts: Mapping[str, list[int]] | None = None,
) -> list[int]:
    """The same by the oracle: every row from the whole text, one token at a time."""
    texts = {**dict.fromkeys(members, prompt), **(prompts or {})}
    first = next(name for name in members if name in taking_part(members, fusion))
    tokens: list[int] = []
    for _ in range(n_tokens):
        rows = {name: member.row([*texts[name], *tokens])[:N_VOCAB] for name, member in members.items()}
        history = [*texts[first], *tokens]
        recent = history[-sampling.repeat_last_n :] if sampling.repeat_last_n else []
        fused = naive.fused_row(rows, fusion)
        tokens.append(naive.select(fused, sampling, sampling.seed, len(history), recent))
    return tokens


def taking_part(members: Mapping[str, FakeBackend], fusion: FusionParams) -> set[str]:
    """Names of the members that a method has to decode."""
    if fusion.method == "weighted":
        return {name for name, weight in (fusion.weights or {}).items() if weight}
    if fusion.method == "blend":
        return set(members) - {"base"}
    return {fusion.method} if fusion.method in members else set(members)


WEIGHTS = [
    {"large": 0.54, "base": -0.37, "e0": 0.8},
    {"large": 0.5, "e0": 0.5},
    {"large": 1.2, "e0": -0.4},
    {"base": 0.7, "large": 0.3},
    {"large": 1.0},
    {"base": -0.5, "e0": 1.5},
    {"e0": 1.3, "base": 0},
]
"""Weights of members of every family here: without the base, without the large model, of one member alone."""
METHODS = [
    *(FusionParams(method=method, alpha=0.8) for method in ("dynamic", "static", "blend", "large", "base", "e0")),
    *(FusionParams(method="weighted", weights=weights) for weights in WEIGHTS),
]


def label(value: object) -> str | None:
    """Name a test by its method and weights."""
    return f"{value.method} {show(value.weights)}" if isinstance(value, FusionParams) else None


@pytest.mark.parametrize(
    "fusion",
    [*METHODS, FusionParams(method="weighted", weights={"large": 0.4, "base": -0.2, "e0": -0.3, "e1": 0.9})],
    ids=label,
)
@pytest.mark.parametrize(
    "sampling",
    [
        SamplingParams(temperature=0.0),
        SamplingParams(
            temperature=0.0, repeat_penalty=1.3, frequency_penalty=0.4, presence_penalty=0.2, repeat_last_n=8
        ),
        SamplingParams(seed=7, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0),
        SamplingParams(seed=8, temperature=0.7, repeat_penalty=1.1, logit_bias={3: 2.5, 4: float("-inf")}),
    ],
    ids=["greedy", "penalties", "whole", "filters"],
)
def test_a_generation_equals_the_plain_loop(fusion: FusionParams, sampling: SamplingParams) -> None:
    sampling = SamplingParams(**{**vars(sampling), "seed": sampling.seed or 1})
    for prompt in ([1], [5, 6, 7], list(range(30))):
        picks = generate(family(), prompt, 24, fusion, sampling)
        assert [pick.token for pick in picks] == plain(family(), prompt, 24, fusion, sampling)


@pytest.mark.parametrize("fusion", METHODS, ids=label)
def test_members_with_prompts_of_their_own(fusion: FusionParams) -> None:
    prompts = {"base": [9, 9], "e0": [8]}
    sampling = SamplingParams(temperature=0.0, repeat_penalty=1.3, seed=0)
    picks = generate(family(1), [1, 2, 3], 12, fusion, sampling, prompts)
    assert [pick.token for pick in picks] == plain(family(1), [1, 2, 3], 12, fusion, sampling, prompts)


def test_a_pick_tells_weights_and_probability() -> None:
    members = family(2)
    picks = generate(members, [1, 2], 6, FusionParams(), SamplingParams(temperature=0.0), n_top=3)
    text = [1, 2]
    for pick in picks:
        rows = [member.row(text)[:N_VOCAB] for member in members.values()]
        t, alpha, _ = naive.search(rows[0], rows[1], rows[2:])
        assert pick.weights == tuple(alpha if i == t else 0.0 for i in range(2))
        logprobs = np.log(naive.fused_probs(rows[0], rows[1], rows[2:], pick.weights))
        best = np.argsort(-logprobs)[:3]
        assert [token for token, _ in pick.top_logprobs] == best.tolist()
        np.testing.assert_allclose([value for _, value in pick.top_logprobs], logprobs[best], atol=1e-5)
        assert pick.logprob == pytest.approx(logprobs[pick.token], abs=1e-5)
        text.append(pick.token)


def test_an_expert_equal_to_the_base_leaves_the_large_model_as_it_is() -> None:
    members = family(1)
    members["e0"].seed, members["e0"].n_vocab = members["base"].seed, members["base"].n_vocab
    sampling = SamplingParams(seed=3)
    fused = generate(members, [1], 20, FusionParams(), sampling)
    alone = generate(family(1), [1], 20, FusionParams(method="large"), sampling)
    assert [pick.token for pick in fused] == [pick.token for pick in alone]
    assert all(pick.weights == (0.0,) for pick in fused)


def test_sequences_decoded_together_equal_each_alone() -> None:
    fusion = FusionParams()
    samplings = [SamplingParams(seed=seed, temperature=0.9) for seed in range(3)]
    starts = [[1, 2], [3], [4, 5, 6]]
    alone = [generate(family(), p, 15, fusion, s) for p, s in zip(starts, samplings, strict=True)]
    decoder = Decoder(Ensemble(family(), N_VOCAB), Fuser(N_VOCAB))
    together = [
        begin(decoder, dict.fromkeys(decoder.ensemble.members, prompt), fusion, sampling, seq=seq)
        for seq, (prompt, sampling) in enumerate(zip(starts, samplings, strict=True))
    ]
    picks: list[list[Pick]] = [[] for _ in together]
    for _ in range(15):
        for mine, result in zip(picks, decoder.step(together), strict=True):
            mine += result.picks
    assert [[pick.token for pick in mine] for mine in picks] == [[pick.token for pick in mine] for mine in alone]


def test_a_seed_is_drawn_where_none_is_given() -> None:
    decoder = Decoder(Ensemble(family(), N_VOCAB), Fuser(N_VOCAB))
    prompts = {name: [1] for name in decoder.ensemble.members}
    draws = [begin(decoder, prompts, FusionParams(), SamplingParams()).draw() for _ in range(4)]
    assert len({draw.seed for draw in draws}) == 4


@pytest.mark.parametrize("member", ["large", "base", "e1"])
@pytest.mark.parametrize("method", ["dynamic", "static", "weighted"])
def test_a_member_that_returns_nan_is_named(member: str, method: str) -> None:
    fusion = FusionParams(method=method, weights={"large": 0.5, "base": -0.3, "e1": 0.8})
    members = family()
    members[member].poison = (2, float("nan"))
    with pytest.raises(NonFiniteLogitsError, match=f"^{member} returned NaN"):
        generate(members, [1, 2], 3, fusion, SamplingParams(temperature=0.0))


def test_a_single_member_that_returns_inf_is_named() -> None:
    members = family()
    members["e1"].poison = (2, float("inf"))
    with pytest.raises(NonFiniteLogitsError, match=r"^e1 returned \+inf"):
        generate(members, [1, 2], 3, FusionParams(method="e1"), SamplingParams(temperature=0.0))


SAMPLINGS = {
    "greedy": SamplingParams(temperature=0.0),
    "penalties": SamplingParams(temperature=0.0, repeat_penalty=1.5, frequency_penalty=0.3, repeat_last_n=6),
    "filters": SamplingParams(temperature=0.8, seed=5),
    "hot": SamplingParams(temperature=1.5, top_k=0, top_p=1.0, min_p=0.0, seed=6, presence_penalty=0.5),
}


@pytest.mark.parametrize("sampling", SAMPLINGS.values(), ids=SAMPLINGS)
@pytest.mark.parametrize("fusion", METHODS, ids=label)
@pytest.mark.parametrize("n_experts", [1, 2, 3])
def test_drafting_changes_no_token(n_experts: int, fusion: FusionParams, sampling: SamplingParams) -> None:
    """For every length, and for members that agree never, sometimes and often."""
    sampling = dataclasses.replace(sampling, seed=sampling.seed or 1)
    for agreement in (0.0, 0.7, 1.0):
        plain_picks = generate(alike(n_experts, agreement), [1, 2], 30, fusion, sampling)
        for n_draft in (None, 1, 2, 3, 5, 8):
            members = alike(n_experts, agreement)
            picks = generate(members, [1, 2], 30, fusion, sampling, n_draft=n_draft)
            assert [pick.token for pick in picks] == [pick.token for pick in plain_picks]
            assert [pick.weights for pick in picks] == [pick.weights for pick in plain_picks]
            np.testing.assert_allclose([p.logprob for p in picks], [p.logprob for p in plain_picks], atol=1e-5)
            text = [1, 2, *(pick.token for pick in picks)]
            drafts_for_large = taking_part(members, fusion) == {"large"}
            for name, member in members.items():
                if name in taking_part(members, fusion):
                    assert member.cache[0] == text[:-1]
                else:
                    assert not member.calls or (drafts_for_large and name == "base")


@pytest.mark.parametrize(
    ("weights", "drafter"),
    [
        ({"large": 0.5, "base": -0.3, "e0": 0.2, "e1": 0.7}, "e1"),
        ({"large": 0.5, "e0": 0.9, "e1": 0.7}, "e0"),
        ({"large": 1.0, "e1": 0.1}, "e1"),
        ({"large": 1.0, "e0": -0.2, "e1": -0.1}, None),
        ({"large": 0.6, "base": 0.4}, None),
        ({"e1": 1.0}, None),
        ({"large": 1.0}, "base"),
    ],
    ids=str,
)
def test_the_expert_of_the_largest_positive_weight_drafts(weights: dict[str, float], drafter: str | None) -> None:
    members = alike(2, 1.0)
    fusion, sampling = FusionParams(method="weighted", weights=weights), SamplingParams(temperature=0.0)
    picks = generate(members, [1], 12, fusion, sampling, n_draft=3)
    assert any(pick.from_draft for pick in picks) == (drafter is not None)
    n_calls = {name: len(member.calls) for name, member in members.items() if member.calls}
    assert max(n_calls, key=lambda name: n_calls[name]) == (drafter or next(iter(n_calls)))
    assert n_calls.keys() == weights.keys() | ({"base"} if drafter == "base" else set())


@pytest.mark.parametrize("weights", WEIGHTS, ids=str)
@pytest.mark.parametrize("n_draft", [0, 3])
def test_plausibility_asks_the_experts_of_a_positive_weight(weights: dict[str, float], n_draft: int) -> None:
    fusion = FusionParams(method="weighted", weights=weights, plausibility=0.4)
    members = alike(1, 0.5)
    picks = generate(members, [1, 2], 15, fusion, SamplingParams(temperature=0.0), n_draft=n_draft)
    text = [1, 2]
    for pick in picks[:15]:
        rows = {name: member.row(text)[:N_VOCAB] for name, member in members.items()}
        fused = naive.fused_row(rows, fusion)
        assert pick.token == naive.restricted(fused, [rows["e0"]], [weights.get("e0", 0.0)], 0.4).argmax()
        text.append(pick.token)


@pytest.mark.parametrize("fusion", METHODS, ids=label)
@pytest.mark.parametrize("n_asks", [1, 2, 3])
@pytest.mark.parametrize("n_draft", [0, None, 3])
def test_a_constraint_is_kept_to_by_every_method(fusion: FusionParams, n_draft: int | None, n_asks: int) -> None:
    """The token at each place is the one that the oracle picks among those that are allowed, however long it takes to
    tell which these are."""
    sampling = SamplingParams(seed=3, temperature=0.9, top_k=0, top_p=1.0, min_p=0.0)
    members = alike(1, 0.8)
    picks = generate(members, [1, 2], 15, fusion, sampling, constraint=EachThird(n_asks), n_draft=n_draft)
    text = [1, 2]
    for n, pick in enumerate(picks[:15]):
        fused = naive.fused_row({name: member.row(text)[:N_VOCAB] for name, member in members.items()}, fusion)
        allowed = np.where((n + np.arange(N_VOCAB)) % 3 == 0, fused, -np.inf)
        assert pick.token == naive.select(allowed, sampling, 3, len(text))
        text.append(pick.token)


@pytest.mark.parametrize("method", ["dynamic", "large"])
@pytest.mark.parametrize("n_draft", [1, 2, 3, 8])
def test_nothing_is_evaluated_beyond_the_end_that_the_drafter_sees(n_draft: int, method: str) -> None:
    """Members that always agree: each guess is right, and so is that of the end, which needs no verifying."""
    fusion, sampling = FusionParams(method=method), SamplingParams(temperature=0.0)
    expected = [pick.token for pick in generate(alike(1, 1.0), [1, 2], 12, fusion, sampling)]
    for end in range(2, len(expected)):
        if expected[end] in expected[:end]:
            continue
        members = alike(1, 1.0)
        picks = generate(members, [1, 2], 99, fusion, sampling, n_draft=n_draft, is_end=expected[end].__eq__)
        assert [pick.token for pick in picks] == expected[: end + 1]
        assert members["large"].cache[0] == [1, 2, *expected[:end]]
        assert members["large"].n_evaluated == 2 + end


@pytest.mark.parametrize("n_taken", [1, 2, 3])
def test_a_step_of_several_picks_can_be_taken_back_in_part(n_taken: int) -> None:
    fusion, sampling = FusionParams(), SamplingParams(temperature=0.0)
    expected = [pick.token for pick in generate(alike(2, 1.0), [1, 2], 12, fusion, sampling)]
    members = alike(2, 1.0)
    decoder = Decoder(Ensemble(members, N_VOCAB), Fuser(N_VOCAB))
    generation = begin(decoder, {name: [1, 2] for name in members}, fusion, sampling, n_draft=3)
    decoder.step([generation])
    picks = step(decoder, generation)
    assert [pick.from_draft for pick in picks] == [True, True, True, False]
    decoder.rewind(generation, 4 - n_taken)
    text = [1, 2, *expected]
    assert list(generation.tokens) == text[: 3 + n_taken]
    for member in members.values():
        assert member.cache[0] == text[: 2 + n_taken]
    while len(generation.tokens) < len(text):
        decoder.step([generation])
    assert list(generation.tokens[: len(text)]) == text


@pytest.mark.parametrize("n_draft", [None, 2])
def test_drafting_right_after_prompts_of_their_own_that_are_cached(n_draft: int | None) -> None:
    fusion, sampling = FusionParams(), SamplingParams(temperature=0.0, seed=0)
    members = alike(1, 0.9)
    texts = {"large": [1, 2, 3], "base": [9, 9], "e0": [8]}
    decoder = Decoder(Ensemble(members, N_VOCAB), Fuser(N_VOCAB))
    expected = plain(members, [1, 2, 3], 8, fusion, sampling, texts)
    for _ in range(2):
        generation = begin(decoder, texts, fusion, sampling, n_draft=n_draft)
        while len(generation.tokens) < 3 + len(expected):
            decoder.step([generation])
        assert list(generation.tokens[3 : 3 + len(expected)]) == expected


@pytest.mark.parametrize("member", ["large", "base", "e0"])
@pytest.mark.parametrize("n_calls", [0, 1, 2])
@pytest.mark.parametrize("constraint", [None, EachThird])
def test_an_interrupt_amid_a_draft_leaves_no_trace(
    member: str, n_calls: int, constraint: type[EachThird] | None
) -> None:
    fusion, sampling = FusionParams(), SamplingParams(temperature=0.0)
    of_plain = constraint and constraint()
    expected = [pick.token for pick in generate(alike(1, 0.9), [1, 2], 24, fusion, sampling, constraint=of_plain)]
    members = alike(1, 0.9)
    decoder = Decoder(Ensemble(members, N_VOCAB), Fuser(N_VOCAB))
    texts = {name: [1, 2] for name in members}
    generation = begin(decoder, texts, fusion, sampling, constraint and constraint(), n_draft=2)
    decoder.step([generation])
    picked = list(generation.tokens)
    while len(picked) < 2 + len(expected):
        if len(picked) == len(generation.tokens):
            members[member].fail_at = n_calls
        try:
            picks = step(decoder, generation)
        except KeyboardInterrupt:
            assert list(generation.tokens) == picked
            picks = step(decoder, generation)
        picked += [pick.token for pick in picks]
        members[member].fail_at = None
        assert list(generation.tokens) == picked
        for backend in members.values():
            assert backend.cache[0] == picked[:-1]
    assert picked[2 : 2 + len(expected)] == expected
