"""Scoring of given texts, against the float64 oracle and against decoding."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_dlf import ContextOverflowError, FusedLlama, FusionParams, InvalidParameterError, NonFiniteLogitsError
from edge_dlf.answers.scoring import Score, run_scores
from edge_dlf.answers.stream import Answer, Driver
from edge_dlf.engine.backend import N_ROWS
from edge_dlf.engine.decoder import Decoder
from edge_dlf.engine.ensemble import Ensemble
from edge_dlf.engine.generation import Generation, GenerationRequest
from edge_dlf.fusion.fuser import Fuser
from edge_dlf.params import SamplingParams

from . import naive
from .fake_backend import FakeBackend
from .test_decode import METHODS, N_VOCAB, family, label


def oracle(members: dict[str, FakeBackend], prompt: list[int], answer: list[int], fusion: FusionParams) -> list[float]:
    """The logprob of each token of `answer`, every row from the whole text."""
    logprobs, text = [], list(prompt)
    for token in answer:
        rows = {name: member.row(text)[:N_VOCAB] for name, member in members.items()}
        logprobs.append(float(naive.log_softmax(naive.fused_row(rows, fusion))[0][token]))
        text.append(token)
    return logprobs


def scores(
    members: dict[str, FakeBackend], pairs: list[tuple[list[int], list[int]]], fusion: FusionParams
) -> dict[int, Score]:
    ensemble = Ensemble(members, N_VOCAB)
    requests = [
        GenerationRequest(
            ensemble.roles(fusion),
            dict.fromkeys(members, prompt),
            fusion,
            SamplingParams(temperature=0.0, seed=0),
            max_tokens=len(answer),
            n_top=1,
            forced=tuple(answer),
        )
        for prompt, answer in pairs
    ]
    answers = [Answer(Generation(request), lambda _: b"") for request in requests]
    return dict(run_scores(Driver(Decoder(ensemble, Fuser(N_VOCAB))), answers))


RNG = np.random.default_rng(4)
PAIRS = [
    (RNG.integers(0, N_VOCAB, n).tolist(), RNG.integers(0, N_VOCAB, m).tolist())
    for n, m in [(1, 1), (5, 3), (30, 9), (2, 40), (70, 90), (3, 1)]
]
PAIRS += [(PAIRS[2][0], [1]), (PAIRS[2][0], [2, 3]), (PAIRS[2][0], PAIRS[2][1][:4]), PAIRS[4]]


@pytest.mark.parametrize("fusion", METHODS, ids=label)
@pytest.mark.parametrize(
    "settings", [{}, {"n_seq_max": 1}, {"n_cells": 230}, {"n_batch": 8}, {"can_trim": False}], ids=str
)
def test_scores_are_the_oracle_s(fusion: FusionParams, settings: dict[str, Any]) -> None:
    found = scores(family(**settings), PAIRS, fusion)
    assert sorted(found) == list(range(len(PAIRS)))
    for number, (prompt, answer) in enumerate(PAIRS):
        assert found[number].logprobs == pytest.approx(oracle(family(), prompt, answer, fusion), abs=2e-4)
        assert len(found[number].alphas) == len(answer)


def test_a_common_prefix_is_evaluated_once() -> None:
    members = family()
    prompt = list(range(40))
    scores(members, [(prompt, [k]) for k in range(8)], FusionParams())
    assert all(member.n_evaluated <= len(prompt) + 7 for member in members.values())


def test_a_long_answer_takes_few_steps_and_bounded_rows() -> None:
    members = family()
    scores(members, [([1], [k % N_VOCAB for k in range(200)])], FusionParams())
    assert len(members["large"].calls) <= 200 // N_ROWS + 1
    assert max(sum(run.n_rows for run in call) for call in members["large"].calls) == N_ROWS


def test_many_at_once_share_the_rows_of_a_step() -> None:
    members = family(n_seq_max=20)
    scores(members, [([k], [1, 2, 3, 4, 5]) for k in range(30)], FusionParams(method="large"))
    assert max(sum(run.n_rows for run in call) for call in members["large"].calls) == 20


def test_nan_is_an_error_that_names_the_member() -> None:
    members = family()
    members["base"].poison = (9, float("nan"))
    with pytest.raises(NonFiniteLogitsError, match="base"):
        scores(members, [([1], [2, 9, 3, 4])], FusionParams())


class TestApi:
    @pytest.mark.parametrize("method", ["dynamic", "large"])
    def test_a_greedy_answer_scores_what_its_tokens_had(self, tiny_llm: FusedLlama, method: str) -> None:
        tokens = list(tiny_llm.stream("the cat", max_tokens=20, method=method, temperature=0.0))
        answer = [token.id for token in tokens]
        (pair,) = tiny_llm.score([("the cat", answer)], method=method)
        assert pair[0] == 0
        assert pair[1].is_greedy
        assert pair[1].logprobs == pytest.approx([token.logprob for token in tokens], abs=1e-3)
        assert pair[1].logprob == pytest.approx(sum(token.logprob for token in tokens), abs=1e-2)
        other = next(k for k in range(9) if k != answer[-1])
        ((_, score),) = tiny_llm.score([("the cat", [*answer[:-1], other])], method=method)
        assert not score.is_greedy

    def test_what_cannot_be_scored(self, tiny_llm: FusedLlama) -> None:
        with pytest.raises(InvalidParameterError, match="no tokens"):
            list(tiny_llm.score([("a", [])]))
        with pytest.raises(ContextOverflowError, match="more than the context of 256"):
            list(tiny_llm.score([("a", [1] * 257)]))
        assert len(list(tiny_llm.score([([1], [1] * 256)]))) == 1
        with pytest.raises(TypeError, match="'temperature'"):
            tiny_llm.score([], temperature=1.0)
