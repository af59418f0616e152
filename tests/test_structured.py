"""Answers that keep to a JSON schema or a grammar, however they are decoded."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

from edge_dlf import FusedLlama, InvalidParameterError
from edge_dlf.fusion.fuser import Fuser
from edge_dlf.fusion.records import Draw
from edge_dlf.params import FusionParams, SamplingParams

# Random weights end nothing by themselves: each schema is bounded, so that an answer ends.
WORD = {"type": "string", "maxLength": 6}
SMALL = {"type": "integer", "minimum": -9, "maximum": 99}
SCHEMAS: dict[str, dict[str, Any]] = {
    "word": WORD,
    "boolean": {"type": "boolean"},
    "integer": SMALL,
    "enum": {"enum": ["red", "grün", 3, None, {"a": [1]}]},
    "const": {"const": {"kind": "point", "at": [0, 1]}},
    "pattern": {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"},
    "date": {"type": "string", "format": "date"},
    "array": {"type": "array", "items": SMALL, "minItems": 2, "maxItems": 4},
    "tuple": {"type": "array", "prefixItems": [WORD, {"type": "boolean"}], "items": False, "minItems": 2},
    "object": {
        "type": "object",
        "properties": {"name": WORD, "age": SMALL, "tags": {"type": "array", "items": WORD, "maxItems": 2}},
        "required": ["name", "age"],
        "additionalProperties": False,
    },
    "choice": {
        "anyOf": [
            {
                "type": "object",
                "properties": {"ok": {"const": True}},
                "required": ["ok"],
                "additionalProperties": False,
            },
            {"type": "object", "properties": {"error": WORD}, "required": ["error"], "additionalProperties": False},
        ]
    },
    "tree": {
        "$defs": {
            "leaf": {"type": "object", "properties": {"x": SMALL}, "required": ["x"], "additionalProperties": False}
        },
        "type": "object",
        "properties": {"left": {"$ref": "#/$defs/leaf"}, "right": {"$ref": "#/$defs/leaf"}},
        "required": ["left", "right"],
        "additionalProperties": False,
    },
}
GRAMMAR = 'root ::= ("yes" | "no") " [" [0-9]{1,4} "]" tail?\ntail ::= "!" [a-zé]* "."'
GRAMMAR_ANSWER = re.compile(r"(yes|no) \[[0-9]{1,4}\](![a-zé]*\.)?")


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[FusedLlama]:
    with FusedLlama.from_family(tiny, n_ctx=512, n_threads=1, n_parallel=6) as llm:
        yield llm


def text(llm: FusedLlama, **settings: Any) -> str:
    answer = llm.create_completion("Say it in JSON: ", max_tokens=300, **settings)
    assert isinstance(answer, dict)
    assert answer["choices"][0]["finish_reason"] == "stop"
    return str(answer["choices"][0]["text"])


@pytest.mark.parametrize("name", SCHEMAS)
def test_an_answer_is_json_of_the_schema(llm: FusedLlama, name: str) -> None:
    for seed, method in enumerate(("dynamic", "large")):
        answer = text(llm, json_schema=SCHEMAS[name], temperature=0.9, seed=seed, method=method)
        jsonschema.validate(json.loads(answer), SCHEMAS[name])


@pytest.mark.parametrize(
    ("pattern", "reason"),
    [("a(", "unclosed group"), ("(?=a)", "look-around"), ("[b-a]", "invalid character class range")],
)
def test_a_pattern_that_cannot_be_kept_to_is_refused_with_the_reason(
    llm: FusedLlama, pattern: str, reason: str
) -> None:
    with pytest.raises(InvalidParameterError, match=f"the JSON schema cannot be used: .*{reason}") as caught:
        text(llm, json_schema={"type": "string", "pattern": pattern})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("draft", [1, 4, "auto"])
def test_drafting_gives_the_same_answer(llm: FusedLlama, draft: Any) -> None:
    for form in ({"json_schema": SCHEMAS["object"]}, {"grammar": GRAMMAR}):
        for sampling in ({"temperature": 0.0}, {"temperature": 0.8, "seed": 3}):
            assert text(llm, **form, **sampling, draft=draft) == text(llm, **form, **sampling)


def test_what_a_draft_holds_beyond_an_end_is_never_used(llm: FusedLlama) -> None:
    model = llm._members.vocabulary
    a, b, end = *model.tokenize(b"ab", special=False), model.eos
    assert end is not None
    form = llm._preparer.tokenizer._forms_of(llm._members.is_eog).grammar('root ::= "ab"')

    def allows(ahead: list[int], token: int) -> bool:
        return form.banned(ahead, token, None) is None

    assert [allows([], token) for token in (a, b, end)] == [True, False, False]
    assert [allows([a], token) for token in (a, b, end)] == [False, True, False]
    banned = form.banned([a, b], a, None)
    assert banned is not None
    assert end not in banned.tolist()
    assert {a, b} <= {*banned.tolist()}
    assert allows([b], a)
    assert allows([a, b, end], a)
    for token in (a, b):
        form.accept(token)
    assert [allows([], token) for token in (a, b, end)] == [False, False, True]


def test_rows_of_a_batch_each_keep_to_their_own(llm: FusedLlama) -> None:
    forms = [{"json_schema": {"type": "json_schema", "json_schema": {"schema": schema}}} for schema in SCHEMAS.values()]
    rows = [
        {"prompt": "Say: ", "max_tokens": 300, "seed": n, "temperature": 0.9, "response_format": form["json_schema"]}
        for n, form in enumerate(forms)
    ]
    rows += [{"prompt": "Say: ", "max_tokens": 300, "temperature": 0.9, "grammar": GRAMMAR}]
    rows += [{"prompt": "Say: ", "max_tokens": 8}]
    results = {row["custom_id"]: row["response"]["body"]["choices"][0]["text"] for row in llm.batch(rows)}
    for n, schema in enumerate(SCHEMAS.values(), 1):
        jsonschema.validate(json.loads(results[str(n)]), schema)
    assert GRAMMAR_ANSWER.fullmatch(results[str(len(SCHEMAS) + 1)])


def test_an_answer_keeps_to_a_grammar(llm: FusedLlama) -> None:
    for seed in range(4):
        assert GRAMMAR_ANSWER.fullmatch(text(llm, grammar=GRAMMAR, temperature=0.9, seed=seed))


def test_a_chat_takes_openai_s_response_format(llm: FusedLlama) -> None:
    for form in (
        {"type": "json_schema", "json_schema": {"name": "x", "schema": SCHEMAS["object"]}},
        {"type": "json_object", "schema": SCHEMAS["object"]},
    ):
        answer = llm.create_chat_completion(
            [{"role": "user", "content": "Who?"}], response_format=form, max_tokens=300, temperature=0.9, seed=1
        )
        assert isinstance(answer, dict)
        jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), SCHEMAS["object"])
    free = llm.create_chat_completion(
        [{"role": "user", "content": "Who?"}], response_format={"type": "text"}, max_tokens=3
    )
    assert isinstance(free, dict)


def test_probabilities_are_those_of_the_models(llm: FusedLlama) -> None:
    """The logprob of a token tells what the fused distribution thought of it, not what the grammar left."""
    (token, *_) = llm.stream("Say: ", grammar='root ::= "q"', top_logprobs=llm.n_vocab)
    assert token.text == "q"
    assert token.logprob == pytest.approx(dict(token.top_logprobs)[token.id])
    assert token.logprob < -1


@pytest.mark.parametrize(
    ("form", "complaint"),
    [
        ({"grammar": ""}, "no rule root"),
        ({"grammar": 3}, "must be text"),
        ({"grammar": "root = x"}, "expecting ::="),
        ({"grammar": 'foo ::= "a"'}, "root"),
        ({"grammar": "root ::= missing"}, "undefined rule 'missing'"),
        ({"grammar": 'root ::= root "a"'}, "no text that ends"),
        ({"grammar": "root ::= " + "(" * 100_000}, "a ( without its )"),
        ({"grammar": "root ::= " + "(" * 60_000 + '"1" "2"' + ")?" * 60_000}, "nested too deeply"),
        ({"json_schema": {"type": "banana"}}, "banana"),
        ({"json_schema": {"type": "array", "uniqueItems": True}}, "uniqueItems"),
        ({"json_schema": {"$ref": "https://example.com/x"}}, "example.com"),
        ({"json_schema": {"type": "string"}, "grammar": GRAMMAR}, "not to both"),
    ],
    ids=lambda value: str(value)[:60],
)
def test_what_cannot_be_kept_to_is_refused(
    llm: FusedLlama, capfd: pytest.CaptureFixture[str], form: dict[str, Any], complaint: str
) -> None:
    with pytest.raises(InvalidParameterError, match=re.escape(complaint)):
        llm.create_completion("Say: ", max_tokens=5, **form)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    "form", [{"type": "yaml"}, {"type": "json_schema"}, {"type": "json_schema", "json_schema": {"name": "x"}}, "json"]
)
def test_a_response_format_that_is_none_is_refused(llm: FusedLlama, form: Any) -> None:
    (row,) = llm.batch([{"prompt": "Say: ", "response_format": form}])
    assert row["error"]["code"] == "invalid_request"


def test_banned_tokens_are_never_chosen() -> None:
    row = np.arange(10, dtype=np.float32)[None]
    draw = Draw(SamplingParams(temperature=0.0, logit_bias={1: 3.5, 9: 100.0}), 0, 0, np.empty(0, np.int32), 2)
    fuser = Fuser(10)
    for banned, expected in (([9], 8), ([2, 3, 4, 5, 6, 7, 8, 9], 1), ([*range(9)], 9)):
        (picked,) = fuser.pick([row], ("large",), FusionParams(), [()], [replace(draw, banned=np.array(banned))])
        assert picked.token == expected
        assert [token for token, _ in picked.top_logprobs] == [9, 8]
    (nothing,) = fuser.pick([row], ("large",), FusionParams(), [()], [replace(draw, banned=np.arange(10))])
    assert isinstance(nothing.error, InvalidParameterError)


@pytest.mark.exhaustive
@pytest.mark.parametrize("family", ["tiny", "demo"])
def test_a_thousand_answers_under_a_dozen_schemas(tiny: Path, family: str) -> None:
    with FusedLlama.from_family(tiny if family == "tiny" else family, n_ctx=512, n_threads=1, n_parallel=6) as llm:
        _check_a_thousand(llm)


def _check_a_thousand(llm: FusedLlama) -> None:
    names = [*SCHEMAS] * 84
    rows = [
        {"prompt": f"{n}: ", "max_tokens": 400, "temperature": 1.0, "response_format": _format(SCHEMAS[name])}
        for n, name in enumerate(names)
    ]
    n_done = 0
    for row in llm.batch(rows, seed=5):
        choice = row["response"]["body"]["choices"][0]
        assert choice["finish_reason"] == "stop"
        jsonschema.validate(json.loads(choice["text"]), SCHEMAS[names[int(row["custom_id"]) - 1]])
        n_done += 1
    assert n_done == 1008


def _format(schema: dict[str, Any]) -> dict[str, Any]:
    return {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema}}
