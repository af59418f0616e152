"""Members in lock-step: what is evaluated, what is reused, and what survives an interrupt."""

from __future__ import annotations

import numpy as np
import pytest

from edge_dlf import ContextOverflowError, FusionParams, InvalidParameterError
from edge_dlf.ensemble import Ensemble, Roles

from .fake_backend import FakeBackend


def family(**settings: bool) -> tuple[Ensemble, dict[str, FakeBackend]]:
    members = {name: FakeBackend(seed, **settings) for seed, name in enumerate(("large", "base", "maths", "law"))}
    return Ensemble(members, n_vocab=50), members


def prompts(tokens: list[int], *names: str) -> dict[str, list[int]]:
    return dict.fromkeys(names or ("large", "base", "maths", "law"), tokens)


def decode(ensemble: Ensemble, roles: Roles, tokens: list[tuple[int, list[int]]]) -> None:
    for name in roles.members:
        ensemble.decode(name, tokens)


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
    with pytest.raises(InvalidParameterError, match=r"'poetry' is none of dynamic, static, large, base, maths, law"):
        ensemble.roles(FusionParams(method="poetry"))


def test_static_alphas_by_name() -> None:
    ensemble, _ = family()
    assert ensemble.static_alphas(FusionParams(method="static", alpha={"law": 0.5})) == (0.0, 0.5)
    assert ensemble.static_alphas(FusionParams(method="static", alpha=0.7)) == (0.7, 0.7)
    with pytest.raises(InvalidParameterError, match="poetry"):
        ensemble.static_alphas(FusionParams(method="static", alpha={"poetry": 1.0}))


def test_rows_are_those_of_each_member_after_the_same_text() -> None:
    ensemble, members = family()
    roles = ensemble.roles(FusionParams())
    ensemble.prefill(0, prompts([1, 2, 3]))
    decode(ensemble, roles, [(0, [4])])
    rows = ensemble.rows(roles)
    np.testing.assert_array_equal(rows.primary[0], members["large"].row([1, 2, 3, 4]))
    np.testing.assert_array_equal(rows.experts[1][0], members["law"].row([1, 2, 3, 4]))


def test_the_common_prefix_is_not_evaluated_again() -> None:
    ensemble, members = family()
    assert ensemble.prefill(0, prompts([1, 2, 3, 4])) == 4
    assert ensemble.prefill(0, prompts([1, 2, 9])) == 1
    assert members["large"].calls[-1] == ("prefill", (0, [9]))
    assert members["large"].cache[0] == [1, 2, 9]


def test_the_same_prompt_again_evaluates_its_last_token() -> None:
    ensemble, members = family()
    ensemble.prefill(0, prompts([1, 2, 3]))
    assert ensemble.prefill(0, prompts([1, 2, 3])) == 1
    np.testing.assert_array_equal(members["base"].logits()[0], members["base"].row([1, 2, 3]))


def test_a_member_that_sat_out_catches_up() -> None:
    ensemble, members = family()
    large = ensemble.roles(FusionParams(method="large"))
    ensemble.prefill(0, prompts([1, 2], "large"))
    decode(ensemble, large, [(0, [3])])
    assert ensemble.prefill(0, prompts([1, 2, 3, 4])) == 4
    assert members["large"].calls[-1] == ("prefill", (0, [4]))
    assert members["law"].calls == [("prefill", (0, [1, 2, 3, 4]))]


def test_a_model_that_cannot_roll_back_starts_over_unless_the_text_only_grows() -> None:
    ensemble, members = family(can_trim=False)
    ensemble.prefill(0, prompts([1, 2]))
    assert ensemble.prefill(0, prompts([1, 2, 3])) == 1
    assert ensemble.prefill(0, prompts([1, 9])) == 2
    assert members["base"].cache[0] == [1, 9]


@pytest.mark.parametrize("can_trim", [True, False])
@pytest.mark.parametrize("during", ["prefill", "decode"])
def test_an_interrupt_leaves_caches_that_the_next_request_puts_right(during: str, can_trim: bool) -> None:
    ensemble, members = family(can_trim=can_trim)
    roles = ensemble.roles(FusionParams())
    ensemble.prefill(0, prompts([1, 2, 3]))
    members["maths"].fail_at = 0
    interrupted = {
        "prefill": lambda: ensemble.prefill(0, prompts([1, 2, 3, 4, 5])),
        "decode": lambda: decode(ensemble, roles, [(0, [4])]),
    }
    with pytest.raises(KeyboardInterrupt):
        interrupted[during]()
    ensemble.prefill(0, prompts([1, 2, 3, 4, 6]))
    for member in members.values():
        assert member.cache[0] == [1, 2, 3, 4, 6]
        np.testing.assert_array_equal(member.logits()[0], member.row([1, 2, 3, 4, 6]))


def test_a_prompt_beyond_the_context_is_refused_before_any_decode() -> None:
    ensemble, members = family()
    with pytest.raises(ContextOverflowError, match="300 tokens, the context of law only 256"):
        ensemble.prefill(0, {"large": [1], "law": [1] * 300})
    assert not any(member.calls for member in members.values())


def test_sequences_are_kept_apart() -> None:
    ensemble, members = family()
    roles = ensemble.roles(FusionParams(method="large"))
    ensemble.prefill(0, prompts([1, 2], "large"))
    ensemble.prefill(1, prompts([5], "large"))
    decode(ensemble, roles, [(0, [3]), (1, [6])])
    rows = ensemble.rows(roles).primary
    np.testing.assert_array_equal(rows[0], members["large"].row([1, 2, 3]))
    np.testing.assert_array_equal(rows[1], members["large"].row([5, 6]))


def test_close_closes_every_member() -> None:
    ensemble, members = family()
    ensemble.close()
    assert all(member.closed for member in members.values())
