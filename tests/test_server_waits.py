"""No request keeps others waiting: not while its body is read, not while it is prepared, and not by its form."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from edge_dlf import FusedLlama
from edge_dlf.answers.forms import Form
from edge_dlf.answers.template import ChatTemplate
from edge_dlf.engine.constraint import StillComputingError
from edge_dlf.server import Rules

pytest.importorskip("uvicorn")

from edge_dlf.server.calls import Call

from .http_server import Served, serving

CHAT = "/v1/chat/completions"
QUICK = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[FusedLlama]:
    with FusedLlama.from_family(tiny, n_ctx=256, n_threads=1, n_parallel=4) as llm:
        yield llm


@pytest.fixture
def server(llm: FusedLlama) -> Iterator[Served]:
    with serving(llm, Rules(n_waiting=8)) as client:
        yield client


class Gate:
    """Holds calls of a function that are about the text "held", until it is opened."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function
        self.is_reached, self.is_open = threading.Event(), threading.Event()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if "held" in str(args)[-400_000:]:
            self.is_reached.set()
            assert self.is_open.wait(60)
        return self.function(*args, **kwargs)


def others_are_answered_beside(server: Served, gate: Gate, body: dict[str, Any], n: int = 3) -> None:
    with ThreadPoolExecutor(n) as pool:
        held = [pool.submit(server.post, CHAT, json=body) for _ in range(n)]
        try:
            assert gate.is_reached.wait(60)
            for _ in range(5):
                assert server.post(CHAT, json=QUICK).status_code == 200
            assert not any(each.done() for each in held)
        finally:
            gate.is_open.set()
        assert {each.result().status_code for each in held} == {200}


def test_a_prompt_is_made_once_for_all_its_choices(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 choices of a long conversation, the others would wait 80 times for the one template."""
    n_made = []
    make = ChatTemplate.prompt

    def counted(self: ChatTemplate, *arguments: Any) -> Any:
        n_made.append(1)
        return make(self, *arguments)

    monkeypatch.setattr(ChatTemplate, "prompt", counted)
    body = {**QUICK, "seed": 5, "temperature": 2, "top_k": 0, "min_p": 0, "chat_template_kwargs": {"a": "b"}}
    several = server.post(CHAT, json={**body, "n": 6}).json()
    assert len(n_made) == 1
    one = server.post(CHAT, json={**body, "seed": 8}).json()
    assert several["choices"][3]["message"] == one["choices"][0]["message"]
    assert several["usage"]["prompt_tokens"] == one["usage"]["prompt_tokens"]
    assert len({choice["message"]["content"] for choice in several["choices"]}) > 1


def test_while_a_request_is_prepared(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(server.llm.prepare)
    monkeypatch.setattr(server.llm, "prepare", gate)
    others_are_answered_beside(server, gate, {**QUICK, "messages": [{"role": "user", "content": "held"}]})


def test_while_a_long_body_is_read(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(Call.parse)
    monkeypatch.setattr(Call, "parse", gate)
    others_are_answered_beside(server, gate, {**QUICK, "user": "held" * 50_000})


def test_while_a_form_computes(server: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    freed, reached = threading.Event(), threading.Event()
    banned, is_computing = Form.banned, Form.is_computing

    def computes(self: Form, ahead: Any, token: int, patience_s: float | None) -> Any:
        if freed.is_set() or "grammar" not in self._kind:
            return banned(self, ahead, token, patience_s)
        reached.set()
        raise StillComputingError

    def is_stuck(self: Form, patience_s: float) -> bool:
        return is_computing(self, patience_s) if freed.is_set() else "grammar" in self._kind and reached.is_set()

    monkeypatch.setattr(Form, "banned", computes)
    monkeypatch.setattr(Form, "is_computing", is_stuck)
    schema = {"type": "json_object", "schema": {"enum": [7]}}
    with ThreadPoolExecutor(1) as pool:
        stuck = pool.submit(server.post, CHAT, json={**QUICK, "grammar": 'root ::= "ab"'})
        assert reached.wait(60)
        for form in ({}, {"response_format": schema}, {"response_format": schema, "stream": True}):
            assert server.post(CHAT, json={**QUICK, **form}).status_code == 200
        assert not stuck.done()
        freed.set()
        assert stuck.result().json()["choices"][0]["message"]["content"] == "ab"


def test_a_form_that_computes_for_ever_ends_with_the_time_of_its_answer(
    llm: FusedLlama, monkeypatch: pytest.MonkeyPatch
) -> None:
    def computes(self: Form, ahead: Any, token: int, patience_s: float | None) -> Any:
        raise StillComputingError

    monkeypatch.setattr(Form, "banned", computes)
    with serving(llm, Rules(timeout_s=0.2)) as server:
        assert server.post(CHAT, json={**QUICK, "grammar": 'root ::= "ab"'}).status_code == 504
        assert server.post(CHAT, json=QUICK).status_code == 200
    assert llm.driver.n_active == 0


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    ("form", "complaint"),
    [
        ({"grammar": "root ::= ("}, "a ( without its )"),
        ({"grammar": "root ::= " + "(" * 9000 + '"a" "b"' + ")?" * 9000}, "nested too deeply"),
        ({"response_format": {"type": "json_object", "schema": {"enum": []}}}, "Unsatisfiable"),
    ],
    ids=["broken", "deep", "empty"],
)
def test_a_form_that_cannot_be_used_is_refused_before_the_answer(
    server: Served, form: dict[str, Any], complaint: str, stream: bool
) -> None:
    response = server.post(CHAT, json={**QUICK, **form, "stream": stream})
    assert response.status_code == 400
    assert complaint in response.json()["error"]["message"]


def test_a_dead_end_is_an_error_of_a_stream_not_its_end(server: Served) -> None:
    schema = {"type": "json_object", "schema": {"$ref": "#"}}
    response = server.post(CHAT, json={**QUICK, "response_format": schema, "stream": True})
    assert "no token may follow" in response.text
    assert '"finish_reason":"stop"' not in response.text
    assert server.post(CHAT, json={**QUICK, "response_format": schema}).status_code == 400
