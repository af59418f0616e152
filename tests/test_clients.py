"""Programs that speak OpenAI's API, unchanged, and requests that nobody would write by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import openai
import pytest

from edge_dlf import FusedLlama
from edge_dlf.server import Rules

from .http_server import Served, serving
from .test_structured import SCHEMAS
from .tiny import CHATML, tiny_model

HELLO: list[Any] = [{"role": "user", "content": "Hello"}]
FORM: Any = {"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": SCHEMAS["object"]}}


@pytest.fixture(scope="module")
def server(tiny: Path) -> Iterator[Served]:
    rules = Rules({"max_tokens": 200}, api_key="s3cret")
    with FusedLlama.from_family(tiny, n_ctx=512, n_threads=1, n_parallel=4) as llm, serving(llm, rules) as server:
        yield server


@pytest.fixture(scope="module")
def client(server: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(
        base_url=f"{server.base_url}/v1".replace("//v1", "/v1"), api_key="s3cret", max_retries=0
    ) as client:
        yield client


def test_openai_s_client_chats_and_streams(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()][:2] == ["tiny", "tiny:static"]
    ask: dict[str, Any] = {"model": "tiny", "messages": HELLO, "max_completion_tokens": 6, "n": 2, "seed": 3}
    answer = client.chat.completions.create(**ask, logprobs=True, top_logprobs=2)
    assert answer.usage
    assert answer.usage.completion_tokens == 12
    assert answer.choices[0].logprobs
    assert len(answer.choices[0].logprobs.content or []) == 6
    texts = ["", ""]
    usage = None
    for chunk in client.chat.completions.create(**ask, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
        usage = chunk.usage or usage
    assert texts == [choice.message.content for choice in answer.choices]
    assert usage
    assert usage.total_tokens == answer.usage.total_tokens
    completion = client.completions.create(model="tiny:large", prompt=["One", "Two"], max_tokens=3)
    assert [choice.index for choice in completion.choices] == [0, 1]


def test_openai_s_client_gets_json_of_a_schema(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="tiny", messages=HELLO, response_format=FORM, temperature=0.9, seed=2,
        extra_body={"edge_dlf": {"method": "static", "alpha": 0.5}},
    )  # fmt: skip
    jsonschema.validate(json.loads(answer.choices[0].message.content or ""), SCHEMAS["object"])


def test_openai_s_client_raises_its_own_errors(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="does not exist"):
        client.chat.completions.create(model="gpt-5", messages=HELLO)
    with pytest.raises(openai.BadRequestError, match="more than the context") as caught:
        client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "x" * 5000}])
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.AuthenticationError):
        client.with_options(api_key="wrong").chat.completions.create(model="tiny", messages=HELLO)


def test_langchain_s_adapter_chats_streams_and_gets_json(server: Served) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="needs langchain-openai")
    chat = langchain.ChatOpenAI(
        model="tiny", base_url=f"{server.base_url}".rstrip("/") + "/v1", api_key="s3cret", max_tokens=200, seed=2,
        temperature=0.9, max_retries=0,
    )  # fmt: skip
    whole = chat.invoke("Hello", max_tokens=5)
    assert whole.usage_metadata["output_tokens"] == 5
    assert "".join(part.content for part in chat.stream("Hello", max_tokens=5)) == whole.content
    schema = {"title": "Person", **SCHEMAS["object"]}
    person = chat.with_structured_output(schema, method="json_schema").invoke("Who?")
    jsonschema.validate(person, SCHEMAS["object"])
    with pytest.raises(openai.BadRequestError):
        chat.invoke("x" * 5000)


@pytest.fixture(scope="module")
def calling(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[str]:
    """Base URL of a server whose model knows tools, and thinks, by its chat template."""
    turns = CHATML.replace("message['content']", "message['content'] ~ (message.tool_calls | default('') | string)")
    source = turns + "{% if tools %}{{ tools | tojson }}{% endif %}<think>\n{# </think> <tool_call> role tool #}"
    large = tiny_model(tmp_path_factory.mktemp("calling") / "large.gguf", seed=1, n_embd=64, chat_template=source)
    rules = Rules({"max_tokens": 200, "think_budget": 3})
    experts = {"lora": tiny / "lora.gguf"}
    with FusedLlama(large, tiny / "base.gguf", experts, n_ctx=512, n_threads=1) as llm, serving(llm, rules) as server:
        yield f"{server.base_url}".rstrip("/") + "/v1"


WEATHER: Any = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 5}},
    "required": ["city"],
    "additionalProperties": False,
}
TOOL: Any = {"type": "function", "function": {"name": "weather", "description": "Weather", "parameters": WEATHER}}


def test_openai_s_client_calls_tools_and_sends_results(calling: str) -> None:
    with openai.OpenAI(base_url=calling, api_key="none", max_retries=0) as client:
        model = client.models.list().data[0].id
        ask: dict[str, Any] = {"model": model, "tools": [TOOL], "parallel_tool_calls": False, "seed": 3}
        answer = client.chat.completions.create(**ask, messages=HELLO, tool_choice="required")
        (choice,) = answer.choices
        (call,) = choice.message.tool_calls or []
        assert isinstance(call, openai.types.chat.ChatCompletionMessageFunctionToolCall)
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None
        assert choice.message.model_extra
        thought = choice.message.model_extra["reasoning_content"]
        assert answer.usage
        assert answer.usage.completion_tokens_details
        assert answer.usage.completion_tokens_details.reasoning_tokens
        jsonschema.validate(json.loads(call.function.arguments), WEATHER)
        with client.chat.completions.stream(**ask, messages=HELLO, tool_choice="required") as events:
            streamed = events.get_final_completion().choices[0]
        (same,) = streamed.message.tool_calls or []
        assert same.function.arguments == call.function.arguments
        assert (streamed.message.model_extra or {})["reasoning_content"] == thought
        result = {"role": "tool", "tool_call_id": call.id, "content": "cold"}
        told = client.chat.completions.create(**ask, messages=[*HELLO, choice.message, result], max_tokens=20)
        assert told.usage
        assert told.usage.prompt_tokens > answer.usage.prompt_tokens


def test_langchain_s_adapter_binds_tools(calling: str) -> None:
    langchain = pytest.importorskip("langchain_openai", reason="needs langchain-openai")
    name = openai.OpenAI(base_url=calling, api_key="none").models.list().data[0].id
    chat = langchain.ChatOpenAI(model=name, base_url=calling, api_key="none", seed=3, max_retries=0)
    bound = chat.bind_tools([TOOL], tool_choice="required", strict=True, parallel_tool_calls=False)
    (call,) = bound.invoke("Hello").tool_calls
    assert call["name"] == "weather"
    jsonschema.validate(call["args"], WEATHER)


@pytest.mark.exhaustive
def test_no_request_that_schemathesis_makes_up_is_a_500(server: Served, tmp_path: Path) -> None:
    pytest.importorskip("schemathesis", reason="needs schemathesis")
    url = f"{server.base_url}".rstrip("/")
    done = subprocess.run(
        [
            Path(sys.executable).with_name("schemathesis"), "run", f"{url}/openapi.json", "--url", url, "-n", "40",
            "-H", "Authorization: Bearer s3cret", "--checks", "not_a_server_error,response_schema_conformance",
            "--seed", "1", "--request-timeout", "120",
        ],
        capture_output=True, text=True, check=False, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
