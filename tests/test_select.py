"""Selection from a fused row against `naive`: penalties, filters, the draw, logprobs."""

from __future__ import annotations

import os
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dlf.errors import DecodeError, InvalidParameterError, NonFiniteLogitsError
from edge_dlf.fusion.arrays import fuse_logits
from edge_dlf.fusion.fuser import Fuser
from edge_dlf.fusion.records import Draw, Pick
from edge_dlf.params import FusionParams, SamplingParams

from . import naive

NO_TOKENS = np.empty(0, np.int32)
STATIC = FusionParams(method="static")
GREEDY = SamplingParams(temperature=0.0)
PLAIN = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


def alone(fuser, rows, draws):
    """The large model's own picks."""
    return fuser.pick([rows], ["large"], FusionParams(method="large"), [()] * len(draws), draws)


def pick(row, sampling, seed=0, position=0, recent=NO_TOKENS, n_top=0):
    """The choice from one row."""
    row = np.asarray(row, np.float32)
    draw = Draw(sampling, seed, position, recent, n_top)
    return alone(Fuser(row.size), row[None], [draw])[0]


sampling_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.1, 0.8, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01, 0.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.3, 1.0]),
    repeat_penalty=st.sampled_from([1.0, 1.3, 0.7]),
    frequency_penalty=st.sampled_from([0.0, 0.4, -0.2]),
    presence_penalty=st.sampled_from([0.0, 0.7]),
    logit_bias=st.sampled_from([None, {0: 3.0, 5: -float("inf")}, {i: -float("inf") for i in range(9)}]),
)


@given(sampling_params, st.integers(0, 2**32), st.sampled_from([10, 37, 300]), st.booleans())
@settings(max_examples=20 if "NUMBA_DISABLE_JIT" in os.environ else 300, deadline=None)
def test_select_equals_naive_small(sampling, seed, n_vocab, masked):
    rng = np.random.default_rng(seed)
    row = rng.normal(0, 2, n_vocab).astype(np.float32)
    if masked:
        row[rng.random(n_vocab) < 0.3] = -np.inf
        row[-1] = 0.5
    recent = rng.integers(0, n_vocab, 12).astype(np.int32)
    before = row.copy()
    picked = pick(row, sampling, seed, 17, recent)
    assert picked.token == naive.select(row, sampling, seed, 17, recent)
    assert picked.logprob == pytest.approx(np.log(naive.softmax(row.astype(np.float64))[picked.token]), abs=2e-6)
    assert row.tobytes() == before.tobytes()


@given(sampling_params, st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_select_equals_naive_over_many_groups(sampling, seed):
    rng = np.random.default_rng(seed)
    row = rng.normal(0, rng.choice([0.3, 3.0]), 6000).astype(np.float32)
    recent = rng.integers(0, 6000, 64).astype(np.int32)
    assert pick(row, sampling, seed, 3, recent).token == naive.select(row, sampling, seed, 3, recent)


@pytest.mark.parametrize(
    "layout", ["one group holds the best", "ascending", "few values", "mostly masked", "far apart"]
)
def test_select_equals_naive_where_the_best_lie_oddly(layout):
    rng = np.random.default_rng(11)
    for seed in range(4):
        row = rng.normal(0, 1, 7000)
        if layout == "one group holds the best":
            row[1024:2048] += 20.0
        elif layout == "ascending":
            row.sort()
        elif layout == "few values":
            row = rng.integers(-2, 3, 7000) * 0.5 * rng.choice([-1.0, 1.0], 7000)  # −0.0 and 0.0 too
        elif layout == "mostly masked":
            row[rng.permutation(7000)[:6990]] = -np.inf
        elif layout == "far apart":
            row *= 1e4
        row = row.astype(np.float32)
        for top_k, top_p, min_p in [(6500, 1.0, 0.0), (0, 0.9, 0.0), (300, 0.97, 0.001), (0, 1.0, 0.0), (0, 0.6, 0.01)]:
            sampling = SamplingParams(temperature=1.5, top_k=top_k, top_p=top_p, min_p=min_p)
            assert pick(row, sampling, seed, 3).token == naive.select(row, sampling, seed, 3)


def test_ties_go_to_the_lowest_id_small():
    assert pick(np.zeros(500), GREEDY).token == 0
    row = np.zeros(500)
    row[[77, 300]] = 2.0
    row[:50] = -0.0
    assert pick(row, GREEDY).token == 77
    assert pick(row, SamplingParams(top_k=1), 5, 5).token == 77
    assert [token for token, _ in pick(row, GREEDY, n_top=4).top_logprobs] == [77, 300, 0, 1]
    assert pick(row[:70], GREEDY).token == 0


def test_penalties_are_those_of_llama_cpp_small():
    row = np.array([2.0, -1.0, 1.9, 0.0], np.float32)
    recent = np.array([0, 0, 1], np.int32)
    penalised = naive.penalised(
        row, SamplingParams(repeat_penalty=2.0, frequency_penalty=0.1, presence_penalty=0.25), recent
    )
    assert penalised == pytest.approx([2.0 / 2 - 0.2 - 0.25, -1.0 * 2 - 0.1 - 0.25, 1.9, 0.0])
    assert pick(row, SamplingParams(temperature=0.0, repeat_penalty=1.2), recent=recent).token == 2
    assert pick(row, SamplingParams(temperature=0.0, presence_penalty=0.2), recent=recent).token == 2
    assert pick(row, SamplingParams(temperature=0.0, logit_bias={3: 5.0, 99: 1.0})).token == 3
    assert pick(row, GREEDY, recent=recent).token == 0


def test_bias_adds_to_what_penalties_left_small():
    row = np.array([3.0, 2.0, 1.0], np.float32)
    recent = np.array([2, 0, 0, 99], np.int32)  # 99: of a prompt in a vocabulary with padding
    for bias in (1.9, 2.1):
        sampling = SamplingParams(temperature=0.0, frequency_penalty=1.5, logit_bias={1: -np.inf, 0: bias, 2: 2.5})
        expected = naive.select(row, sampling, 0, 0, recent[:3])
        assert expected == (0 if bias == 2.1 else 2)
        assert pick(row, sampling, recent=recent).token == expected


def test_banning_every_token_is_an_error_of_its_row_small():
    banned = SamplingParams(logit_bias={i: -float("inf") for i in range(20)})
    rows = np.zeros((3, 20), np.float32)
    draws = [Draw(sampling, 0, 0, NO_TOKENS) for sampling in (GREEDY, banned, GREEDY)]
    first, banned_all, last = alone(Fuser(20), rows, draws)
    assert banned_all.token == -1
    assert isinstance(banned_all.error, InvalidParameterError)
    assert str(banned_all.error) == "logit_bias bans every token"
    assert first == last == Pick(0, pytest.approx(-np.log(20)), (), (), None)


def test_one_token_vocabulary_small():
    assert pick([3.0], SamplingParams(), 9, 9, n_top=5) == Pick(0, 0.0, ((0, 0.0),), (), None)


def test_top_logprobs_are_those_before_penalties_small():
    row = np.random.default_rng(1).normal(0, 2, 400).astype(np.float32)
    truth = np.log(naive.softmax(row.astype(np.float64)))
    best = np.argsort(-truth)[:20]
    for sampling in (GREEDY, SamplingParams(repeat_penalty=2.0)):
        found = pick(row, sampling, 1, 1, best.astype(np.int32), n_top=20).top_logprobs
        assert [token for token, _ in found] == best.tolist()
        assert [logprob for _, logprob in found] == pytest.approx(truth[best], abs=2e-6)
    assert pick(row, GREEDY).top_logprobs == ()
    assert len(pick(row, GREEDY, n_top=1000).top_logprobs) == 400
    row[7:] = -np.inf
    assert len(pick(row, GREEDY, n_top=20).top_logprobs) == 7


def batch(rng, n_rows, n_vocab, n_experts):
    """Rows (K, V + padding) of every member, alphas, and draws of every kind."""
    members = [rng.normal(0, 2, (n_rows, n_vocab + 5 * i)).astype(np.float32) for i in range(2 + n_experts)]
    alphas = rng.choice([0.0, 0.3, 1.7], (n_rows, n_experts)).tolist()
    samplings = [
        GREEDY, SamplingParams(), PLAIN, SamplingParams(top_k=0, min_p=0.0, top_p=0.7, temperature=1.3),
        SamplingParams(repeat_penalty=1.4, presence_penalty=0.5, logit_bias={3: 4.0, 8: -np.inf}),
        SamplingParams(temperature=0.0, frequency_penalty=0.6), SamplingParams(top_k=300, min_p=0.0),
    ]  # fmt: skip
    draws = [
        Draw(
            samplings[rng.integers(len(samplings))], int(rng.integers(2**63)), k,
            rng.integers(0, n_vocab, rng.integers(0, 40)).astype(np.int32), int(rng.choice([0, 0, 1, 12])),
        )
        for k in range(n_rows)
    ]  # fmt: skip
    return members, alphas, draws


@pytest.mark.parametrize("n_vocab", [60, 5000, 20_000])
@pytest.mark.parametrize("n_rows", [1, 2, 5, 33])
def test_a_batch_is_its_rows_whatever_the_threads(n_rows, n_vocab):
    rng = np.random.default_rng([n_rows, n_vocab])
    names = ("large", "base", "one", "two")
    members, alphas, draws = batch(rng, n_rows, n_vocab, 2)
    large, base, *experts = members
    single = Fuser(n_vocab)
    expected = [
        single.pick([x[[k]] for x in members], names, STATIC, [alphas[k]], [draws[k]])[0] for k in range(n_rows)
    ]
    for k, picked in enumerate(expected):
        fused = large[k, :n_vocab].copy()
        for alpha, expert in zip(alphas[k], experts, strict=True):
            fused += np.float32(alpha) * (expert[k, :n_vocab] - base[k, :n_vocab])
        draw = draws[k]
        assert picked.token == naive.select(fused, draw.sampling, draw.seed, draw.position, draw.recent)
        truth = np.log(naive.softmax(fused.astype(np.float64)))
        assert picked.logprob == pytest.approx(truth[picked.token], abs=2e-6)
        assert [token for token, _ in picked.top_logprobs] == np.argsort(-fused, kind="stable")[: draw.n_top].tolist()
    scattered = [large, [row.copy() for row in base], [experts[0][k : k + 1] for k in range(n_rows)], experts[1]]
    for n_threads in (1, 2, 5):
        fuser = Fuser(n_vocab, n_threads)
        for rows in (members, members, scattered):
            assert fuser.pick(rows, names, STATIC, alphas, draws) == expected


WEIGHTED = FusionParams(method="weighted", weights={"large": 1.0})
MEMBERS = ("large", "base", "one", "two")


def weighted(rows, weights, names=MEMBERS, draw=None):
    """The pick from one weighted row, with the logprobs of all tokens."""
    rows = [np.asarray(row, np.float32) for row in rows]
    draw = draw or Draw(GREEDY, 0, 0, NO_TOKENS, n_top=rows[0].size)
    return Fuser(rows[0].size).pick([row[None] for row in rows], names, WEIGHTED, [weights], [draw])[0]


def probs(picked, n_vocab):
    """The fused distribution (V,) of a pick that lists all tokens; 0 where a token is impossible."""
    out = np.zeros(n_vocab)
    for token, logprob in picked.top_logprobs:
        out[token] = np.exp(logprob)
    return out


@given(st.integers(0, 2**32), st.sampled_from([20, 1500]), st.sampled_from([0.0, 0.2]), st.integers(1, 4))
@settings(max_examples=20 if "NUMBA_DISABLE_JIT" in os.environ else 150, deadline=None)
def test_a_weighted_row_equals_naive_small(seed, n_vocab, masked, n_members):
    rng = np.random.default_rng(seed)
    rows = rng.normal(rng.choice([-30.0, 0.0, 30.0]), 2, (n_members, n_vocab)).astype(np.float32)
    rows[rng.random(rows.shape) < masked] = -np.inf
    rows[:, -1] = 0.5
    weights = rng.choice([0.0, 1.0, 0.5, -0.4, -1.5, 1.1], n_members)
    picked = weighted(rows, weights, MEMBERS[:n_members])
    assert probs(picked, n_vocab) == pytest.approx(naive.weighted_probs(rows, weights), abs=3e-5)
    assert picked.weights == tuple(weights)


@given(st.integers(0, 2**32), sampling_params)
@settings(max_examples=20 if "NUMBA_DISABLE_JIT" in os.environ else 60, deadline=None)
def test_weights_hold_every_other_method_small(seed, sampling):
    rng = np.random.default_rng(seed)
    rows = rng.normal(0, 2, (4, 300)).astype(np.float32)
    draw = Draw(sampling, seed, 3, NO_TOKENS, n_top=9)
    a, b = 0.7, -0.25
    static = Fuser(300).pick([row[None] for row in rows], MEMBERS, STATIC, [[a, b]], [draw])[0]
    if static.error:
        return
    picked = weighted(rows, [1.0, -(a + b), a, b], draw=draw)
    assert picked.logprob == pytest.approx(static.logprob, abs=2e-5) or picked.token != static.token
    assert [logprob for _, logprob in picked.top_logprobs] == pytest.approx(
        [logprob for _, logprob in static.top_logprobs], abs=2e-5
    )
    for m in range(4):
        only = weighted(rows, np.eye(4)[m], draw=draw)
        assert only[:3] == alone(Fuser(300), rows[[m]], [draw])[0][:3]


def test_the_sign_of_a_weight_decides_what_negative_infinity_means_small():
    even, masked = [0.0, 0.0, 0.0], [-np.inf, 0.0, 0.0]
    names = ("large", "one")
    assert probs(weighted([even, masked], [1.0, 0.5], names), 3) == pytest.approx([0.0, 0.5, 0.5])
    # log p of the masked member is 0 for token 0, and log ½ for the others: 1, 2 and 2 parts of 5
    assert probs(weighted([even, masked], [1.0, -1.0], names), 3) == pytest.approx([0.2, 0.4, 0.4])
    assert probs(weighted([even, masked], [1.0, 0.0], names), 3) == pytest.approx([1 / 3] * 3)
    assert probs(weighted([masked, masked], [1.0, -1.0], names), 3) == pytest.approx([0.0, 0.5, 0.5])


def test_members_that_exclude_every_token_are_an_error_small():
    picked = weighted([[0.0, -np.inf], [-np.inf, 0.0]], [0.5, 0.5], ("large", "one"))
    assert picked.token == -1
    assert isinstance(picked.error, DecodeError)
    assert str(picked.error) == "no token is possible for every member with a positive weight"


@pytest.mark.parametrize("weights", [(0.5, 0.5), (1.0, -0.5)])
@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (np.inf, "\\+inf"), (None, "no finite value")])
def test_a_bad_weighted_row_names_the_member_small(weights, value, what):
    rows = np.zeros((2, 50), np.float32)
    rows[1, 31 if value else slice(None)] = value or -np.inf
    picked = weighted(rows, weights, ("large", "one"))
    assert isinstance(picked.error, NonFiniteLogitsError)
    assert picked.error.member == "one"
    assert re.search(what, str(picked.error))
    assert weighted(rows, (0.5, 0.0), ("large", "one")).error is None


def test_equal_models_with_weights_that_sum_to_one_are_that_model_small():
    row = np.random.default_rng(0).normal(0, 3, 2000).astype(np.float32)
    truth = naive.softmax(row.astype(np.float64))
    for weights in ((0.54, -0.37, 0.83), (0.5, 0.0, 0.5), (1.0, -1.0, 1.0)):
        assert probs(weighted([row] * 3, weights, MEMBERS[:3]), 2000) == pytest.approx(truth, abs=1e-5)


def test_plausibility_asks_the_experts_of_a_weighted_row_small():
    large, one = [5.0, 1.0, 0.0], [-9.0, 0.0, 0.0]
    draw = Draw(GREEDY, 0, 0, NO_TOKENS, plausibility=0.5)
    assert weighted([large, one], [1.0, 0.1], ("large", "one"), draw).token == 1
    assert weighted([large, one], [1.0, 0.1], ("large", "base"), draw).token == 0


@pytest.mark.parametrize("n_threads", [1, 2, 5])
@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (np.inf, "\\+inf"), (None, "no finite value")])
def test_a_bad_row_leaves_the_others_alone(n_threads, value, what):
    rng = np.random.default_rng(5)
    names, n_vocab = ("large", "base", "one", "two"), 5000
    members, _, draws = batch(rng, 6, n_vocab, 2)
    alphas = [[1.0, 0.5]] * 5 + [[0.0, 0.5]]
    fuser = Fuser(n_vocab, n_threads)
    dynamic, static = (fuser.pick(members, names, params, alphas, draws) for params in (FusionParams(), STATIC))
    for k, rows in enumerate(members):
        rows[k, 4999 if value else slice(None)] = value or -np.inf
    members[2][5] = np.nan  # takes no part in the static row, for its α is 0
    for params, before, faulty in (
        (FusionParams(), dynamic, {0: "large", 1: "base", 2: "one", 3: "two", 5: "one"}),
        (STATIC, static, {0: "large", 1: "base", 2: "one", 3: "two"}),
    ):
        after = fuser.pick(members, names, params, alphas, draws)
        for k in range(6):
            if k in faulty:
                assert after[k].token == -1
                assert isinstance(after[k].error, NonFiniteLogitsError)
                assert after[k].error.member == faulty[k]
                assert k == 5 or re.search(what, str(after[k].error))
            else:
                assert after[k] == before[k]


def test_no_rows_are_no_results():
    rows = np.empty((0, 20), np.float32)
    for params in (FusionParams(), STATIC):
        assert Fuser(20, 2).pick([rows] * 3, ("large", "base", "expert"), params, [], []) == []


def test_rows_of_another_kind_are_refused():
    row = np.zeros((1, 20), np.float32)
    draw = Draw(GREEDY, 0, 0, NO_TOKENS)
    wide, two = np.zeros((1, 40), np.float32), np.zeros((2, 20), np.float32)
    for wrong in (row[:, :19], row.astype(np.float64), wide[:, ::2], two, row[0], [], [two], [row[0], row[0]]):
        with pytest.raises(ValueError, match="rows must be"):
            Fuser(20).pick([row, wrong, row], ("large", "base", "expert"), STATIC, [[1.0]], [draw])


@pytest.mark.parametrize("weights", [[[]], [[1.0, 2.0]], [[1.0], [1.0]]])
def test_weights_must_fit_the_members(weights):
    row = np.zeros((1, 20), np.float32)
    with pytest.raises(ValueError, match="weights must be K = 1 times 1 numbers"):
        Fuser(20).pick([row] * 3, ("large", "base", "expert"), STATIC, weights, [Draw(GREEDY, 0, 0, NO_TOKENS)])


def test_draw_depends_on_seed_position_and_token_alone():
    row = np.random.default_rng(2).normal(0, 1, 5000).astype(np.float32)
    tokens = [pick(row, PLAIN, 1, position).token for position in range(60)]
    draws = [Draw(PLAIN, 1, position, NO_TOKENS) for position in range(60)]
    together = alone(Fuser(5000, 2), np.repeat(row[None], 60, axis=0), draws)
    assert tokens == [picked.token for picked in together]
    assert tokens != [pick(row, PLAIN, 2, position).token for position in range(60)]
    assert len(set(tokens)) > 40


@pytest.mark.parametrize("keyed_by", ["seed", "position"])
def test_a_million_draws_follow_the_softmax(keyed_by):
    """Chi-square with 19 degrees of freedom, which exceeds 50 once in 7,000 times; the draws are fixed by the keys."""
    import numba

    from edge_dlf.fusion.kernels.pick import draw_token

    @numba.njit
    def draw(logits, ids, seed, position):
        return draw_token(logits, ids, 2.0, 0.8, seed, position)

    logits = np.random.default_rng(3).normal(0, 1, 120).astype(np.float32)
    ids = np.arange(100, 120)
    counts = np.zeros(20)
    fixed = np.uint64(12345)
    for i in np.arange(1_000_000, dtype=np.uint64):
        key = (i, fixed) if keyed_by == "seed" else (fixed, i)
        counts[draw(logits, ids, *key) - 100] += 1
    expected = 1e6 * naive.softmax(logits[100:].astype(np.float64) / 0.8)
    assert ((counts - expected) ** 2 / expected).sum() < 50


@given(st.integers(0, 2**32), st.sampled_from([0.001, 0.1, 0.5, 1.0]), st.booleans(), sampling_params)
@settings(max_examples=20 if "NUMBA_DISABLE_JIT" in os.environ else 150, deadline=None)
def test_a_restricted_choice_equals_naive(seed, plausibility, masked, sampling):
    rng = np.random.default_rng(seed)
    n_vocab = int(rng.choice([20, 1500]))
    large, base, *experts = rng.normal(0, 2, (4, n_vocab)).astype(np.float32)
    if masked:
        large[rng.random(n_vocab) < 0.5] = -np.inf
        experts[0][rng.random(n_vocab) < 0.3] = -np.inf
        large[-1] = experts[0][-1] = 0.5
    alphas = [float(alpha) for alpha in rng.choice([0.0, 0.7, -0.4], 2)]
    draw = Draw(sampling, seed, 3, NO_TOKENS, n_top=3, plausibility=plausibility)
    fuser = Fuser(n_vocab)
    members, names = [row[None] for row in (large, base, *experts)], ("large", "base", "a", "b")
    (picked,) = fuser.pick(members, names, STATIC, [alphas], [draw])
    (plain,) = fuser.pick(members, names, STATIC, [alphas], [Draw(sampling, seed, 3, NO_TOKENS, n_top=3)])
    fused = fuse_logits(large, base, experts, alphas).copy()
    restricted = naive.restricted(fused, experts, alphas, plausibility)
    if not np.isfinite(naive.penalised(restricted, sampling, ())).any():
        assert isinstance(picked.error, InvalidParameterError)
        return
    assert picked.token == naive.select(restricted, sampling, seed, 3)
    assert picked.logprob == pytest.approx(np.log(naive.softmax(fused.astype(np.float64))[picked.token]), abs=2e-6)
    assert picked.top_logprobs == plain.top_logprobs


def test_where_nothing_plausible_is_left_the_fusion_chooses_small():
    large = np.array([-np.inf, 1.0, 0.0], np.float32)
    expert = np.array([9.0, 0.0, 0.0], np.float32)
    draw = Draw(GREEDY, 0, 0, NO_TOKENS, plausibility=0.5)
    members = [large[None], np.zeros((1, 3), np.float32), expert[None]]
    assert Fuser(3).pick(members, ("large", "base", "e"), STATIC, [[1.0]], [draw])[0].token == 1


def test_plausibility_must_be_a_share_small():
    for wrong in (-0.1, 1.5, float("nan")):
        with pytest.raises(InvalidParameterError, match="plausibility"):
            FusionParams(plausibility=wrong)
