"""One request: text, limits and reports."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest

from edge_dlf import EdgeDLFError, FusionParams, SamplingParams
from edge_dlf.answers.completion import ChatCompletion, Completion
from edge_dlf.answers.message import MessageStream
from edge_dlf.answers.stream import Answer, Driver, TokenStream
from edge_dlf.engine.ensemble import Roles
from edge_dlf.engine.generation import Generation, GenerationRequest, StepResult
from edge_dlf.fusion.records import Pick

EOG = 99


class ScriptedDecoder:
    """Picks the given tokens for one generation, one after the other, each with α = 0.5 of the one expert."""

    def __init__(self, script: list[int]) -> None:
        self.ensemble = self
        self.n_seq_max, self.has_streams = 1, False
        self._script = iter(script)

    def clock(self) -> float:
        return 0.0

    def begin(self, generation: Generation, waiting: Iterable[Generation] = ()) -> None:
        pass

    def keep(self, generation: Generation) -> None:
        pass

    def n_due(self, generation: Generation) -> int:
        return 1

    def n_common(self, *_: object) -> int:
        return 0

    def n_held(self, *_: object) -> int:
        return 0

    def n_free(self) -> int:
        return 1000

    def step(self, generations: list[Generation], *_: object) -> list[StepResult]:
        (generation,) = generations
        pick = Pick(next(self._script), -0.5, ((1, -0.5), (2, -1.5)), (0.5,), None)
        generation.append(pick)
        return [StepResult(generation, [pick])]


PIECES = {0: b"a", 1: b"b", 2: "é".encode()[:1], 3: "é".encode()[1:], 4: b"STO", 5: b"P", 6: b" ", 7: b""}
PIECES |= {8: "\ufffd".encode()[:2], 9: "\ufffd".encode()[2:]}
NAMES = {**PIECES, 7: b"<name>"}
"""Token 7 is a control token."""


def run(script: list[int], *, max_tokens: int = 50, stop: tuple[str, ...] = ()) -> TokenStream:
    roles = Roles(("large", "base", "maths"), ("maths",), None)
    prompts = {"large": [7, 8, 9], "base": [7], "maths": [7]}
    request = GenerationRequest(
        roles, prompts, FusionParams(), SamplingParams(), max_tokens=max_tokens, is_end=EOG.__eq__
    )
    answer = Answer(Generation(request), PIECES.__getitem__, MessageStream(stop))
    return TokenStream(Driver(ScriptedDecoder([*script, EOG])), answer)  # type: ignore[arg-type]


def test_tokens_carry_the_text_they_add() -> None:
    stream = run([0, 2, 3, 1])
    assert [token.text for token in stream] == ["a", "", "é", "b"]
    assert stream.report.finish_reason == "stop"
    assert stream.report.n_generated == 4


def test_the_limit_ends_with_length_and_shows_an_unfinished_character() -> None:
    stream = run([0, 2, 3], max_tokens=2)
    assert [token.text for token in stream] == ["a", "\ufffd"]
    assert stream.report.finish_reason == "length"


def test_a_stop_string_over_two_tokens_is_never_shown() -> None:
    stream = run([0, 4, 5, 1], stop=("STOP",))
    assert [token.text for token in stream] == ["a", "", ""]
    assert stream.report.finish_reason == "stop"


def test_text_held_back_for_a_stop_string_comes_with_the_last_token() -> None:
    stream = run([0, 4], stop=("STOP",))
    assert [token.text for token in stream] == ["a", "STO"]


def test_a_stop_string_found_at_the_limit_counts_as_stop() -> None:
    stream = run([4, 5], stop=("STOP",), max_tokens=2)
    assert "".join(token.text for token in stream) == ""
    assert stream.report.finish_reason == "stop"


def test_nothing_but_the_end() -> None:
    stream = run([])
    assert list(stream) == []
    assert stream.report.finish_reason == "stop"
    assert stream.report.alpha_mean == 0.0


def test_a_newer_request_ends_an_older_one() -> None:
    stream = run([0, 1, 0])
    assert [next(stream).text, next(stream).text] == ["a", "b"]
    stream.close()
    with pytest.raises(EdgeDLFError, match="newer request"):
        next(stream)


def test_the_report() -> None:
    stream = run([0, 1, 0, 1])
    list(stream)
    report = stream.report
    assert report.usage() == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert report.alpha_mean == pytest.approx(0.5)
    assert report.expert_share == {"maths": 1.0}
    assert report.counts.n_steps == 4
    assert report.summary()["method"] == "dynamic"


def test_completion_dictionary() -> None:
    stream = run([0, 2, 3])
    result = Completion(stream.answer, "family", True, PIECES.__getitem__).result(list(stream))
    (choice,) = result["choices"]
    assert result["object"] == "text_completion"
    assert choice["text"] == "aé"
    assert choice["finish_reason"] == "stop"
    assert choice["logprobs"]["text_offset"] == [0, 1, 1]
    assert choice["logprobs"]["token_logprobs"] == [-0.5] * 3
    assert choice["logprobs"]["top_logprobs"][0] == {"a": -0.5, "b": -0.5, "\ufffd": -1.5}
    assert result["usage"]["completion_tokens"] == 3
    assert result["edge_dlf"]["expert_share"] == {"maths": 1.0}


def logprobs_of(stream: TokenStream, n_prompt_chars: int) -> dict[str, Any]:
    completion = Completion(stream.answer, "family", True, NAMES.__getitem__, n_prompt_chars)
    logprobs: dict[str, Any] = completion.result(list(stream))["choices"][0]["logprobs"]
    return logprobs


def test_offsets_begin_after_the_prompt() -> None:
    assert logprobs_of(run([0, 2, 3, 1]), 7)["text_offset"] == [7, 8, 8, 9]
    assert logprobs_of(run([0, 4, 0]), 7)["text_offset"] == [7, 8, 11]


def test_offsets_lead_to_the_characters_of_each_token() -> None:
    found = logprobs_of(run([2, 0, 7, 2, 2, 3, 8, 9, 6]), 7)
    assert "".join(token.text for token in run([2, 0, 7, 2, 2, 3, 8, 9, 6])) == "\ufffda\ufffdé\ufffd "
    assert found["tokens"] == ["\ufffd", "a", "<name>", "\ufffd", "\ufffd", "\ufffd", "\ufffd", "\ufffd", " "]
    assert found["text_offset"] == [7, 8, 9, 9, 10, 10, 11, 11, 12]


def test_a_stop_string_that_never_comes_moves_no_offset() -> None:
    assert logprobs_of(run([0, 4, 0], stop=("STOP",)), 7) == logprobs_of(run([0, 4, 0]), 7)


def test_an_answer_of_no_tokens_has_no_offsets() -> None:
    found = logprobs_of(run([]), 7)
    assert found == {"tokens": [], "text_offset": [], "token_logprobs": [], "top_logprobs": []}


def test_completion_chunks_join_to_the_result() -> None:
    stream = run([0, 2, 3, 1])
    chunks = list(Completion(stream.answer, "family", True, PIECES.__getitem__).chunks(stream))
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "aéb"
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks] == [None] * 4 + ["stop"]
    assert [chunk["choices"][0]["logprobs"]["text_offset"] for chunk in chunks[:-1]] == [[0], [1], [1], [2]]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[-1]["usage"]["total_tokens"] == 7


def test_chat_completion_dictionary() -> None:
    stream = run([0, 2])
    result = ChatCompletion(stream.answer, "family", True, PIECES.__getitem__).result(list(stream))
    (choice,) = result["choices"]
    assert result["object"] == "chat.completion"
    assert choice["message"] == {"role": "assistant", "content": "a\ufffd"}
    assert choice["logprobs"]["content"][1]["bytes"] == [0xC3]


def test_chat_completion_chunks() -> None:
    stream = run([0, 1])
    chunks = list(ChatCompletion(stream.answer, "family", False, PIECES.__getitem__).chunks(stream))
    assert [chunk["choices"][0]["delta"] for chunk in chunks] == [
        {"role": "assistant"},
        {"content": "a"},
        {"content": "b"},
        {},
    ]
    assert chunks[0]["object"] == "chat.completion.chunk"
    assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
