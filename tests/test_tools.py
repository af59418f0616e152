"""Tools and thinking on tiny models that know each family's marks: by the library, in batches, by the server."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import jsonschema
import pytest

from edge_dlf import FusedLlama, InvalidParameterError

from .tiny import tiny_lora, tiny_model

LETTERS = {"type": "string", "maxLength": 5}
ARGUMENTS: dict[str, Any] = {
    "type": "object",
    "properties": {"city": LETTERS, "days": {"type": "integer", "minimum": 1, "maximum": 14}},
    "required": ["city"],
    "additionalProperties": False,
}
NOTHING: dict[str, Any] = {"type": "object", "properties": {}, "additionalProperties": False}
SCHEMAS = {"weather": ARGUMENTS, "time": NOTHING}
TOOLS = [{"type": "function", "function": {"name": n, "parameters": schema}} for n, schema in SCHEMAS.items()]
UNKNOWN = {"type": "function", "function": {"name": "x"}}
NO_NAME = {"type": "function", "function": {"name": ["weather"]}}
ASK: list[dict[str, Any]] = [{"role": "user", "content": "Is it cold in Oslo?"}]
_TURNS = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}"
    "{% for call in message.tool_calls %}{{ call.function.name }}{{ call.function.arguments | tojson }}{% endfor %}"
    "<|im_end|>\n{% endfor %}{% if tools %}{{ tools | tojson }}{% endif %}<|im_start|>assistant\n"
)
TEMPLATES = {
    "hermes": _TURNS + "{# <tool_call> #}",
    "qwen3": _TURNS
    + "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}{# <tool_call> #}",
    "deepseek-r1": _TURNS + "<think>\n{# </think> #}",
    "llama3": _TURNS + "{# <|start_header_id|>ipython #}",
    "mistral": _TURNS + "{# [TOOL_CALLS] #}",
    "magistral": _TURNS + "{# [TOOL_CALLS] [ARGS] [THINK] [/THINK] #}",
    "gpt-oss": _TURNS + "{# <|channel|> <|message|> #}",
    "gemma": "{% for message in messages %}<|im_start|>{{ message.content }}<|im_end|>{% endfor %}",
}
CONTROL = (
    "[TOOL_CALLS]", "[ARGS]", "[CALL_ID]", "[THINK]", "[/THINK]", "<|python_tag|>",
    "<|start|>", "<|channel|>", "<|constrain|>", "<|message|>", "<|end|>", "<|call|>", "<|return|>",
)  # fmt: skip


@pytest.fixture(scope="module")
def families(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, FusedLlama]]:
    """A tiny family for each template, loaded when it is asked for."""
    folder = tmp_path_factory.mktemp("tools")
    tiny_model(folder / "base.gguf", seed=2, control=CONTROL)
    tiny_lora(folder / "lora.gguf", seed=3)

    class Families(dict[str, FusedLlama]):
        def __missing__(self, name: str) -> FusedLlama:
            large = folder / f"{name}.gguf"
            tiny_model(large, seed=1, n_embd=64, control=CONTROL, chat_template=TEMPLATES[name])
            self[name] = FusedLlama(
                large, folder / "base.gguf", {"lora": folder / "lora.gguf"}, n_ctx=1024, n_threads=1, n_parallel=4
            )
            return self[name]

    families = Families()
    yield families
    for llm in families.values():
        llm.close()


def chat(llm: FusedLlama, **arguments: Any) -> dict[str, Any]:
    answer = llm.create_chat_completion(ASK, **{"max_tokens": 300, "temperature": 1.0, **arguments})
    assert isinstance(answer, dict)
    return answer


def calls_of(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Calls of an answer, each of which keeps to the schema of its tool."""
    (choice,) = answer["choices"]
    calls = choice["message"].get("tool_calls", [])
    for call in calls:
        jsonschema.validate(json.loads(call["function"]["arguments"]), SCHEMAS[call["function"]["name"]])
    return list(calls)


@pytest.mark.parametrize("family", ["hermes", "llama3", "mistral", "magistral"])
def test_required_calls_parse_and_keep_to_their_schemas(families: dict[str, FusedLlama], family: str) -> None:
    chosen = set()
    for seed in range(12):
        # Random weights that begin to think never end it by themselves.
        budget = {"think_budget": 4} if family == "magistral" else {}
        asked = {"tools": TOOLS, "tool_choice": "required", "parallel_tool_calls": False, "seed": seed}
        answer = chat(families[family], **asked, **budget)
        (call,) = calls_of(answer)
        assert answer["choices"][0]["finish_reason"] == "tool_calls"
        assert answer["choices"][0]["message"]["content"] is None
        chosen.add(call["function"]["name"])
    assert chosen == set(SCHEMAS)


def test_a_named_tool_is_the_one_that_is_called(families: dict[str, FusedLlama]) -> None:
    for name in SCHEMAS:
        choice = {"type": "function", "function": {"name": name}}
        (call,) = calls_of(chat(families["hermes"], tools=TOOLS, tool_choice=choice, seed=1))
        assert call["function"]["name"] == name
        assert call["type"] == "function"
        assert len(call["id"]) == 9
        assert call["id"].isalnum()


@pytest.mark.parametrize("draft", [0, 3])
def test_streams_drafts_and_batches_make_the_same_calls(families: dict[str, FusedLlama], draft: int) -> None:
    llm = families["hermes"]
    asked: dict[str, Any] = {"tools": TOOLS, "tool_choice": "required", "seed": 5, "temperature": 1.0}
    whole = chat(llm, **asked, draft=0)["choices"][0]
    said = [call["function"] for call in whole["message"]["tool_calls"]]
    chunks = list(llm.create_chat_completion(ASK, stream=True, max_tokens=300, draft=draft, **asked))
    deltas = [call for chunk in chunks for call in chunk["choices"][0]["delta"].get("tool_calls", [])]
    assert [call["function"] for call in deltas] == said
    assert [call["index"] for call in deltas] == list(range(len(said)))
    assert chunks[-1]["choices"][0]["finish_reason"] == "tool_calls"
    body = {"messages": ASK, "max_tokens": 300, **asked}
    (row,) = llm.batch([{"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": body}])
    (choice,) = row["response"]["body"]["choices"]
    assert [call["function"] for call in choice["message"]["tool_calls"]] == said


def takes(llm: FusedLlama, text: str, **arguments: Any) -> bool:
    """Whether an answer may be this text, names of control tokens read as these tokens."""
    prompt = llm.apply_chat_template(ASK, **arguments)
    made = llm._preparer.tokenizer.chat_constraint(prompt, None, None, None, llm._members.is_eog)
    assert made
    tokens = llm.tokenize(text)
    return all(made.banned(tokens[:n], token, None) is None for n, token in enumerate(tokens))


STRICT = [{"type": "function", "function": {**tool["function"], "strict": True}} for tool in TOOLS]
CALLS = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>',
    "llama3": '{"name": "weather", "parameters": {"city": "Oslo"}}',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Oslo"}}]',
    "magistral": '[TOOL_CALLS]weather[ARGS]{"city": "Oslo"}',
    "gpt-oss": '<|channel|>commentary to=functions.weather <|constrain|>json<|message|>{"city": "Oslo"}',
}
TEXTS = {
    "gpt-oss": "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant<|channel|>final<|message|>Just text.",
}


@pytest.mark.parametrize("family", CALLS)
def test_each_family_s_calls_are_kept_to_their_schemas(families: dict[str, FusedLlama], family: str) -> None:
    llm, call, text = families[family], CALLS[family], TEXTS.get(family, "Just <text> and {braces}.")
    assert takes(llm, text, tools=STRICT)
    for arguments in ({"tools": STRICT}, {"tools": TOOLS, "tool_choice": "required"}):
        assert takes(llm, call, **arguments)
        assert not takes(llm, call.replace('"Oslo"', "7"), **arguments)
        assert not takes(llm, call.replace("weather", "other"), **arguments)
    assert not takes(llm, text, tools=TOOLS, tool_choice="required")
    if family == "gpt-oss":
        assert takes(llm, text.partition("<|channel|>final")[0] + call, tools=TOOLS, tool_choice="required")
    if family in ("hermes", "magistral"):
        assert takes(llm, f"Let me see.\n{call}", tools=STRICT)
        assert takes(llm, call + ("\n" if family == "hermes" else "") + call, tools=TOOLS, tool_choice="required")


def test_an_answer_is_json_or_calls_with_a_response_format(families: dict[str, FusedLlama]) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]} | {
        "additionalProperties": False
    }
    form = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    for seed in range(6):
        answer = chat(families["hermes"], tools=STRICT, response_format=form, seed=seed)
        if not calls_of(answer):
            jsonschema.validate(json.loads(answer["choices"][0]["message"]["content"]), schema)


@pytest.mark.parametrize(
    ("family", "arguments", "message"),
    [
        ("gemma", {"tools": TOOLS}, "knows no tools"),
        ("gemma", {"think": "on"}, "knows no thinking"),
        ("gemma", {"think_budget": 3}, "knows no thinking"),
        ("gpt-oss", {"think": "off"}, "always thinks"),
        ("hermes", {"tool_choice": "required"}, "tool_choice needs tools"),
        ("hermes", {"tools": TOOLS, "tool_choice": "sometimes"}, "tool_choice must be"),
        ("hermes", {"tools": TOOLS, "tool_choice": UNKNOWN}, "none of the tools"),
        ("hermes", {"tools": TOOLS, "tool_choice": NO_NAME}, "tool_choice must"),
        ("hermes", {"tools": TOOLS, "parallel_tool_calls": 1}, "parallel_tool_calls must be"),
        ("hermes", {"tools": "weather"}, "tools must be a list"),
        ("hermes", {"tools": ["weather"]}, "a tool must be"),
        ("hermes", {"tools": [{"type": "function", "function": {"name": "a b"}}]}, "the name of a tool"),
        ("hermes", {"tools": [*TOOLS, TOOLS[0]]}, "the same name"),
        ("hermes", {"tools": TOOLS, "grammar": 'root ::= "x"'}, "keeps to no grammar"),
        ("hermes", {"chat_template_kwargs": {"messages": []}}, "has a field of its own"),
        ("hermes", {"chat_template_kwargs": 3}, "must be an object"),
        ("hermes", {"think": "maybe"}, "think must be one of"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_one_error(
    families: dict[str, FusedLlama], family: str, arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(InvalidParameterError, match=message):
        chat(families[family], **arguments)


def test_a_raw_prompt_has_no_thinking(families: dict[str, FusedLlama]) -> None:
    with pytest.raises(InvalidParameterError, match="needs messages"):
        families["qwen3"].create_completion("Hi", think="off")


def prompt_of(llm: FusedLlama, messages: list[dict[str, Any]], **arguments: Any) -> str:
    return llm.detokenize(llm.apply_chat_template(messages, **arguments))


def test_the_template_gets_tools_calls_and_results(families: dict[str, FusedLlama]) -> None:
    function = {"name": "weather", "arguments": '{"city": "Oslo"}'}
    messages = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [{"id": "a", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "a", "content": "cold <|im_end|>"},
    ]
    llm = families["hermes"]
    with pytest.raises(InvalidParameterError, match="knows no role 'tool'"):
        prompt_of(llm, messages)
    text = prompt_of(llm, messages[:2], tools=TOOLS)
    assert 'weather{"city": "Oslo"}' in text
    assert json.dumps(TOOLS, ensure_ascii=False) in text
    assert "tools" not in prompt_of(llm, ASK, tools=TOOLS, tool_choice="none")
    cut_short = {**messages[1], "tool_calls": [{"function": {"name": "weather", "arguments": '{"city'}}]}
    assert json.dumps('{"city') in prompt_of(llm, [*ASK, cut_short])


def test_thinking_is_switched_and_variables_reach_the_template(families: dict[str, FusedLlama]) -> None:
    closed = "<think>\n\n</think>\n\n"
    qwen, deepseek = families["qwen3"], families["deepseek-r1"]
    assert not prompt_of(qwen, ASK).endswith(closed)
    assert not prompt_of(qwen, ASK, think="on").endswith(closed)
    assert prompt_of(qwen, ASK, think="off").endswith(closed)
    assert prompt_of(qwen, ASK, chat_template_kwargs={"enable_thinking": False}).endswith(closed)
    assert prompt_of(deepseek, ASK).endswith("<think>\n")
    assert prompt_of(deepseek, ASK, think="off").endswith(closed)


@pytest.mark.parametrize("draft", [0, 3])
def test_thinking_ends_with_its_budget_and_the_answer_keeps_to_its_schema(
    families: dict[str, FusedLlama], draft: int
) -> None:
    llm = families["deepseek-r1"]
    schema = {"enum": ["yes", "no"]}
    answer = chat(llm, json_schema=schema, think_budget=20, seed=3, stop=["e"], draft=draft)
    message = answer["choices"][0]["message"]
    assert message["reasoning_content"]
    assert message["content"] in ('"y', '"no"')  # the stop string ends the answer, and no thought
    plain = chat(llm, json_schema=schema, think_budget=20, seed=3, draft=draft)
    assert json.loads(plain["choices"][0]["message"]["content"]) in ("yes", "no")
    n_reasoning = plain["usage"]["completion_tokens_details"]["reasoning_tokens"]
    n_closing = len(llm.tokenize("\n</think>\n\n"))
    assert 20 <= n_reasoning <= 20 + n_closing
    assert n_reasoning < plain["usage"]["completion_tokens"]
    assert plain["choices"][0]["message"]["reasoning_content"] == message["reasoning_content"]


def test_a_required_call_may_follow_thinking(families: dict[str, FusedLlama]) -> None:
    llm = families["qwen3"]
    for think in ("on", "off"):
        answer = chat(llm, tools=TOOLS, tool_choice="required", think=think, think_budget=5, seed=2)
        assert calls_of(answer)


def test_thinking_and_content_of_a_stream_join_to_the_answer(families: dict[str, FusedLlama]) -> None:
    llm = families["deepseek-r1"]
    asked: dict[str, Any] = {"think_budget": 9, "max_tokens": 60, "seed": 4}
    message = chat(llm, **asked)["choices"][0]["message"]
    deltas = [
        chunk["choices"][0]["delta"] for chunk in llm.create_chat_completion(ASK, stream=True, temperature=1.0, **asked)
    ]
    for name in ("reasoning_content", "content"):
        assert "".join(delta.get(name, "") for delta in deltas) == message[name]
    tokens = list(llm.stream(llm.apply_chat_template(ASK), temperature=1.0, **asked))
    assert "".join(token.reasoning for token in tokens) == message["reasoning_content"]
    assert "".join(token.text for token in tokens) == message["content"]
