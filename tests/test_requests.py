"""Requests as data: what is taken, and one clear reason for what is not."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edge_dlf import InvalidParameterError
from edge_dlf.answers.requests import CHAT, COMPLETIONS, columns_of, parse_body, parse_line, request_id

CHAT_BODY = {"model": "any", "messages": [{"role": "user", "content": "Hi"}]}


def openai(body: Any, url: str = CHAT, **fields: Any) -> dict[str, Any]:
    return {"custom_id": "a", "method": "POST", "url": url, "body": body, **fields}


def test_a_line_of_an_openai_batch() -> None:
    request = parse_line(openai({**CHAT_BODY, "max_tokens": 5, "stop": "\n", "temperature": 0, "seed": None}))
    assert request.is_chat
    assert request.content == CHAT_BODY["messages"]
    assert request.settings == {"max_tokens": 5, "stop": ("\n",), "temperature": 0}


def test_completions_are_raw_and_a_short_prompt_is_not() -> None:
    assert parse_line(openai({"prompt": "x"}, COMPLETIONS)).is_raw
    assert not parse_line({"prompt": "x"}).is_raw
    assert parse_line("x") == parse_line({"prompt": "x"})


def test_fusion_sits_apart_from_the_http_method() -> None:
    request = parse_line({"prompt": [1, 2], "edge_dlf": {"method": "static", "alpha": {"law": 0.5}}})
    assert request.settings == {"method": "static", "alpha": {"law": 0.5}}
    fusion = {"method": "weighted", "weights": {"large": 1, "law": -0.5}}
    assert parse_line({"prompt": "x", "edge_dlf": fusion}).settings == fusion
    with pytest.raises(InvalidParameterError, match="weights must be NAME=NUMBER"):
        parse_line({"prompt": "x", "edge_dlf": {"weights": 0.5}})


def test_limits_and_logprobs() -> None:
    assert parse_line({**CHAT_BODY, "max_completion_tokens": 7}).settings == {"max_tokens": 7}
    assert parse_line({"prompt": "x", "logprobs": 3}).settings == {"logprobs": 3}
    chat = parse_line({**CHAT_BODY, "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": -100}})
    assert chat.settings == {"logprobs": True, "top_logprobs": 2, "logit_bias": {5: -100.0}}


def test_what_openai_clients_send_besides_is_ignored() -> None:
    line = openai({**CHAT_BODY, "user": "u", "metadata": {}, "n": 1, "stream": False, "service_tier": "auto"})
    assert parse_line(line).settings == {}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (3, "a request must be an object, not 3"),
        ({}, "either a prompt or messages"),
        ({"prompt": "x", "messages": []}, "either a prompt or messages"),
        ({"prompt": 3}, "prompt must be one text"),
        ({"prompt": ["a", "b"]}, "prompt must be one text"),
        ({"prompt": [True]}, "prompt must be one text"),
        ({"messages": []}, "one message or more"),
        ({"messages": "hello"}, "one message or more"),
        ({"messages": ["hello"]}, "object with role and content"),
        ({"prompt": "x", "id": 1.5}, "id must be text or an integer"),
        ({"prompt": "x", "temperature": "hot"}, "temperature must be a finite number, not 'hot'"),
        ({"prompt": "x", "temperature": True}, "temperature must be a finite number, not True"),
        ({"prompt": "x", "temperature": 10**400}, "temperature must be a finite number, not 1000"),
        ({"prompt": "x", "top_k": 1.5}, "top_k must be an integer"),
        ({"prompt": "x", "max_tokens": "5"}, "max_tokens must be an integer"),
        ({"prompt": "x", "stop": [1]}, "stop must be text"),
        ({"prompt": "x", "logit_bias": {"a": 1}}, "logit_bias must map token ids"),
        ({"prompt": "x", "logit_bias": {"9" * 5000: 1}}, "logit_bias must map token ids"),
        ({"prompt": "x", "logit_bias": [1]}, "logit_bias must map token ids to numbers"),
        ({"prompt": "x", "logprobs": True}, "logprobs must be an integer"),
        ({**CHAT_BODY, "logprobs": 3}, "logprobs must be true or false"),
        ({"prompt": "x", "n": 2}, "n must be 1"),
        ({"prompt": "x", "stream": True}, "stream must be false"),
        ({"prompt": "x", "method": "large"}, 'method belongs under "edge_dlf"'),
        ({"prompt": "x", "tools": []}, "unknown field 'tools'"),
        ({"prompt": "x", "edge_dlf": "large"}, "edge_dlf must be an object"),
        ({"prompt": "x", "edge_dlf": {"beta": 1}}, "unknown field 'beta' under edge_dlf"),
        ({"prompt": "x", "edge_dlf": {"alpha": "1"}}, "alpha must be a finite number or NAME=NUMBER"),
        ({"prompt": "x", "edge_dlf": {"alpha": {"law": "1"}}}, "alpha of law must be a finite number"),
        ({"prompt": "x", "edge_dlf": {"method": 3}}, "method must be text"),
        (openai(CHAT_BODY, custom_id=None), "custom_id must be text"),
        (openai(CHAT_BODY, method="GET"), "method must be POST"),
        (openai(CHAT_BODY, url="/v1/embeddings"), "url must be /v1/chat/completions or /v1/completions"),
        (openai({**CHAT_BODY, "extra": 1}), "unknown field 'extra'"),
        ({"prompt": "x", "n": True}, "n must be 1"),
        ({"prompt": "x", "echo": 0}, "unknown field 'echo'"),
        ({"prompt": "x", "best_of": True}, "unknown field 'best_of'"),
        ({"prompt": "x", "suffix": "y"}, "unknown field 'suffix'"),
        ({"prompt": "x", "temprature": 0}, "unknown field 'temprature'; is temperature meant"),
        ({"prompt": "x", "max_token": 5}, "unknown field 'max_token'; is max_tokens meant"),
        ({"prompt": "x", "images": ["a.png"]}, "unknown field 'images'"),
        ({**CHAT_BODY, "audio": {}}, "unknown field 'audio'"),
        ({"prompt": "x", "custom_id": []}, "id must be text or an integer"),
        (openai([1]), "body must be an object"),
        (openai(CHAT_BODY, COMPLETIONS), "prompt must be one text"),
        (openai({"prompt": "x"}, CHAT), "one message or more"),
    ],
)
def test_what_cannot_be_answered_is_refused_with_the_reason(line: Any, message: str) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        parse_line(line)


@pytest.mark.parametrize(
    ("line", "identity"),
    [
        ({"custom_id": "a", "id": "b"}, "a"),
        ({"id": "b"}, "b"),
        ({"id": 12}, "12"),
        ({"id": True}, "7"),
        ({"id": 3.0}, "3"),
        ({"id": np.int64(4)}, "4"),
        ({"custom_id": 5.0}, "5"),
        ({"id": 2.5}, "7"),
        ({"id": float("inf")}, "7"),
        ({"id": ["b"]}, "7"),
        ("text", "7"),
        (None, "7"),
    ],
)
def test_ids(line: Any, identity: str) -> None:
    assert request_id(line, 7) == identity


@pytest.mark.parametrize(
    "fields",
    [
        {"echo": False},
        {"best_of": 1},
        {"functions": [], "function_call": "none", "verbosity": "medium", "prompt_cache_retention": "24h"},
        {"ignore_eos": False, "min_tokens": 0, "repetition_penalty": 1.0, "typical_p": 1, "use_beam_search": False},
        {"skip_special_tokens": True},
        {"best_of": 1.0},
        {"suffix": ""},
        {"modalities": ["text"]},
        {"seed": -1},
        {"seed": -1.0},
        {"max_tokens": -1},
        {"max_completion_tokens": -1},
        {"logprobs": False},
        {"n": 1.0},
        {"tools": None},
    ],
    ids=str,
)
def test_fields_that_ask_for_nothing_are_as_if_not_given(fields: dict[str, object]) -> None:
    assert parse_body({"prompt": "a", **fields}) == parse_body({"prompt": "a"})


def test_minus_one_draws_from_all_tokens() -> None:
    assert parse_body({"prompt": "a", "top_k": -1}).settings == {"top_k": 0}


@pytest.mark.parametrize(
    ("line", "columns"),
    [
        ({"prompt": "a", "answer": "b", "difficulty": 3, "url": "https://x.example"}, ("answer", "difficulty", "url")),
        ({**CHAT_BODY, "metadata": {}, "answer": None}, ("answer",)),
        (openai(CHAT_BODY, answer="b", id=7), ("answer", "id")),
        ({"custom_id": "a", "prompt": "x", "body_": 1}, ("body_",)),
        ({"prompt": "a", 5: 6}, ("5",)),
    ],
)
def test_columns_of_the_user_s_own_may_stand_beside_a_request(line: Any, columns: tuple[str, ...]) -> None:
    assert parse_line(line).columns == columns
    assert parse_line(line).settings == {}


def test_columns_that_are_kept_are_those_that_nothing_uses() -> None:
    line = {"id": 1, "prompt": "a", "model": "m", "user": "u", "answer": "b", "temperature": 0, "response": "r"}
    assert columns_of(line) == {"model": "m", "user": "u", "answer": "b", "response": "r"}


def test_whole_numbers_may_be_written_as_floats() -> None:
    request = parse_body({"prompt": "a", "max_tokens": 5.0, "top_k": 40.0, "top_p": 0})
    assert request.settings == {"max_tokens": 5, "top_k": 40, "top_p": 0.0}
    assert request_id({"id": 1.0, "prompt": "a"}, 7) == "1"
    assert parse_line({"id": 1.0, "prompt": "a"}).content == "a"
    with pytest.raises(InvalidParameterError, match="max_tokens must be an integer"):
        parse_body({"prompt": "a", "max_tokens": 5.5})


def test_likely_tokens_need_logprobs() -> None:
    with pytest.raises(InvalidParameterError, match="top_logprobs needs logprobs"):
        parse_body({"messages": [{"role": "user", "content": "a"}], "top_logprobs": 3})
