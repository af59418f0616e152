"""Members in lock-step: what is evaluated, what is reused, and what survives an interrupt."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from edge_dlf import FusionParams, InvalidParameterError
from edge_dlf.engine.backend import Logits, Run
from edge_dlf.engine.ensemble import Ensemble, Roles

from .fake_backend import FakeBackend


def family(**settings: bool) -> tuple[Ensemble, dict[str, FakeBackend]]:
    members = {name: FakeBackend(seed, **settings) for seed, name in enumerate(("large", "base", "maths", "law"))}
    return Ensemble(members, n_vocab=50), members


def prompts(tokens: list[int], *names: str) -> dict[str, list[int]]:
    return dict.fromkeys(names or ("large", "base", "maths", "law"), tokens)


def prefill(ensemble: Ensemble, seq: int, prompts: dict[str, list[int]]) -> int:
    """Make `seq` hold these prompts; returns how many tokens of the longest had to be evaluated."""
    n_evaluated = 0
    for name, tokens in prompts.items():
        rest = tokens[ensemble.begin(name, seq, tokens) :]
        ensemble.decode({name: [Run(seq, rest, 1)]})
        n_evaluated = max(n_evaluated, len(rest))
    return n_evaluated


def decode(ensemble: Ensemble, roles: Roles, tokens: list[tuple[int, list[int]]]) -> dict[str, Logits]:
    return ensemble.decode({name: [Run(seq, ids, len(ids)) for seq, ids in tokens] for name in roles.members})


@pytest.mark.parametrize(
    ("method", "members"),
    [
        ("dynamic", ("large", "base", "maths", "law")),
        ("static", ("large", "base", "maths", "law")),
        ("large", ("large",)),
        ("base", ("base",)),
        ("law", ("law",)),
    ],
)
def test_a_method_decodes_only_the_members_it_needs(method: str, members: tuple[str, ...]) -> None:
    ensemble, _ = family()
    assert ensemble.roles(FusionParams(method=method)).members == members


def test_an_unknown_method_is_named_with_the_known_ones() -> None:
    ensemble, _ = family()
    with pytest.raises(
        InvalidParameterError,
        match="method must be one of dynamic, static, blend, weighted, large, base, maths, law, not 'poetry'",
    ):
        ensemble.roles(FusionParams(method="poetry"))


def test_static_alphas_by_name() -> None:
    ensemble, _ = family()
    assert ensemble.roles(FusionParams(method="static", alpha={"law": 0.5})).weights == (0.0, 0.5)
    assert ensemble.roles(FusionParams(method="static", alpha=0.7)).weights == (0.7, 0.7)
    with pytest.raises(InvalidParameterError, match="poetry"):
        ensemble.roles(FusionParams(method="static", alpha={"poetry": 1.0}))


def test_weights_name_the_members_that_take_part() -> None:
    ensemble, _ = family()
    roles = ensemble.roles(FusionParams(method="weighted", weights={"law": 0.8, "large": 0.5, "base": 0.0}))
    assert roles == Roles(("large", "law"), ("law",), (0.5, 0.8))
    assert roles.alphas() == (0.8,)
    roles = ensemble.roles(FusionParams(method="weighted", weights={"law": -0.1, "base": 1, "maths": 2}))
    assert roles == Roles(("base", "maths", "law"), ("maths", "law"), (1.0, 2.0, -0.1))
    with pytest.raises(InvalidParameterError, match="weights names 'poetry'; the members are large, base, maths, law"):
        ensemble.roles(FusionParams(method="weighted", weights={"poetry": 1.0}))


def test_rows_are_those_of_each_member_after_the_same_text() -> None:
    ensemble, members = family()
    roles = ensemble.roles(FusionParams())
    prefill(ensemble, 0, prompts([1, 2, 3]))
    rows = decode(ensemble, roles, [(0, [4])])
    np.testing.assert_array_equal(rows["large"][0], members["large"].row([1, 2, 3, 4]))
    np.testing.assert_array_equal(rows["law"][0], members["law"].row([1, 2, 3, 4]))


def test_the_common_prefix_is_not_evaluated_again() -> None:
    ensemble, members = family()
    assert prefill(ensemble, 0, prompts([1, 2, 3, 4])) == 4
    assert prefill(ensemble, 0, prompts([1, 2, 9])) == 1
    assert members["large"].calls[-1] == [Run(0, [9], 1)]
    assert members["large"].cache[0] == [1, 2, 9]


def test_the_same_prompt_again_evaluates_its_last_token() -> None:
    ensemble, members = family()
    prefill(ensemble, 0, prompts([1, 2, 3]))
    assert prefill(ensemble, 0, prompts([1, 2, 3])) == 1
    np.testing.assert_array_equal(members["base"].logits()[0], members["base"].row([1, 2, 3]))


def test_a_member_that_sat_out_catches_up() -> None:
    ensemble, members = family()
    large = ensemble.roles(FusionParams(method="large"))
    prefill(ensemble, 0, prompts([1, 2], "large"))
    decode(ensemble, large, [(0, [3])])
    assert prefill(ensemble, 0, prompts([1, 2, 3, 4])) == 4
    assert members["large"].calls[-1] == [Run(0, [4], 1)]
    assert members["law"].calls == [[Run(0, [1, 2, 3, 4], 1)]]


def test_a_model_that_cannot_roll_back_starts_over_unless_the_text_only_grows() -> None:
    ensemble, members = family(can_trim=False)
    prefill(ensemble, 0, prompts([1, 2]))
    assert prefill(ensemble, 0, prompts([1, 2, 3])) == 1
    assert prefill(ensemble, 0, prompts([1, 9])) == 2
    assert members["base"].cache[0] == [1, 9]


@pytest.mark.parametrize("can_trim", [True, False])
@pytest.mark.parametrize("during", ["prefill", "decode"])
def test_an_interrupt_leaves_caches_that_the_next_request_puts_right(during: str, can_trim: bool) -> None:
    ensemble, members = family(can_trim=can_trim)
    roles = ensemble.roles(FusionParams())
    prefill(ensemble, 0, prompts([1, 2, 3]))
    members["maths"].fail_at = 0
    interrupted = {
        "prefill": lambda: prefill(ensemble, 0, prompts([1, 2, 3, 4, 5])),
        "decode": lambda: decode(ensemble, roles, [(0, [4])]),
    }
    with pytest.raises(KeyboardInterrupt):
        interrupted[during]()
    prefill(ensemble, 0, prompts([1, 2, 3, 4, 6]))
    for member in members.values():
        assert member.cache[0] == [1, 2, 3, 4, 6]
        np.testing.assert_array_equal(member.logits()[0], member.row([1, 2, 3, 4, 6]))


def test_sequences_are_kept_apart() -> None:
    ensemble, members = family()
    roles = ensemble.roles(FusionParams(method="large"))
    prefill(ensemble, 0, prompts([1, 2], "large"))
    prefill(ensemble, 1, prompts([5], "large"))
    rows = decode(ensemble, roles, [(0, [3]), (1, [6])])["large"]
    np.testing.assert_array_equal(rows[0], members["large"].row([1, 2, 3]))
    np.testing.assert_array_equal(rows[1], members["large"].row([5, 6]))


def test_a_prefix_that_another_sequence_holds_is_shared() -> None:
    ensemble, members = family()
    prefill(ensemble, 0, prompts([1, 2, 3, 4, 5]))
    assert prefill(ensemble, 1, prompts([1, 2, 3, 4, 9, 9])) == 2
    assert prefill(ensemble, 2, prompts([1, 2, 3, 4, 9, 9])) == 1
    assert ensemble.n_free() == members["base"].n_cells - 8
    ensemble.forget([0])
    assert prefill(ensemble, 3, prompts([1, 2, 3, 4, 5])) == 1
    for member in members.values():
        assert [member.cache[seq] for seq in range(4)] == [[], [1, 2, 3, 4, 9, 9], [1, 2, 3, 4, 9, 9], [1, 2, 3, 4, 5]]
        assert member.n_used() == member.n_cells - ensemble.n_free()


def test_its_own_prefix_comes_before_one_of_the_same_length() -> None:
    ensemble, members = family()
    for seq in (0, 1):
        prefill(ensemble, seq, prompts([1, 2, 3]))
        ensemble.decode({"large": [Run(seq, [7 + seq], 1)]})
    assert ensemble.begin("large", 1, [1, 2, 3, 8, 5]) == 4
    assert ensemble.begin("large", 1, [1, 2, 3, 7, 5]) == 4
    assert members["large"].cache[1] == [1, 2, 3, 7]


def test_a_model_that_cannot_roll_back_shares_nothing() -> None:
    ensemble, _ = family(can_trim=False)
    prefill(ensemble, 0, prompts([1, 2, 3]))
    assert prefill(ensemble, 1, prompts([1, 2, 3])) == 3


@pytest.mark.parametrize("seed", range(20))
def test_free_positions_are_counted_as_the_members_use_them(seed: int) -> None:
    ensemble, members = family()
    random = np.random.default_rng(seed)
    for _ in range(60):
        seq, text = int(random.integers(4)), random.integers(2, size=random.integers(1, 20)).tolist()
        match random.integers(3):
            case 0:
                prefill(ensemble, seq, prompts(text))
            case 1:
                ensemble.forget([seq])
            case 2:
                for name in members:
                    ensemble.shorten(name, seq, int(random.integers(20)))
        assert ensemble.n_free() == min(member.n_cells - member.n_used() for member in members.values())


@pytest.mark.parametrize("seed", range(10))
def test_sequences_that_change_places_keep_what_they_hold(seed: int) -> None:
    ensemble, members = family(has_streams=True)
    random = np.random.default_rng(seed)
    texts: dict[int, list[int]] = {seq: [] for seq in range(4)}
    for _ in range(40):
        a, b = (int(seq) for seq in random.permutation(4)[:2])
        if random.integers(2):
            ensemble.swap(a, b)
            texts[a], texts[b] = texts[b], texts[a]
        else:
            texts[a] = random.integers(2, size=random.integers(1, 20)).tolist()
            prefill(ensemble, a, prompts(texts[a]))
        for member in members.values():
            assert member.cache == texts
            assert ensemble.n_free() == member.n_cells - member.n_used()


def test_members_that_are_required_are_loaded_once_and_stand_in_order() -> None:
    _, members = family()
    asked: list[list[str]] = []

    def load(names: Sequence[str]) -> dict[str, FakeBackend]:
        asked.append(list(names))
        return {name: members[name] for name in names}

    ensemble = Ensemble({"law": members["law"]}, n_vocab=50, names=tuple(members), load=load)
    assert ensemble.experts == ("maths", "law")
    assert ensemble.roles(FusionParams()).members == tuple(members)
    prefill(ensemble, 0, prompts([1, 2, 3], "law"))
    ensemble.require(["law"])
    ensemble.require(["large", "law"])
    assert list(ensemble.members) == ["large", "law"]
    ensemble.require(members)
    ensemble.require(members)
    assert asked == [["large"], ["base", "maths"]]
    assert list(ensemble.members) == list(members)
    assert prefill(ensemble, 0, prompts([1, 2, 3, 4])) == 4
    assert members["law"].calls[-1] == [Run(0, [4], 1)]
    assert [member.cache[0] for member in members.values()] == [[1, 2, 3, 4]] * 4
    ensemble.close()
    assert all(member.closed for member in members.values())


def test_close_closes_every_member() -> None:
    ensemble, members = family()
    ensemble.close()
    assert all(member.closed for member in members.values())
