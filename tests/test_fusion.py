"""The search and the fused row against `naive`; `test_jit_off` runs the *small* tests without the compiler."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from edge_dlf.errors import InvalidParameterError, NonFiniteLogitsError
from edge_dlf.fusion.arrays import fuse_logits, search_alpha
from edge_dlf.fusion.fuser import Fuser
from edge_dlf.fusion.records import Draw
from edge_dlf.params import FusionParams, SamplingParams

from . import naive

GRID = naive.GRID
JIT_OFF = "NUMBA_DISABLE_JIT" in os.environ
KINDS = (
    "plain", "peaked", "shifted base", "buried token", "huge difference", "huge shift", "−inf in large", "−inf in base",
    "−inf in experts", "−inf everywhere", "long tail", "near ties", "equal models", "one expert equal",
)  # fmt: skip


def make_rows(rng, kind, n_vocab, n_experts):
    """Rows (V,), (V,), (T, V) of one adversarial kind."""
    scale, strength = rng.choice([0.1, 1.0, 3.0, 8.0]), rng.choice([1e-4, 1e-2, 0.3, 1.0, 3.0, 10.0])
    large, base = rng.normal(0, scale, n_vocab), rng.normal(0, scale, n_vocab)
    experts = base + rng.normal(0, strength, (n_experts, n_vocab))
    some = rng.integers(n_vocab, size=max(1, n_vocab // 50))
    if kind == "peaked":
        large[some[0]] += rng.choice([5.0, 20.0, 100.0])
    elif kind == "shifted base":
        base += rng.choice([1e4, -1e4, 50.0])
    elif kind == "buried token":
        large[some] -= 100.0
        experts[:, some] = base[some] + 60.0
    elif kind == "huge difference":
        experts[:, some[0]] += rng.choice([1e4, -1e4, 1e30, -1e30])
    elif kind == "huge shift":
        large += rng.choice([1e30, -1e4])
    elif kind == "−inf in large":
        large[rng.random(n_vocab) < 0.3] = -np.inf
    elif kind == "−inf in base":
        base[rng.random(n_vocab) < 0.3] = -np.inf
    elif kind == "−inf in experts":
        experts[rng.random(experts.shape) < 0.3] = -np.inf
    elif kind == "−inf everywhere":
        for array in (large, base, experts):
            array[rng.random(array.shape) < 0.3] = -np.inf
    elif kind == "long tail":
        large = rng.permutation(np.linspace(0.0, -300.0, n_vocab))
    elif kind == "near ties":
        experts[:] = experts[0] + rng.normal(0, 1e-6, experts.shape)
    elif kind == "equal models":
        experts[:] = base
    elif kind == "one expert equal":
        experts[-1] = base
    for row in (large, base, *experts):
        if not np.isfinite(row).any():
            row[0] = 0.0
    return tuple(np.ascontiguousarray(x, np.float32) for x in (large, base, experts))


def search(fuser, members, params=None):
    """The choices that one call makes for rows (K, width) of large, base and each expert."""
    names = ("large", "base", *(f"expert {t}" for t in range(len(members) - 2)))
    draws = [Draw(SamplingParams(temperature=0.0), 0, 0, np.empty(0, np.int32))] * len(members[0])
    return [pick.choice for pick in fuser.pick(members, names, params or FusionParams(), [()] * len(draws), draws)]


def check_choice(large, base, experts):
    """Hold grid and exact search against the naive float64 loop."""
    j, forward, reverse, targets = naive.objectives(large, base, experts, GRID)
    choice = search_alpha(large, base, experts)
    at = choice.expert, int(np.argmin(abs(GRID - choice.alpha)))
    assert j[at] <= j.min() * (1 + 1e-4) + 1e-9
    rounding = 1e-13 * max(forward[at], reverse[at], targets.max()) * np.sqrt(j[at])  # of float64, where KLs are huge
    assert abs(choice.objective - j[at]) <= 1e-4 * j[at] + 1e-9 + rounding
    assert choice.kl_forward == pytest.approx(forward[at], rel=1e-4, abs=1e-6)
    assert choice.kl_reverse == pytest.approx(reverse[at], rel=1e-4, abs=1e-6)
    assert choice.target_forward == pytest.approx(targets[:, 0].mean(), rel=1e-4, abs=1e-6)
    assert choice.target_reverse == pytest.approx(targets[:, 1].mean(), rel=1e-4, abs=1e-6)
    exact = search_alpha(large, base, experts, FusionParams(search="exact"))
    assert exact.objective <= choice.objective
    assert 0.0 <= exact.alpha <= 2.0
    _, x, y, _ = naive.objectives(large, base, experts[exact.expert][None], [exact.alpha])
    truth = float(((x[0, 0] - targets[:, 0]) ** 2 + (y[0, 0] - targets[:, 1]) ** 2).sum())
    assert truth <= j.min() * (1 + 1e-4) + 1e-9
    return choice


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_vocab", [1, 3] if JIT_OFF else [1, 2, 3, 17, 100])
def test_search_equals_naive_small(kind, n_vocab):
    rng = np.random.default_rng([n_vocab, KINDS.index(kind)])
    for n_experts in (1,) if JIT_OFF else (1, 2, 8):
        check_choice(*make_rows(rng, kind, n_vocab, n_experts))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n_vocab", [512, 1023, 1025, 4097, 20_000])
def test_search_equals_naive(kind, n_vocab):
    rng = np.random.default_rng([n_vocab, KINDS.index(kind)])
    for n_experts in (1, 3):
        check_choice(*make_rows(rng, kind, n_vocab, n_experts))


@pytest.mark.parametrize("kind", KINDS)
def test_search_equals_naive_at_full_size(kind):
    check_choice(*make_rows(np.random.default_rng(KINDS.index(kind)), kind, 151_936, 1))


@pytest.mark.exhaustive
@pytest.mark.parametrize("seed", range(300))
def test_search_equals_naive_exhaustively(seed):
    rng = np.random.default_rng([seed, 77])
    for kind in KINDS:
        n_vocab = int(2 ** rng.uniform(0, 18 if rng.random() < 0.05 else 13))
        check_choice(*make_rows(rng, kind, n_vocab, int(rng.integers(1, 9))))


@pytest.mark.parametrize(("alpha_max", "alpha_step"), [(2.0, 2.0), (3.0, 0.05), (1.0, 0.3), (100.0, 1.0), (2.0, 0.002)])
def test_any_grid(alpha_max, alpha_step):
    rng = np.random.default_rng(5)
    params = FusionParams(alpha_max=alpha_max, alpha_step=alpha_step)
    grid = np.arange(int(alpha_max / alpha_step + 1e-9) + 1) * alpha_step
    for kind in ("plain", "peaked", "buried token", "long tail"):
        large, base, experts = make_rows(rng, kind, 1500, 2)
        j, _, _, _ = naive.objectives(large, base, experts, grid)
        choice = search_alpha(large, base, experts, params)
        assert j[choice.expert, np.argmin(abs(grid - choice.alpha))] <= j.min() * (1 + 1e-4) + 1e-9


@pytest.mark.parametrize("kind", KINDS)
def test_fused_row_is_the_distribution_small(kind):
    rng = np.random.default_rng(KINDS.index(kind))
    large, base, experts = make_rows(rng, kind, 60, 3)
    alphas = rng.uniform(0, 2, 3)
    fused = fuse_logits(large, base, experts, alphas)
    assert not np.isnan(fused).any()
    assert (np.isneginf(fused) == np.isneginf(large)).all()
    rounding = 1e-6 * max(float(abs(x[np.isfinite(x)]).max()) for x in (large, base, experts))
    assert naive.softmax(fused.astype(np.float64)) == pytest.approx(
        naive.fused_probs(large, base, experts, alphas), abs=min(1.0, 4 * rounding)
    )


def test_expert_equal_to_base_leaves_the_large_row_small():
    rng = np.random.default_rng(0)
    large, base, _ = make_rows(rng, "plain", 80, 1)
    for expert in (base, base[None].repeat(3, axis=0)):
        choice = search_alpha(large, base, expert)
        assert (choice.expert, choice.alpha, choice.objective) == (0, 0.0, 0.0)
    assert fuse_logits(large, base, base, 1.5).tobytes() == large.tobytes()
    assert fuse_logits(large, base, base + 1, 0.0).tobytes() == large.tobytes()
    assert search_alpha(large, base, base, FusionParams(search="exact")).alpha == 0.0


def test_shifted_copy_of_the_base_is_the_base():
    rng = np.random.default_rng(0)
    large, base, _ = make_rows(rng, "plain", 5000, 1)
    assert search_alpha(large, base, base + np.float32(3.3)).alpha == 0.0


def test_a_score_beyond_float32_is_an_error_and_no_warning() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(NonFiniteLogitsError, match="base"):
            search_alpha([1.0, 2.0], [1e300, 2.0], [[1.0, 2.0]])


rows = hnp.arrays(np.float32, (3, 12), elements=st.floats(-20, 20, width=32))
masked_rows = hnp.arrays(
    np.float32, (4, 12), elements=st.one_of(st.floats(-20, 20, width=32), st.just(np.float32("-inf")))
)


def objective_at(large, base, experts, choice):
    j, _, _, _ = naive.objectives(large, base, experts, [choice.alpha])
    return j[choice.expert, 0]


@given(rows, st.integers(0, 2), st.floats(-50, 50))
@settings(max_examples=2 if JIT_OFF else 60, deadline=None)
def test_constant_shift_changes_nothing_small(x, member, constant):
    before = search_alpha(x[0], x[1], x[2])
    shifted = x.copy()
    shifted[member] += np.float32(constant)
    after = search_alpha(*shifted)
    slack = 1e-4 * before.objective + 1e-4 * (1 + abs(before.objective))  # the shift itself rounds logits by 4e-6
    assert objective_at(x[0], x[1], x[2:], after) == pytest.approx(before.objective, abs=slack)


@given(rows, st.permutations(range(12)))
@settings(max_examples=2 if JIT_OFF else 60, deadline=None)
def test_permutation_commutes_small(x, order):
    before, after = search_alpha(*x), search_alpha(*x[:, order])
    assert after.objective == pytest.approx(before.objective, rel=2e-4, abs=2e-9)
    assert fuse_logits(*x[:, order], 0.7).tolist() == fuse_logits(*x, 0.7)[order].tolist()


@given(masked_rows)
@settings(max_examples=2 if JIT_OFF else 100, deadline=None)
def test_negative_infinity_gives_no_nan_small(x):
    x[:, 0] = np.where(np.isfinite(x).any(axis=1), x[:, 0], 0.0)
    choice = check_choice(x[0], x[1], x[2:])
    assert not np.isnan(fuse_logits(x[0], x[1], x[2:], [choice.alpha, 0.3])).any()


def test_rows_are_read_in_place_and_their_padding_ignored():
    rng = np.random.default_rng(3)
    n_vocab = 9000
    arrays = [rng.normal(0, 2, (4, n_vocab + pad)).astype(np.float32) for pad in (0, 128, 7, 64)]
    for array in arrays[1:]:
        array[:, n_vocab:] = np.nan
    for k, choice in enumerate(search(Fuser(n_vocab), arrays)):
        single = search_alpha(*(array[k, :n_vocab] for array in arrays[:2]), [a[k, :n_vocab] for a in arrays[2:]])
        assert choice == single


@pytest.mark.parametrize("search_kind", ["grid", "exact"])
def test_threads_change_no_bit(search_kind):
    rng = np.random.default_rng(4)
    members = [rng.normal(0, 3, (5, 30_000)).astype(np.float32) for _ in range(4)]
    params = FusionParams(search=search_kind)
    fusers = [Fuser(30_000, n_threads) for n_threads in (1, 2, 4)]
    for _ in range(20):
        choices = [search(fuser, members, params) for fuser in fusers]
        assert choices[0] == choices[1] == choices[2]


def test_fusers_work_side_by_side():
    rng = np.random.default_rng(6)
    large, base, expert = (rng.normal(0, 3, 40_000).astype(np.float32) for _ in range(3))
    expected, found = search_alpha(large, base, expert), []

    def work():
        fuser = Fuser(40_000, 2)
        for _ in range(30):
            found.extend(search(fuser, [large[None], base[None], expert[None]]))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 120


def test_helper_threads_end_with_their_fuser():
    before = set(threading.enumerate())
    fuser = Fuser(100, 3)
    helpers = set(threading.enumerate()) - before
    assert len(helpers) == 2
    del fuser
    for helper in helpers:
        helper.join(timeout=10)
        assert not helper.is_alive()


@pytest.mark.parametrize(("value", "what"), [(np.nan, "NaN"), (np.inf, "inf")])
@pytest.mark.parametrize(("member", "name"), [(0, "large"), (1, "base"), (2, "expert 0"), (3, "expert 1")])
def test_non_finite_logits_name_the_member_small(value, what, member, name):
    x = np.zeros((4, 50), np.float32)
    x[member, 31] = value
    for call in (lambda: search_alpha(x[0], x[1], x[2:]), lambda: fuse_logits(x[0], x[1], x[2:], [1.0, 1.0])):
        with pytest.raises(NonFiniteLogitsError, match=f"^{name} returned .*{what}") as caught:
            call()
        assert caught.value.member == name
    x[member] = -np.inf
    with pytest.raises(NonFiniteLogitsError, match=f"^{name} returned no finite"):
        search_alpha(x[0], x[1], x[2:])


def test_accepts_lists_other_dtypes_and_read_only_rows():
    rng = np.random.default_rng(8)
    large, base, expert = (rng.normal(0, 2, 64).astype(np.float32) for _ in range(3))
    expected = search_alpha(large, base, expert)
    frozen = expert.copy()
    frozen.setflags(write=False)
    assert search_alpha(large.tolist(), base.astype(np.float64), [expert.tolist()]) == expected
    assert search_alpha(large, base, frozen) == expected
    assert search_alpha(large, np.repeat(base, 2)[::2], expert[None], FusionParams()) == expected


@pytest.mark.parametrize(
    ("large", "base", "expert", "message"),
    [
        (np.zeros((2, 3)), np.zeros(3), np.zeros(3), r"large_logits must have shape \(V,\), not \(2, 3\)"),
        (np.zeros(0), np.zeros(0), np.zeros(0), "large_logits must have shape"),
        (np.zeros(3), np.zeros(4), np.zeros(3), r"base_logits must have shape \(3,\), not \(4,\)"),
        (np.zeros(3), np.zeros(3), np.zeros((2, 4)), r"expert_logits must have shape \(3,\) or \(T, 3\), not \(2, 4\)"),
        (np.zeros(3), np.zeros(3), np.zeros((0, 3)), "expert_logits must have shape"),
        (["a"], np.zeros(1), np.zeros(1), "logits must be numbers"),
        ([1.0], np.zeros(1), [[1.0], [1.0, 2.0]], "logits must be numbers"),
    ],
)
def test_wrong_shapes_are_told(large, base, expert, message):
    with pytest.raises(InvalidParameterError, match=message):
        search_alpha(large, base, expert)


@pytest.mark.parametrize("alpha", [[1.0], [1.0, 2.0, 3.0], [1.0, np.nan], 1.0])
def test_alpha_must_fit_the_experts(alpha):
    with pytest.raises(InvalidParameterError, match="alpha must be 2 finite numbers"):
        fuse_logits(np.zeros(3), np.zeros(3), np.zeros((2, 3)), alpha)


@pytest.mark.skipif(JIT_OFF, reason="runs itself")
def test_jit_off():
    here = Path(__file__).parent
    files = [str(here / name) for name in ("test_fusion.py", "test_select.py", "test_fit.py")]
    options = ["-q", "-k", "small", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *files],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        cwd=here.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:]
