"""OpenAI's bodies to requests, and answers and errors back to OpenAI's shapes."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from ..answers.completion import Completion, Dict
from ..answers.requests import Request, count, parse_body
from ..answers.token import Token
from ..errors import InvalidParameterError, require, shown
from ..system.jsonl import parse_object
from .refusals import HTTPError

if TYPE_CHECKING:
    from ..api import FusedLlama

MAX_TOP_LOGPROBS = 20
MAX_CHOICES = 128
_JSON = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))


@dataclass(frozen=True)
class Call:
    """One body, read. requests: one for each choice, `n` for each prompt. trace: whether is told how each token came
    about."""

    model: str
    requests: tuple[Request, ...]
    n: int
    stream: bool
    include_usage: bool
    trace: bool

    @classmethod
    def parse(cls, raw: bytes, models: Mapping[str, Mapping[str, Any]], *, is_chat: bool) -> Call:
        """Read a body. models: name -> fields that it stands for. Raises HTTPError or InvalidParameterError."""
        try:
            body = parse_object(raw)
        except ValueError as error:
            raise HTTPError(400, f"the body is {error!s:.200}", "invalid_json") from None
        given = {name: value for name, value in body.items() if value is not None}
        default = next(iter(models))
        model = _typed(given, "model", str, default)
        if model not in models:
            message = f"the model {shown(model)} does not exist; there are {', '.join(models)}"
            raise HTTPError(404, message, "model_not_found")
        n = count("n", given.get("n", 1))
        stream = _typed(given, "stream", bool, False)
        options = _typed(given, "stream_options", dict, {})
        require(stream or not options, "stream_options needs stream: true")
        if unknown := sorted(set(options) - {"include_usage", "include_obfuscation"}):
            raise InvalidParameterError(f"unknown field {shown(unknown[0])} in stream_options")
        fusion = _typed(given, "edge_dlf", dict, {})
        trace = _typed(fusion, "trace", bool, False)
        own = {name: value for name, value in fusion.items() if name != "trace" and value is not None}
        given = {**models[model], **given}
        given["edge_dlf"] = {**models[model].get("edge_dlf", {}), **own}
        prompts = [given.pop("prompt", None)] if is_chat else _prompts(given)
        require(1 <= n * len(prompts) <= MAX_CHOICES, f"n must be 1 or more, and give {MAX_CHOICES} choices at most")
        for name in ("n", "stream", "stream_options"):
            given.pop(name, None)
        requests = []
        for prompt in prompts:
            request = parse_body({**given, "prompt": prompt}, is_chat)
            if max(int(request.settings.get(name) or 0) for name in ("logprobs", "top_logprobs")) > MAX_TOP_LOGPROBS:
                raise InvalidParameterError(f"at most {MAX_TOP_LOGPROBS} likely tokens can be listed")
            requests += [_numbered(request, k) for k in range(n)]
        return cls(model, tuple(requests), n, stream, _typed(options, "include_usage", bool, False), trace)

    def prepare(self, llm: FusedLlama, settings: Mapping[str, Any]) -> list[Completion]:
        """Return the choices, checked, of which nothing has been evaluated yet. Raises EdgeDLFError."""
        fields = {"model": self.model, **({"usage": None} if self.include_usage else {})}
        choices: list[Completion] = []
        for index, request in enumerate(self.requests):
            made = choices[-1].prompt if index % self.n else None
            choices.append(llm.prepare(replace(request, prompt=made), trace=self.trace, **settings))
            choices[-1].join(choices[0], index, fields)
        return choices


def whole(call: Call, choices: Sequence[Completion], tokens: Sequence[Sequence[Token]]) -> Dict:
    """Return the result of a call that is not streamed. tokens: of each choice."""
    results = [choice.result(own) for choice, own in zip(choices, tokens, strict=True)]
    first = {**results[0], "choices": [result["choices"][0] for result in results], "usage": usage(call, choices)}
    if call.trace:
        first["edge_dlf"] = {
            **first["edge_dlf"],
            "trace": [
                [{"text": token.text, **choice.traced(token)} for token in own]
                for choice, own in zip(choices, tokens, strict=True)
            ],
        }
    return first


def usage(call: Call, choices: Sequence[Completion]) -> Dict:
    """Count the tokens of all choices. A prompt counts once for its choices."""
    reports = [choice.answer.report for choice in choices]
    prompts = reports[:: call.n]
    n_prompt, n_generated = sum(r.n_prompt for r in prompts), sum(r.n_generated for r in reports)
    n_reasoning = sum(report.n_reasoning for report in reports)
    return {
        "prompt_tokens": n_prompt,
        "completion_tokens": n_generated,
        "total_tokens": n_prompt + n_generated,
        "prompt_tokens_details": {"cached_tokens": sum(r.n_cached for r in prompts)},
        **({"completion_tokens_details": {"reasoning_tokens": n_reasoning}} if n_reasoning else {}),
    }


def chunk(call: Call, choice: Completion, token: Token) -> Dict:
    """Return the chunk of a token that has come."""
    told = {"edge_dlf": choice.traced(token)} if call.trace else {}
    return {**choice.chunk(token), **told}


def total(call: Call, choices: Sequence[Completion]) -> Dict:
    """Return the chunk after all others, which holds their usage."""
    return {**choices[0].no_choice(), "usage": usage(call, choices)}


def encode(value: Any) -> bytes:
    """JSON, in UTF-8; half a surrogate pair becomes a question mark."""
    return _JSON.encode(value).encode("utf-8", "replace")


def _typed(fields: Mapping[str, Any], name: str, kind: type, default: Any) -> Any:
    value = fields.get(name)
    if value is None:
        return default
    if not isinstance(value, kind):
        words = {str: "text", bool: "true or false", dict: "an object"}
        raise InvalidParameterError(f"{name} must be {words[kind]}, not {shown(value)}")
    return value


def _prompts(given: Dict) -> list[Any]:
    """Prompts of a body: one, or a list of texts or of lists of token ids."""
    prompt = given.get("prompt")
    if isinstance(prompt, list) and prompt and all(isinstance(each, str | list) for each in prompt):
        return prompt
    return [prompt]


def _numbered(request: Request, k: int) -> Request:
    """The request of the choice number `k` of a prompt: with a seed, each has one of its own."""
    seed = request.settings.get("seed")
    if seed is None or not k:
        return request
    return replace(request, settings={**request.settings, "seed": (seed + k) % 2**64})
