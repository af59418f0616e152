"""The server: answers equal to the library's, clients that come and go, and what it refuses."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import jsonschema
import pytest

from edge_dlf import FusedLlama, NonFiniteLogitsError
from edge_dlf.server import Rules

from .http_server import Served, serving
from .tiny import tiny_model, weighted_family

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
HELLO = [{"role": "user", "content": "Hello"}]
CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
LONG = {"messages": HELLO, "max_tokens": 1500, "logit_bias": {"305": -100, "303": -100}}  # never ends by itself


def load(tiny: Path) -> FusedLlama:
    return FusedLlama.from_family(tiny, n_ctx=2048, n_threads=1, n_parallel=4)


@pytest.fixture(scope="module")
def llm(tiny: Path) -> Iterator[FusedLlama]:
    with load(tiny) as llm:
        yield llm


@pytest.fixture(scope="module")
def library(tiny: Path) -> Iterator[FusedLlama]:
    """As the server's, used directly."""
    with load(tiny) as llm:
        yield llm


@pytest.fixture(scope="module")
def server(llm: FusedLlama) -> Iterator[Served]:
    with serving(llm, Rules(n_waiting=30)) as client:
        yield client


def events(response: httpx.Response) -> list[Any]:
    """What the server sent of a stream, parsed but for its last line."""
    lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
    return [json.loads(line) if line != "[DONE]" else line for line in lines]


def deltas(sent: list[Any], index: int = 0) -> str:
    chosen = [choice for event in sent[:-1] for choice in event["choices"] if choice["index"] == index]
    return "".join(choice["delta"].get("content", "") for choice in chosen)


def until_idle(server: Served) -> None:
    """Ask until nothing is decoded any more."""
    for _ in range(5000):
        if not server.llm.driver.n_active and not server.llm.driver.n_waiting:
            return
        server.get("/health")
    raise AssertionError("answers of clients that left are still decoded")


@pytest.mark.parametrize("model", ["tiny", "tiny:static", "tiny:blend", "tiny:large", "tiny:lora", "tiny:tuned"])
def test_an_answer_equals_that_of_the_library(library: FusedLlama, server: Served, model: str) -> None:
    method = model.partition(":")[2] or "dynamic"
    settings = {"max_tokens": 12, "temperature": 0.9, "seed": 4, "logprobs": True, "top_logprobs": 2}
    expected = library.create_chat_completion(HELLO, method=method, **settings)
    body = server.post(CHAT, json={"model": model, "messages": HELLO, **settings}).raise_for_status().json()
    text, own = body["choices"][0]["message"]["content"], expected["choices"][0]["message"]["content"]
    assert text == own
    assert body["choices"][0]["finish_reason"] == expected["choices"][0]["finish_reason"]
    chosen = [[entry["token"] for entry in choice["logprobs"]["content"]] for choice in body["choices"]]
    assert chosen == [[entry["token"] for entry in expected["choices"][0]["logprobs"]["content"]]]
    assert body["model"] == model
    assert body["usage"].items() >= expected["usage"].items()
    assert body["edge_dlf"]["method"] == method


def test_a_stream_gives_the_same_answer(server: Served) -> None:
    body = {"messages": HELLO, "max_tokens": 9, "n": 2, "temperature": 1.0, "seed": 7}
    whole = server.post(CHAT, json=body).json()
    response = server.post(CHAT, json={**body, "stream": True, "stream_options": {"include_usage": True}})
    assert response.headers["content-type"].startswith("text/event-stream")
    sent = events(response)
    assert [deltas(sent, index) for index in (0, 1)] == [each["message"]["content"] for each in whole["choices"]]
    assert whole["choices"][0]["message"] != whole["choices"][1]["message"]
    assert sent[-1] == "[DONE]"
    assert sent[-2]["choices"] == []
    assert sent[-2]["usage"]["completion_tokens"] == whole["usage"]["completion_tokens"]
    assert all(event["usage"] is None for event in sent[:-2])
    assert {event["id"] for event in sent[:-1]} == {sent[0]["id"]}


def test_usage_is_sent_only_if_asked_for_and_alpha_too(server: Served) -> None:
    body = {"messages": HELLO, "max_tokens": 3, "stream": True}
    plain = events(server.post(CHAT, json=body))
    assert not any("usage" in event for event in plain[:-1])
    assert [("edge_dlf" in event) for event in plain[:-1]] == [False, False, False, False, True]
    traced = events(server.post(CHAT, json={**body, "edge_dlf": {"trace": True}}))
    assert {"alpha", "expert", "from_draft", "logprob", "changed", "large"} == set(traced[1]["edge_dlf"])
    whole = server.post(CHAT, json={"messages": HELLO, "max_tokens": 3, "edge_dlf": {"trace": True}}).json()
    (tokens,) = whole["edge_dlf"]["trace"]
    assert "".join(token["text"] for token in tokens) == whole["choices"][0]["message"]["content"]
    assert [token["alpha"] for token in tokens] == [event["edge_dlf"]["alpha"] for event in traced[1:4]]
    expected = server.llm.create_chat_completion(HELLO, max_tokens=3, trace=True)["edge_dlf"]["trace"]["tokens"]
    assert [token["large"]["choice"] for token in tokens] == [own["members"]["large"]["name"] for own in expected]
    for token, own in zip(tokens, expected, strict=True):
        alone = {id: logprob for id, _, logprob in own["members"]["large"]["top"]}
        assert token["changed"] == own["changed"]
        assert token["logprob"] == pytest.approx(own["logprob"], abs=1e-4)
        assert token["large"]["logprob"] == pytest.approx(alone.get(own["id"]), abs=1e-4)


def test_no_large_model_is_told_of_where_none_takes_part(server: Served) -> None:
    fusion = {"trace": True, "method": "weighted", "weights": {"lora": 1.0}}
    answer = server.post(CHAT, json={"messages": HELLO, "max_tokens": 1, "edge_dlf": fusion}).json()
    assert [token["large"] for (token,) in answer["edge_dlf"]["trace"]] == [None]


def test_settings_of_the_fusion_go_before_the_model_s(server: Served) -> None:
    fusion = {"method": "static", "alpha": {"lora": 0.5, "tuned": 0.25}}
    body = {"model": "tiny:large", "messages": HELLO, "max_tokens": 3, "edge_dlf": fusion}
    answer = server.post(CHAT, json=body).json()
    assert answer["edge_dlf"]["method"] == "static"
    assert answer["edge_dlf"]["alpha_mean"] == 0.5


def test_several_prompts_give_choices_in_their_order(server: Served, library: FusedLlama) -> None:
    prompts = ["One", "Two and", "Three"]
    answer = server.post(COMPLETIONS, json={"prompt": prompts, "max_tokens": 4, "n": 2, "stop": ["\0"]}).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3, 4, 5]
    singles = [library.create_completion(prompt, max_tokens=4)["choices"][0]["text"] for prompt in prompts]
    assert [choice["text"] for choice in answer["choices"]] == [text for text in singles for _ in range(2)]
    assert answer["usage"]["prompt_tokens"] == sum(len(library.tokenize(prompt)) for prompt in prompts)
    ids = [library.tokenize(prompt) for prompt in prompts]
    again = server.post(COMPLETIONS, json={"prompt": ids, "max_tokens": 4}).json()
    assert [choice["text"] for choice in again["choices"]] == singles


def test_many_clients_at_once_get_what_each_gets_alone(server: Served, library: FusedLlama) -> None:
    prompts = [f"The number {n} is" for n in range(12)]
    with ThreadPoolExecutor(12) as clients:
        posts = [clients.submit(server.post, COMPLETIONS, json={"prompt": p, "max_tokens": 12}) for p in prompts]
        texts = [post.result().raise_for_status().json()["choices"][0]["text"] for post in posts]
    singles = [library.create_completion(prompt, max_tokens=12)["choices"][0]["text"] for prompt in prompts]
    n_same = sum(text == single for text, single in zip(texts, singles, strict=True))
    assert n_same >= 11  # of 12: llama.cpp rounds by the shape of a batch, and two choices may tie within that


def test_a_next_turn_evaluates_only_what_is_new(server: Served) -> None:
    talks = {n: [{"role": "user", "content": f"{'What is the matter? ' * 5} {n}"}] for n in range(4)}
    for turn in range(3):
        for talk in talks.values():
            answer = server.post(CHAT, json={"messages": talk, "max_tokens": 5}).json()
            usage = answer["usage"]
            if turn:
                assert usage["prompt_tokens_details"]["cached_tokens"] >= usage["prompt_tokens"] - 40
            # Random weights answer in halves of characters, which do not come back as the tokens that they were.
            talk += [{"role": "assistant", "content": "Well."}, {"role": "user", "content": "And?"}]


def test_a_client_that_leaves_a_stream_takes_its_answer_along(server: Served) -> None:
    for _ in range(3):
        with server.stream("POST", CHAT, json={**LONG, "stream": True, "n": 3}) as response:
            assert next(response.iter_lines())
    until_idle(server)
    assert server.post(CHAT, json={"messages": HELLO, "max_tokens": 3}).status_code == 200


def test_a_client_that_leaves_while_it_waits_takes_its_answer_along(server: Served) -> None:
    body = json.dumps({**LONG, "n": 4}).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    with socket.create_connection((server.base_url.host, server.base_url.port)) as client:
        client.sendall(head.encode() + body)
        while not server.llm.driver.n_active:
            server.get("/health")
    until_idle(server)


def test_a_full_queue_says_when_to_come_again(llm: FusedLlama) -> None:
    with serving(llm, Rules(n_waiting=0)) as server:
        with server.stream("POST", CHAT, json={**LONG, "stream": True, "n": 4}) as response:
            lines = response.iter_lines()  # once it is collected, the connection is closed
            assert next(lines)
            refused = server.post(CHAT, json={"messages": HELLO})
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "overloaded"
            assert 1 <= int(refused.headers["retry-after"]) <= 60
        until_idle(server)
        for _ in range(5000):  # the place is free once the server has seen the client leave
            if (response := server.post(CHAT, json={"messages": HELLO, "max_tokens": 2})).status_code == 200:
                break
        assert response.status_code == 200


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        (CHAT, {}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "model": "gpt-5"}, 404, "model_not_found"),
        (CHAT, {"messages": HELLO, "model": 3}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "temperature": -1}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "temperature": "hot"}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "n": True}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "n": 1000}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "n": 100}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "top_logprobs": 21, "logprobs": True}, 400, "invalid_value"),
        (CHAT, {"messages": [{"role": "user", "content": "x" * 9000}]}, 400, "context_length_exceeded"),
        (CHAT, {"messages": HELLO, "max_tokens": 5000, "stop": ["e"]}, 200, None),
        (CHAT, {"messages": HELLO, "max_tokens": -1, "stop": ["e"], "seed": -1, "top_p": 0, "top_k": -1}, 200, None),
        (CHAT, {"messages": HELLO, "n": 2.0, "max_tokens": 3.0, "modalities": ["text"]}, 200, None),
        (COMPLETIONS, {"prompt": "a", "echo": False, "best_of": 1, "suffix": "", "logprobs": False}, 200, None),
        (COMPLETIONS, {"prompt": "a", "echo": True}, 400, "invalid_value"),
        (COMPLETIONS, {"prompt": "a", "best_of": 2}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "method": "large"}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "edge_dlf": {"method": "nobody"}}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "edge_dlf": {"alpha": {"\ud800": 1}, "method": "static"}}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "edge_dlf": {"alpha_step": 5e-324}}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "logit_bias": {"99999": 1}}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "tools": []}, 200, None),
        (CHAT, {"messages": HELLO, "functions": [{"name": "f"}]}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "stream_options": {"include_usage": True}}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "stream": True, "stream_options": {"nonsense": 1}}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "stream": True, "stream_options": {"include_usage": 1}}, 400, "invalid_value"),
        (CHAT, {"messages": [*HELLO, {"role": "assistant", "content": None, "tool_calls": [CALL]}]}, 200, None),
        (CHAT, {"messages": [{"role": "user", "content": None}]}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "response_format": {"type": "yaml"}}, 400, "invalid_value"),
        (CHAT, {"messages": HELLO, "grammar": "root = x"}, 400, "invalid_value"),
        (COMPLETIONS, {"prompt": [[1, 2], "a"]}, 200, None),
        (COMPLETIONS, {"prompt": []}, 200, None),
        (CHAT, {"messages": [{"role": "developer", "content": "Be kind."}, *HELLO]}, 200, None),
        (CHAT, {"messages": HELLO, "edge_dlf": {"plausibility": 0.1, "alpha": None}, "stop": ["x"]}, 200, None),
        (CHAT, {"messages": HELLO, "model": None, "user": "u", "store": False, "metadata": {}, "n": None}, 200, None),
        (CHAT, {"messages": [{"role": "user", "content": "half a pair: \ud800"}]}, 200, None),
        (COMPLETIONS, {"prompt": [-1]}, 400, "invalid_value"),
        (COMPLETIONS, {"prompt": ["a"] * 200}, 400, "invalid_value"),
    ],
    ids=str,
)
def test_a_body_is_answered_or_refused_in_openai_s_terms(
    server: Served, path: str, body: dict[str, Any], status: int, code: str | None
) -> None:
    body.setdefault("max_tokens", 2)
    response = server.post(path, content=json.dumps(body))
    assert response.status_code == status
    if code is None:
        document = server.get("/openapi.json").json()
        schema = document["paths"][path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        jsonschema.Draft202012Validator({**schema, "components": document["components"]}).validate(body)
        return
    error = response.json()["error"]
    assert error["code"] == code
    assert error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[]", b"null", b'{"seed": NaN}', b"[" * 100_000, b"\xff\xfe", b'{"a": 1' + b"1" * 5000 + b"}"]
)
def test_a_body_that_is_no_json_object_is_refused(server: Served, body: bytes) -> None:
    response = server.post(CHAT, content=body)
    assert (response.status_code, response.json()["error"]["code"]) == (400, "invalid_json")


def test_a_body_that_is_too_long_is_refused(server: Served) -> None:
    response = server.post(CHAT, content=b" " * (9 * 2**20))
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_large")


@pytest.mark.parametrize(
    ("method", "path", "status"), [("GET", "/nothing", 404), ("GET", CHAT, 405), ("GET", "/v1/models/gpt-5", 404)]
)
def test_what_is_not_there_is_an_error_in_openai_s_shape(server: Served, method: str, path: str, status: int) -> None:
    response = server.request(method, path)
    assert response.status_code == status
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


def test_models_are_the_ways_to_fuse(server: Served) -> None:
    names = [model["id"] for model in server.get("/v1/models").json()["data"]]
    assert names == ["tiny", "tiny:static", "tiny:blend", "tiny:large", "tiny:lora", "tiny:tuned"]
    for name in names:
        assert server.get(f"/v1/models/{name}").json()["id"] == name


def test_models_tell_their_numbers_as_requests_may_set_them(tiny: Path, tmp_path: Path) -> None:
    family = weighted_family(tiny, tmp_path, "weighted", large=0.5, tuned=0.7)
    toml = (family / "family.toml").read_text()
    (family / "family.toml").write_text(toml.replace("[large]", 'examples = ["Who?"]\n[large]', 1))
    with FusedLlama.from_family(family, n_ctx=256, n_threads=1) as llm, serving(llm) as server:
        offered = server.get("/v1/models").json()
        models = {model["id"]: model for model in offered["data"]}
        assert offered["edge_dlf"] == {"examples": ["Who?"]}
        assert models["tiny"]["weights"] == {"large": 0.5, "base": 0.0, "lora": 0.0, "tuned": 0.7}
        assert models["tiny:blend"]["weights"] == {"large": 0.5, "base": 0.0, "lora": 0.25, "tuned": 0.25}
        assert models["tiny:static"]["alpha"] == {"lora": 1.0, "tuned": 1.0}
        assert "weights" not in models["tiny:dynamic"]
        assert "alpha" not in models["tiny:large"]


def test_a_family_s_own_method_and_weights_are_on_offer(tiny: Path, library: FusedLlama, tmp_path: Path) -> None:
    family = weighted_family(tiny, tmp_path, "weighted", large=0.5, tuned=0.7)
    with FusedLlama.from_family(family, n_ctx=256, n_threads=1) as llm, serving(llm) as server:
        names = [model["id"] for model in server.get("/v1/models").json()["data"]]
        models = ["", ":dynamic", ":static", ":blend", ":weighted", ":large", ":lora", ":tuned"]
        assert names == [f"tiny{model}" for model in models]
        assert list(llm._ensemble.members) == ["large", "tuned"]
        for model, method in {"tiny": "weighted", "tiny:weighted": "weighted", "tiny:dynamic": "dynamic"}.items():
            body = {"model": model, "messages": HELLO, "max_tokens": 9, "temperature": 0, "seed": 0}
            answer = server.post(CHAT, json=body).raise_for_status().json()
            settings = {"method": method, "weights": {"large": 0.5, "tuned": 0.7}, "max_tokens": 9}
            expected = library.create_chat_completion(HELLO, **settings)
            assert answer["choices"][0]["message"] == expected["choices"][0]["message"]
            assert answer["edge_dlf"]["method"] == method
        assert list(llm._ensemble.members) == ["large", "base", "lora", "tuned"]


def test_weights_are_the_request_s(server: Served) -> None:
    fusion = {"method": "weighted", "weights": {"large": 0.5, "tuned": 0.25}}
    answer = server.post(CHAT, json={"messages": HELLO, "max_tokens": 3, "edge_dlf": fusion}).json()
    assert answer["edge_dlf"]["method"] == "weighted"
    assert answer["edge_dlf"]["expert_share"] == {"tuned": 1.0}
    assert answer["edge_dlf"]["alpha_mean"] == 0.25
    for wrong in ({}, {"weights": {"code": 1}}, {"weights": {"large": 0}}, {"weights": 0.5}):
        body = {"messages": HELLO, "edge_dlf": {"method": "weighted", **wrong}}
        refusal = server.post(CHAT, json=body)
        assert refusal.status_code == 400
        assert "weights" in refusal.json()["error"]["message"]


def test_an_answer_that_takes_too_long_is_ended(llm: FusedLlama) -> None:
    with serving(llm, Rules(timeout_s=0.01)) as server:
        response = server.post(CHAT, json=LONG)
        assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
        sent = events(server.post(CHAT, json={**LONG, "stream": True}))
        assert sent[-1]["error"]["code"] == "timeout"
        until_idle(server)


def test_a_key_opens_all_but_health(llm: FusedLlama) -> None:
    with serving(llm, Rules(api_key="s3cret")) as server:
        body = {"messages": HELLO, "max_tokens": 2}
        right = {"Authorization": "Bearer s3cret"}
        assert server.post(CHAT, json=body, headers=right).status_code == 200
        for wrong in ("", "Bearer", "Bearer secret", "Basic s3cret", "Bearer s3cret2", "Bearer s3cr\u00e9t"):
            response = server.post(CHAT, json=body, headers={"Authorization": wrong.encode()})
            assert (response.status_code, response.json()["error"]["code"]) == (401, "invalid_api_key")
            assert response.headers["www-authenticate"] == "Bearer"
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
                assert server.get(path, headers={"Authorization": wrong.encode()}).status_code == 401
        assert server.get("/health", headers={"Authorization": ""}).json() == {"status": "ok"}


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({}, 200),
        ({"Host": "localhost:1234"}, 200),
        ({"Host": "[::1]:80"}, 200),
        ({"Host": "rebound.example"}, 403),
        ({"Host": "localhost.example:8080"}, 403),
        ({"Host": "localhost", "Origin": "http://localhost"}, 200),
        ({"Host": "localhost", "Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
    ],
    ids=str,
)
def test_pages_of_other_sites_may_not_ask(server: Served, headers: dict[str, str], status: int) -> None:
    assert server.get("/v1/models", headers=headers).status_code == status


def test_metrics_count_what_was_done(llm: FusedLlama) -> None:
    with serving(llm) as server:
        server.post(CHAT, json={"messages": HELLO, "max_tokens": 4, "seed": 1})
        server.get("/v1/models/no")
        text = server.get("/metrics").text
    for line in (
        'edge_dlf_requests_total{path="/v1/chat/completions",status="200"} 1.0',
        'edge_dlf_requests_total{path="other",status="404"} 1.0',
        'edge_dlf_answers_total{finish_reason="length",method="dynamic"} 1.0',
        "edge_dlf_generated_tokens_total 4.0",
        "edge_dlf_time_to_first_token_seconds_count 1.0",
        "edge_dlf_tokens_per_second_count 1.0",
        "edge_dlf_answers_running 0.0",
        'edge_dlf_kv_cells{member="base"} 4096.0',
    ):
        assert line in text.splitlines()
    assert 'edge_dlf_kv_cells_used{member="large"}' in text


def test_nan_in_a_model_ends_one_answer_and_no_other(tmp_path: Path, tiny: Path) -> None:
    broken = tiny_model(tmp_path / "broken.gguf", seed=2, nan=True)
    files = tiny / "large.gguf", tiny / "base.gguf", {"broken": broken}
    with FusedLlama(*files, n_ctx=256, n_parallel=2) as llm, serving(llm) as server:
        response = server.post(CHAT, json={"messages": HELLO, "max_tokens": 4})
        assert response.status_code == 500
        assert response.json()["error"]["code"] == "non_finite_logits"
        assert str(tmp_path) not in response.text
        sent = events(server.post(CHAT, json={"messages": HELLO, "max_tokens": 4, "stream": True}))
        assert sent[-1]["error"]["code"] == "non_finite_logits"
        sound = server.post(CHAT, json={"model": "large:large", "messages": HELLO, "max_tokens": 4})
        assert sound.status_code == 200


def test_a_step_that_fails_is_told_to_those_it_concerns_and_to_nobody_else(
    llm: FusedLlama, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(llm) as server:
        for error in (RuntimeError("/secret/path"), NonFiniteLogitsError("base", "NaN")):
            with monkeypatch.context() as patch:
                patch.setattr(llm.driver.decoder, "step", lambda *_, error=error: (_ for _ in ()).throw(error))
                response = server.post(CHAT, json={"messages": HELLO, "max_tokens": 4})
                assert response.status_code == 500
                assert "/secret/path" not in response.text
            again = server.post(CHAT, json={"messages": HELLO, "max_tokens": 4})
            assert again.status_code == 200
    assert "/secret/path" in caplog.text


def test_memory_of_the_caches_is_free_once_all_have_left(server: Served, llm: FusedLlama) -> None:
    with ThreadPoolExecutor(8) as clients:
        bodies = [{"prompt": f"{n} " * (5 + n), "max_tokens": 3 + n % 7} for n in range(20)]
        list(clients.map(lambda body: server.post(COMPLETIONS, json=body), bodies))
    until_idle(server)
    llm.driver.forget()
    assert [n_used for n_used, _ in llm.driver.cache_usage().values()] == [0] * 4
