"""Forms that want to compute for ever, crash or explode end their own answer; others are kept to."""

from __future__ import annotations

import errno
import itertools
import json
import multiprocessing
import os
import random
import signal
import socket
from collections.abc import Callable, Iterator, Sequence

import pytest

from edge_dlf import EdgeDLFError, FusedLlama, InvalidParameterError, RequestInterruptedError
from edge_dlf.answers.call_grammar import call_grammar
from edge_dlf.answers.dialects import HERMES, Dialect
from edge_dlf.answers.forms import Form, Forms
from edge_dlf.answers.thinking import AfterThinking, ThinkingTags
from edge_dlf.answers.tools import read_tools
from edge_dlf.engine.constraint import Constraint, StillComputingError
from edge_dlf.system.workers import Connection

END, XS = 256, 257
"""The token that ends, and one of 40 x."""
PIECES = [*(bytes([byte]) for byte in range(256)), b"", b"x" * 40]

AMBIGUOUS = 'root ::= s\ns ::= s s | "x" | s s s | ""'
DEAD_ENDS = {
    "a property that a pattern names again": (
        {
            "type": "object",
            "properties": {"a": {"type": "integer"}},
            "required": ["a"],
            "additionalProperties": False,
            "patternProperties": {"^a$": {"type": "integer"}},
        },
        '{"a":1, ',
    ),
    "a reference to itself": ({"$ref": "#"}, ""),
    "two references to each other": (
        {"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}},
        "",
    ),
    "all of itself": ({"allOf": [{"$ref": "#"}]}, ""),
}
CRASHES = {
    "a chain of 20,000 rules": "\n".join(f'a{n} ::= "x" a{n + 1}? "y"' for n in range(20_000))
    + '\na20000 ::= "z"\nroot ::= a0',
    "groups in a row behind a comment": "#" + ")" * 9000 + "\nroot ::= " + "(" * 9000 + '"a" "b"' + ")?" * 9000,
}


@pytest.fixture(scope="module")
def forms() -> Iterator[Forms]:
    forms = Forms(PIECES, [END])
    yield forms
    forms.close()


def written(
    form: Constraint, choose: Callable[[list[int]], int], n_most: int = 300, patience_s: float | None = 0
) -> str:
    """The text of an answer that `choose` picks from what the form allows, however often it has to be asked."""
    tokens: list[int] = []
    while len(tokens) < n_most:
        token = choose([])
        while True:
            try:
                banned = form.banned([], token, patience_s)
                break
            except StillComputingError:
                assert form.is_computing(60) is False
        if banned is not None:
            token = choose(sorted({*range(len(PIECES))} - {*banned.tolist()}))
        form.accept(token)
        if token == END:
            return b"".join(PIECES[token] for token in tokens).decode()
        tokens.append(token)
    raise AssertionError(tokens)


def chooser(seed: int) -> Callable[[list[int]], int]:
    """Any token, those first that end something."""
    generator = random.Random(seed)
    last = [END, *b'}"]\n0 ']

    def choose(allowed: Sequence[int]) -> int:
        if not allowed:
            return generator.randrange(256)
        return next((token for token in last if token in allowed and generator.random() < 0.8), allowed[-1])

    return choose


def take(form: Form, text: str) -> None:
    for byte in text.encode():
        assert form.banned([], byte, None) is None
        form.accept(byte)


@pytest.mark.parametrize("name", DEAD_ENDS)
def test_a_schema_that_cannot_go_on_is_an_error_not_an_end(forms: Forms, name: str) -> None:
    schema, beginning = DEAD_ENDS[name]
    form = forms.schema(schema)
    take(form, beginning)
    for token in (END, ord("x")):
        with pytest.raises(
            InvalidParameterError, match="JSON schema cannot be kept to: the answer has come to where no"
        ):
            form.banned([], token, None)


def test_an_answer_that_cannot_go_on_is_an_error_of_its_request(tiny: object) -> None:
    with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1, n_parallel=2) as llm:
        rows = [
            {"prompt": "Say: ", "max_tokens": 40, "response_format": {"type": "json_object", "schema": {"$ref": "#"}}},
            {"prompt": "Say: ", "max_tokens": 4, "grammar": 'root ::= "ab"'},
        ]
        bad, good = sorted(llm.batch(rows), key=lambda row: row["custom_id"])
        assert bad["error"]["code"] == "invalid_request"
        assert "no token may follow" in bad["error"]["message"]
        assert good["response"]["body"]["choices"][0] | {"logprobs": None} == {
            "text": "ab", "index": 0, "logprobs": None, "finish_reason": "stop"
        }  # fmt: skip


@pytest.mark.parametrize("name", CRASHES)
def test_a_grammar_that_overflows_a_stack_is_refused(forms: Forms, name: str) -> None:
    with pytest.raises(InvalidParameterError, match="nested too deeply, or takes more than 2 s"):
        forms.grammar(CRASHES[name])
    take(forms.grammar('root ::= "ab"'), "ab")


def test_a_schema_that_overflows_a_stack_is_refused(forms: Forms) -> None:
    defs = {f"r{n}": {"$ref": f"#/$defs/r{n + 1}"} for n in range(20_000)}
    with pytest.raises(InvalidParameterError, match="nested too deeply, or takes more than 2 s"):
        forms.schema({"$ref": "#/$defs/r0", "$defs": {**defs, "r20000": {"type": "null"}}})
    deep: dict[str, object] = {"type": "null"}
    for _ in range(200):
        deep = {"type": "array", "items": deep}
    with pytest.raises(InvalidParameterError, match="recursion limit exceeded"):
        forms.schema(deep)


def test_a_token_that_computes_for_long_is_an_error_and_keeps_nobody_waiting(forms: Forms) -> None:
    form, other = forms.grammar(AMBIGUOUS), forms.grammar('root ::= "ab"')
    with pytest.raises(InvalidParameterError, match="takes more than 1 s|items"):  # noqa: PT012
        while True:
            try:
                form.banned([XS] * 30, XS, 0)
            except StillComputingError:
                take(other, "")
                assert form.is_computing(60) is False
            form.accept(XS)


def test_a_form_that_explodes_ends_alone(forms: Forms) -> None:
    schemas = [{"type": "string", "pattern": f"^(({letter}{{0,90}}){{0,90}}){{0,90}}$"} for letter in "ab"]
    with pytest.raises(InvalidParameterError, match="cannot be kept to|cannot be used"):  # noqa: PT012
        form = forms.schema({"anyOf": schemas})
        for letter in b'"' + b"a" * 1000:
            form.banned([], letter, None)
            form.accept(letter)
    take(forms.grammar('root ::= "ab"'), "ab")


@pytest.mark.parametrize("seed", range(4))
def test_asking_again_and_again_comes_to_the_same_answer(forms: Forms, seed: int) -> None:
    """A form that is given no time at all answers a little later."""
    schema = {"type": "array", "items": {"enum": ["red", "green", 3, None]}, "minItems": 2, "maxItems": 4}
    texts = {written(forms.schema(schema), chooser(seed), patience_s=patience_s) for patience_s in (0, None)}
    assert len(texts) == 1
    assert 2 <= len(json.loads(texts.pop())) <= 4


def test_questions_ahead_of_the_answer_leave_it_where_it_is(forms: Forms) -> None:
    form = forms.grammar('root ::= "abc" | "axy"')
    a, b, c, x = b"abcx"
    assert form.banned([a, b], c, None) is None
    assert form.banned([a, b], x, None) is not None
    assert form.banned([a], x, None) is None
    assert form.banned([b], x, None) is None
    form.accept(a)
    assert form.banned([], b, None) is None
    banned = form.banned([], c, None)
    assert banned is not None
    assert {*range(len(PIECES))} - {*banned.tolist()} == {b, x}


def test_calls_of_tools_keep_to_their_schemas(forms: Forms) -> None:
    parameters = {
        "type": "object",
        "properties": {"x": {"enum": [1, 2]}},
        "required": ["x"],
        "additionalProperties": False,
    }
    tools = read_tools([{"type": "function", "function": {"name": "f", "parameters": parameters}}], "required", False)
    assert tools
    text = written(forms.calls(call_grammar(Dialect(calls=HERMES), tools, None, {})), chooser(1))
    found = HERMES.read(text.removeprefix(HERMES.opens), tools.callable)
    assert text.startswith(HERMES.opens)
    assert found


@pytest.mark.parametrize("patience_s", [0, None])
def test_what_follows_thinking_keeps_to_its_form(forms: Forms, patience_s: float | None) -> None:
    tags = ThinkingTags(b"<t>", b"</t>", tuple(b"</t>"))
    inner = forms.schema({"type": "array", "items": {"enum": [7]}, "minItems": 1, "maxItems": 1})
    form = AfterThinking(
        tags, lambda token: PIECES[token] or b"<end>", END.__eq__, len(PIECES), is_thinking=True, budget=5, inner=inner
    )  # fmt: skip
    thoughts = itertools.cycle(b"<")
    text = written(
        form,
        lambda allowed: next((t for t in (*b"7]", END) if t in allowed), (allowed or [next(thoughts)])[0]),
        patience_s=patience_s,
    )
    thought, closes, answer = text.partition("</t>")
    assert thought == "<<<<<"
    assert closes
    assert json.loads(answer) == [7]


def test_every_form_can_be_ended_at_once_and_later_ones_are_kept_to(forms: Forms) -> None:
    form = forms.grammar('root ::= "ab"')
    take(form, "a")
    forms.end()
    forms.end()
    with pytest.raises(RequestInterruptedError):
        form.banned([], ord("b"), None)
    take(forms.grammar('root ::= "ab"'), "ab")


@pytest.mark.parametrize("end", [Forms.end, Forms.close])
def test_a_form_that_is_ended_while_it_is_needed_is_an_interrupted_request(
    end: Callable[[Forms], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    forms, receive = Forms([*(bytes([byte]) for byte in range(256)), b""], [256]), Connection.receive

    def ended_meanwhile(connection: Connection) -> bytes:
        end(forms)
        return receive(connection)

    form = forms.grammar('root ::= "ab"')
    with monkeypatch.context() as patch:
        patch.setattr(Connection, "receive", ended_meanwhile)
        with pytest.raises(RequestInterruptedError, match="the request was interrupted"):
            forms.grammar('root ::= "cd"')
    with pytest.raises(RequestInterruptedError, match="the request was interrupted"):
        form.banned([97], 98, None)
    forms.close()


class TestManyAnswersOfOneForm:
    """A form is read once for all answers that keep to it at a time."""

    @pytest.fixture
    def reads(self, forms: Forms, monkeypatch: pytest.MonkeyPatch) -> list[Connection]:
        readers, worker = [], forms._workers.worker
        monkeypatch.setattr(forms._workers, "worker", lambda: readers.append(worker()) or readers[-1])
        return readers

    def test_it_is_read_once_and_each_has_a_state_of_its_own(self, forms: Forms, reads: list[Connection]) -> None:
        first = forms.grammar('root ::= "ab" | "cd"')
        first.accept(ord("a"))
        assert first.banned([], ord("b"), None) is None
        others = [forms.grammar('root ::= "ab" | "cd"') for _ in range(20)]
        assert len(reads) == 1
        del first
        for form in others:
            take(form, "cd")
        forms.schema({"const": 1})
        forms.grammar('root ::= "ab"')
        assert len(reads) == 3

    def test_one_that_was_killed_is_read_again(self, forms: Forms, reads: list[Connection]) -> None:
        form = forms.grammar('root ::= "ab"')
        with socket.socket(fileno=os.dup(reads[0]._fd)) as end:
            end.shutdown(socket.SHUT_RDWR)
        take(forms.grammar('root ::= "ab"'), "ab")
        assert len(reads) == 2
        take(form, "ab")


def test_settings_of_llguidance_cannot_make_what_is_no_json(forms: Forms) -> None:
    with pytest.raises(InvalidParameterError, match="x-guidance"):
        forms.schema({"type": "array", "x-guidance": {"item_separator": ";"}})


@pytest.mark.parametrize(
    ("bounds", "allowed", "refused"),
    [
        ({"minimum": 2**53 + 1}, 2**53 + 2, 2**53),
        ({"maximum": 2**60 + 1}, 2**60, 2**60 + 2),
        ({"minimum": -(2**63), "maximum": 2**63 - 1}, -(2**63) + 1024, -(2**63) - 1),
        ({"minimum": -(10**400), "exclusiveMaximum": 10**400}, 2**62, 2**63),
        ({"exclusiveMinimum": -(2**63)}, -(2**62), -(2**63)),
    ],
)
def test_bounds_beyond_doubles_are_kept_to(forms: Forms, bounds: dict[str, int], allowed: int, refused: int) -> None:
    schema = {"type": "object", "properties": {"const": {"type": "integer", **bounds}}, "required": ["const"]}
    take(forms.schema(schema), f'{{"const":{allowed}}}')
    with pytest.raises(AssertionError):
        take(forms.schema(schema), f'{{"const":{refused}}}')


@pytest.mark.parametrize("name", ["properties", "items", "const", "minimum"])
def test_a_schema_that_python_nests_too_deeply(forms: Forms, name: str) -> None:
    schema: dict[str, object] = {}
    for _ in range(100_000):
        schema = {name: schema}
    with pytest.raises(InvalidParameterError, match="nested too deeply"):
        forms.schema(schema)
    tools = read_tools([{"type": "function", "function": {"name": "f", "strict": True, "parameters": schema}}])
    assert tools
    with pytest.raises(InvalidParameterError, match="nested too deeply"):
        call_grammar(Dialect(calls=HERMES), tools, None, {})
    while schema:
        schema = schema.pop(name)  # one after the other: Python ends the process where it drops them all at once


@pytest.mark.parametrize(
    "schema",
    [
        {"const": 2**53 + 1}, {"enum": [1, {"a": [-(2**63)]}]}, {"minimum": 2**63}, {"exclusiveMaximum": -(10**30)},
        {"anyOf": [{"properties": {"id": {"enum": [1234567890123456789]}}}]},
    ],
    ids=str,
)  # fmt: skip
def test_numbers_that_would_be_others_are_refused(forms: Forms, schema: dict[str, object]) -> None:
    with pytest.raises(InvalidParameterError, match="64 bits|beyond 2"):
        forms.schema(schema)


def test_the_process_that_forks_is_started_again(forms: Forms) -> None:
    forms.grammar('root ::= "ab"')
    process = forms._workers._process
    assert process is not None
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    take(forms.grammar('root ::= "ab"'), "ab")


@pytest.mark.parametrize("name", ["socket.socketpair", "subprocess.Popen"])
def test_a_system_without_room_for_a_process_is_told(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    forms = Forms(PIECES, [END])
    with monkeypatch.context() as patch:
        patch.setattr(name, full)
        with pytest.raises(EdgeDLFError, match="no process can be started: too many open files"):
            forms.grammar('root ::= "ab"')
    take(forms.grammar('root ::= "ab"'), "ab")
    forms.close()


def test_ctrl_c_while_the_process_is_started_leaves_no_half_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    forms = Forms(PIECES, [END])

    def interrupted(connection: Connection, *messages: bytes) -> None:
        os.write(connection._fd, b"half")
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "send", interrupted)
        with pytest.raises(KeyboardInterrupt):
            forms.grammar('root ::= "ab"')
    take(forms.grammar('root ::= "ab"'), "ab")
    forms.close()


def test_a_forked_child_has_forms_of_its_own(forms: Forms) -> None:
    take(forms.grammar('root ::= "ab"'), "ab")
    child = multiprocessing.get_context("fork").Process(target=lambda: take(forms.grammar('root ::= "cd"'), "cd"))
    child.start()
    child.join(60)
    assert child.exitcode == 0
    take(forms.grammar('root ::= "ab"'), "ab")


def test_an_answer_that_is_dropped_ends_its_process(forms: Forms) -> None:
    form = forms.grammar('root ::= "ab"')
    with socket.socket(fileno=os.dup(form._worker._fd)) as end:
        end.settimeout(60)
        del form
        end.shutdown(socket.SHUT_WR)  # what this test holds open itself
        assert end.recv(1) == b""
