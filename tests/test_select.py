"""Selection from a fused row against `naive`: penalties, filters, the draw, logprobs."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dlf.errors import InvalidParameterError
from edge_dlf.fusion import Fuser
from edge_dlf.params import SamplingParams

from . import naive

NOBODY = np.empty(0, np.int32)
GREEDY = SamplingParams(temperature=0.0)
PLAIN = SamplingParams(temperature=1.0, top_k=0, top_p=1.0, min_p=0.0)


def fuser_of(row, n_threads=1):
    row = np.asarray(row, np.float32)
    fuser = Fuser(len(row), n_threads)
    fuser.fuse(row, None, [], [], ("large",))
    return fuser


sampling_params = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.1, 0.8, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 2, 5, 40, 1000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01]),
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
    fuser = fuser_of(row)
    token, logprob = fuser.select(sampling, seed, 17, recent)
    assert token == naive.select(row, sampling, seed, 17, recent)
    assert logprob == pytest.approx(np.log(naive.softmax(row.astype(np.float64))[token]), abs=2e-6)
    assert fuser.fused.tobytes() == row.tobytes()


@given(sampling_params, st.integers(0, 2**32))
@settings(max_examples=40, deadline=None)
def test_select_equals_naive_over_many_groups(sampling, seed):
    rng = np.random.default_rng(seed)
    row = rng.normal(0, rng.choice([0.3, 3.0]), 6000).astype(np.float32)
    recent = rng.integers(0, 6000, 64).astype(np.int32)
    assert fuser_of(row).select(sampling, seed, 3, recent)[0] == naive.select(row, sampling, seed, 3, recent)


def test_ties_go_to_the_lowest_id_small():
    assert fuser_of(np.zeros(500)).select(GREEDY, 0, 0, NOBODY)[0] == 0
    row = np.zeros(500)
    row[[77, 300]] = 2.0
    assert fuser_of(row).select(GREEDY, 0, 0, NOBODY)[0] == 77
    assert fuser_of(row).select(SamplingParams(top_k=1), 5, 5, NOBODY)[0] == 77
    assert [token for token, _ in fuser_of(row).top_logprobs(4)] == [77, 300, 0, 1]


def test_penalties_are_those_of_llama_cpp_small():
    row = np.array([2.0, -1.0, 1.9, 0.0], np.float32)
    fuser = fuser_of(row)
    recent = np.array([0, 0, 1], np.int32)
    penalised = naive.penalised(
        row, SamplingParams(repeat_penalty=2.0, frequency_penalty=0.1, presence_penalty=0.25), recent
    )
    assert penalised == pytest.approx([2.0 / 2 - 0.2 - 0.25, -1.0 * 2 - 0.1 - 0.25, 1.9, 0.0])
    assert fuser.select(SamplingParams(temperature=0.0, repeat_penalty=1.2), 0, 0, recent)[0] == 2
    assert fuser.select(SamplingParams(temperature=0.0, presence_penalty=0.2), 0, 0, recent)[0] == 2
    assert fuser.select(SamplingParams(temperature=0.0, logit_bias={3: 5.0, 99: 1.0}), 0, 0, NOBODY)[0] == 3
    assert fuser.select(GREEDY, 0, 0, recent)[0] == 0


def test_banning_every_token_is_an_error_small():
    banned = SamplingParams(logit_bias={i: -float("inf") for i in range(20)})
    fuser = fuser_of(np.zeros(20))
    with pytest.raises(InvalidParameterError, match="bans every token"):
        fuser.select(banned, 0, 0, NOBODY)
    assert fuser.select(GREEDY, 0, 0, NOBODY) == (0, pytest.approx(-np.log(20)))


def test_one_token_vocabulary_small():
    fuser = fuser_of([3.0])
    assert fuser.select(SamplingParams(), 9, 9, NOBODY) == (0, 0.0)
    assert fuser.top_logprobs(5) == ((0, 0.0),)


def test_top_logprobs_are_those_before_penalties_small():
    row = np.random.default_rng(1).normal(0, 2, 400).astype(np.float32)
    fuser = fuser_of(row)
    truth = np.log(naive.softmax(row.astype(np.float64)))
    best = np.argsort(-truth)[:20]
    for _ in range(2):
        found = fuser.top_logprobs(20)
        assert [token for token, _ in found] == best.tolist()
        assert [logprob for _, logprob in found] == pytest.approx(truth[best], abs=2e-6)
        fuser.select(SamplingParams(repeat_penalty=2.0), 1, 1, best.astype(np.int32))
    assert fuser.top_logprobs(0) == ()
    assert len(fuser.top_logprobs(1000)) == 400


def test_draw_depends_on_seed_position_and_token_alone():
    row = np.random.default_rng(2).normal(0, 1, 5000).astype(np.float32)
    one, two = fuser_of(row), fuser_of(row, 2)
    tokens = [one.select(PLAIN, 1, position, NOBODY)[0] for position in range(60)]
    assert tokens == [two.select(PLAIN, 1, position, NOBODY)[0] for position in range(60)]
    assert tokens != [one.select(PLAIN, 2, position, NOBODY)[0] for position in range(60)]
    assert len(set(tokens)) > 40


@pytest.mark.parametrize("keyed_by", ["seed", "position"])
def test_a_million_draws_follow_the_softmax(keyed_by):
    """Chi-square with 19 degrees of freedom, which exceeds 50 once in 7,000 times; the draws are fixed by the keys."""
    from edge_dlf import kernels

    logits = np.random.default_rng(3).normal(0, 1, 20)
    logits -= logits.max()
    ids = np.arange(100, 120, dtype=np.int32)
    counts = np.zeros(20)
    fixed = np.uint64(12345)
    for i in np.arange(1_000_000, dtype=np.uint64):
        key = (i, fixed) if keyed_by == "seed" else (fixed, i)
        counts[kernels.draw(logits, ids, 0.8, *key)] += 1
    expected = 1e6 * naive.softmax(logits / 0.8)
    assert ((counts - expected) ** 2 / expected).sum() < 50
