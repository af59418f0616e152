"""Loss, gradient and Hessian of the weighted fusion against `naive`, rows reduced to few tokens, and the fit."""

from __future__ import annotations

import os

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_dlf.errors import DecodeError, NonFiniteLogitsError
from edge_dlf.fusion import fit

from . import naive

JIT_OFF = "NUMBA_DISABLE_JIT" in os.environ
NAMES = ("large", "base", "one", "two")
TRUTH = np.array([0.5, -0.3, 0.8])


def check_losses(rows, weights, golds, n_vocab):
    """Hold the kernel against the oracle; rows (M, R, width)."""
    found = fit.losses(fit.whole(list(rows), NAMES[: len(rows)], golds, n_vocab), weights)
    for k, gold in enumerate(golds):
        loss, gradient, hessian = naive.weighted_loss(rows[:, k, :n_vocab], weights, gold)
        assert found.values[k] == pytest.approx(loss, rel=1e-5, abs=2e-5)
        assert found.gradients[k] == pytest.approx(gradient, rel=1e-5, abs=3e-5)
        assert found.hessians[k] == pytest.approx(hessian, rel=1e-4, abs=1e-4 * max(1.0, abs(hessian).max()))


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 20, 1024, 2500]), st.sampled_from([0.0, 0.2]), st.integers(1, 4))
@settings(max_examples=5 if JIT_OFF else 150, deadline=None)
def test_losses_equal_naive_small(seed, n_vocab, masked, n_members):
    rng = np.random.default_rng(seed)
    n_vocab = min(n_vocab, 50) if JIT_OFF else n_vocab
    rows = rng.normal(rng.choice([-30.0, 0.0, 30.0]), rng.choice([0.3, 3.0]), (n_members, 3, n_vocab + 5))
    if rng.random() < 0.3:
        rows[:, :, rng.integers(n_vocab)] += 20.0
    rows[rng.random(rows.shape) < masked] = -np.inf
    golds = rng.integers(n_vocab, size=3)
    rows[:, np.arange(3), golds] = 1.0
    rows[:, :, n_vocab:] = np.nan
    weights = rng.choice([0.0, 1.0, 0.5, -0.4, 1.1], n_members)
    check_losses(rows.astype(np.float32), weights, golds, n_vocab)


def test_losses_equal_naive_at_full_size():
    rows = make_rows(np.random.default_rng(0), 2, 151_936)
    golds = [int(rows[0, 0].argmax()), 77]
    for weights in ([1.0, 0.0, 0.0], TRUTH, [1.0, -1.0, 1.0]):
        check_losses(rows, np.array(weights), golds, 151_936)


def test_a_sure_fusion_has_an_exact_hessian():
    """Moments about the gold token, which is unlikely here, would cancel."""
    rng = np.random.default_rng(1)
    rows = rng.normal(0, 1, (2, 1, 3000)).astype(np.float32)
    rows[:, 0, 2000] += 25.0
    found = fit.losses(fit.whole(list(rows), NAMES[:2], [5], 3000), [0.6, 0.4])
    _, _, hessian = naive.weighted_loss(rows[:, 0], np.array([0.6, 0.4]), 5)
    assert found.hessians[0] == pytest.approx(hessian, rel=1e-3)


def make_rows(rng, n_rows, n_vocab, n_members=3):
    """Rows (M, R, V) of members that resemble each other, as peaked as those of language models."""
    common = rng.normal(0, 2, (n_rows, n_vocab)) + rng.exponential(2.5, (n_rows, n_vocab))
    return (0.8 * common + rng.normal(0, 1, (n_members, n_rows, n_vocab))).astype(np.float32)


def answers(seed, n_rows, n_vocab, weights=TRUTH):
    """Rows whose known tokens are drawn from the fusion with these weights."""
    rng = np.random.default_rng(seed)
    rows = make_rows(rng, n_rows, n_vocab, len(weights))
    scores = np.einsum("m,mkv->kv", weights, rows.astype(np.float64)) + rng.gumbel(size=(n_rows, n_vocab))
    return fit.whole(list(rows), NAMES[: len(weights)], scores.argmax(axis=1), n_vocab)


def test_a_fit_finds_the_weights_that_made_the_answers():
    rows = answers(0, 3000, 300)
    found = fit.fit_weights(rows, n_threads=2)
    assert (abs(found.weights - TRUTH) < 4 * found.standard_errors).all()
    assert (found.standard_errors < 0.06).all()
    gradient = fit.losses(rows, found.weights).gradients.mean(axis=0)
    assert gradient == pytest.approx(0.0, abs=1e-4)
    for other in (TRUTH, [1, 0, 0], [0, 0, 1], [1, -1, 1], [0.5, 0, 0.5]):
        assert found.loss <= fit.losses(rows, other).values.mean() + 1e-7


def test_members_and_rows_can_be_left_out():
    rows = answers(1, 400, 200)
    alone = fit.fit_weights(rows.take(members=[2]))
    assert alone.weights.shape == (1,)
    assert fit.fit_weights(rows).loss < fit.fit_weights(rows.take(members=[0, 2])).loss < alone.loss
    mask = np.arange(400) < 100
    some = rows.take(mask)
    assert len(some) == 100
    assert fit.fit_weights(some).weights.tolist() == fit.fit_weights(rows.take(np.flatnonzero(mask))).weights.tolist()


def test_the_prior_decides_where_rows_are_few():
    rows, prior = answers(2, 3, 100), np.array([1.0, -1.0, 1.0])
    far = fit.fit_weights(rows, prior, l2=1e6)
    assert far.weights == pytest.approx(prior, abs=1e-3)
    near, weak = fit.fit_weights(rows, prior, l2=10.0), fit.fit_weights(rows, prior, l2=0.1)
    assert abs(near.weights - prior).sum() < abs(weak.weights - prior).sum()
    assert weak.loss < near.loss < far.loss


def test_equal_members_share_their_weight():
    row = make_rows(np.random.default_rng(3), 50, 100, 1)[0]
    golds = row.argmax(axis=1)
    found = fit.fit_weights(fit.whole([row, row], NAMES[:2], golds, 100))
    assert found.weights[0] == pytest.approx(found.weights[1], rel=1e-6)
    assert np.isfinite(found.standard_errors).all()


def test_rows_of_one_group_count_as_one_for_the_standard_errors():
    rows = answers(4, 200, 100)
    groups = np.tile(np.arange(200), 4)
    fourfold = rows.take(groups)
    single, apart = fit.fit_weights(rows, l2=1e-6), fit.fit_weights(fourfold, l2=1e-6)
    together = fit.fit_weights(fourfold, l2=1e-6, groups=groups)
    assert together.standard_errors == pytest.approx(single.standard_errors, rel=1e-3)
    assert apart.standard_errors == pytest.approx(single.standard_errors / 2, rel=1e-3)


def test_threads_change_no_bit():
    rows = answers(5, 40, 5000)
    weights = fit.fit_weights(rows, n_threads=1), fit.fit_weights(rows, n_threads=3)
    assert weights[0].weights.tolist() == weights[1].weights.tolist()
    kept = [fit.losses(fit.keep(rows, 90, 0, n_threads=n), TRUTH, n).values for n in (1, 3)]
    assert kept[0].tolist() == kept[1].tolist()


@pytest.mark.parametrize("n_kept", [60, 61, 200])
def test_rows_that_are_kept_whole_lose_nothing_small(n_kept):
    rows = answers(6, 2, 60)
    kept = fit.keep(rows, n_kept, 0)
    for a, b in zip(fit.losses(rows, TRUTH), fit.losses(kept, TRUTH), strict=True):
        assert a == pytest.approx(b, abs=1e-5)


@pytest.mark.parametrize("weights", [TRUTH, [1.0, 0.0, 0.0], [1.0, -1.0, 1.0]])
def test_kept_rows_estimate_the_sums_without_bias(weights):
    """The mean over 400 samples of exp(loss), which is Σ exp(z), lies within four standard errors of the truth."""
    rows = answers(7, 1, 2000)
    truth = np.exp(fit.losses(rows, weights).values[0])
    many = rows.take([0] * 400)
    estimates = np.exp(fit.losses(fit.keep(many, 64, 0), weights).values)
    assert abs(estimates.mean() - truth) < 4 * estimates.std() / 20 + 1e-5 * truth
    assert estimates.std() < 0.3 * truth


def test_weights_fitted_to_kept_rows_are_those_of_whole_rows():
    rows = answers(8, 400, 3000)
    found = fit.fit_weights(rows)
    kept = fit.fit_weights(fit.keep(rows, 100, 0))
    assert kept.weights == pytest.approx(found.weights, abs=0.03)
    assert kept.loss == pytest.approx(found.loss, rel=0.01)


def test_kept_rows_leave_out_what_a_member_masks():
    rng = np.random.default_rng(9)
    rows = make_rows(rng, 4, 500)
    rows[rng.random(rows.shape) < 0.3] = -np.inf
    golds = np.isfinite(rows).all(axis=0).argmax(axis=1)
    whole = fit.whole(list(rows), NAMES[:3], golds, 500)
    truth = fit.losses(whole, TRUTH).values
    many = [fit.losses(fit.keep(whole, 200, seed), TRUTH).values for seed in range(30)]
    assert np.mean(many, axis=0) == pytest.approx(truth, abs=0.05)


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (np.inf, r"\+inf")])
@pytest.mark.parametrize("token", [3, 40])
def test_a_bad_row_names_its_member_small(value, what, token):
    rows = np.zeros((2, 3, 50), np.float32)
    rows[1, 2, token] = value
    whole = fit.whole(list(rows), NAMES[:2], [3, 3, 3], 50)
    for call in (lambda: fit.losses(whole, [0.5, 0.5]), lambda: fit.keep(whole, 20, 0)):
        with pytest.raises(NonFiniteLogitsError, match=f"^base returned {what}"):
            call()


def test_an_answer_that_a_member_excludes_is_an_error_small():
    rows = np.zeros((2, 1, 50), np.float32)
    rows[1, 0, 7] = -np.inf
    whole = fit.whole(list(rows), NAMES[:2], [7], 50)
    for call in (lambda: fit.losses(whole, [0.5, 0.5]), lambda: fit.fit_weights(fit.keep(whole, 20, 0))):
        with pytest.raises(DecodeError, match="^base gives a token of an answer no probability at all$"):
            call()


def test_what_does_not_fit_is_refused_small():
    rows = np.zeros((1, 50), np.float32)
    for golds in ([50], [-1], [[0]], [0, 0]):
        with pytest.raises(ValueError, match=r"golds must be|rows must be"):
            fit.whole([rows], ["large"], golds, 50)
    whole = fit.whole([rows], ["large"], [0], 50)
    for weights in ([1.0, 2.0], [np.nan]):
        with pytest.raises(ValueError, match="weights must be 1 finite numbers"):
            fit.losses(whole, weights)
    for wrong in ({"rows": whole.take([])}, {"rows": whole, "l2": 0.0}):
        with pytest.raises(ValueError, match="a fit needs rows"):
            fit.fit_weights(**wrong)
