"""Requests made ready to be decoded: arguments checked, prompts made tokens, nothing evaluated."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

from ..engine.ensemble import Ensemble
from ..engine.generation import Generation, GenerationRequest
from ..errors import ContextOverflowError, InvalidParameterError, require, shown
from ..params import (
    DEFAULTS,
    FUSION,
    SAMPLING,
    SETTINGS,
    FusionParams,
    SamplingParams,
    params_of,
    profile_of,
)
from .completion import ChatCompletion, Completion
from .message import MessageStream
from .requests import OF_TEMPLATE, Request, count, flag, schema_of
from .stream import Answer
from .template import ChatPrompt, MemberPrompts, Message
from .tokenizer import Prompt, Tokenizer
from .tools import read_tools

_T = TypeVar("_T")
logger = logging.getLogger(__name__)

_OF_THINKING = ("think", "think_budget")
_OF_BATCH = ("max_tokens", "stop", "grammar", "json_schema")


class Preparer:
    """Makes answers of arguments, for one family.

    name: the family's.
    defaults: its own settings.
    profiles: name -> settings that a request may choose by it, over the defaults.
    profile: the one of requests that choose none.
    ends: whether a token ends an answer.
    Its methods raise InvalidParameterError, ContextOverflowError, and TypeError for unknown names, on behalf of
    `function`.
    """

    def __init__(
        self,
        name: str,
        defaults: Mapping[str, Any],
        profiles: Mapping[str, Mapping[str, Any]],
        profile: str | None,
        ensemble: Ensemble,
        tokenizer: Tokenizer,
        ends: Callable[[int], bool],
    ) -> None:
        self.tokenizer = tokenizer
        self._name = name
        self._defaults, self._profiles, self._profile = defaults, profiles, profile
        self._ensemble = ensemble
        self._ends = functools.cache(ends)
        self._piece = functools.cache(tokenizer.piece)
        self._said_columns = False

    def answer(
        self,
        function: str,
        prompt: Prompt,
        *,
        max_tokens: int | None = None,
        stop: str | Sequence[str] | None = None,
        top_logprobs: int = 0,
        prompts: Mapping[str, Prompt] | None = None,
        draft: int | str = "auto",
        grammar: str | None = None,
        json_schema: Mapping[str, Any] | None = None,
        trace: bool = False,
        think: str = "auto",
        think_budget: int | None = None,
        **settings: Any,
    ) -> Answer:
        """Check a request and return its answer, of which nothing has been evaluated yet."""
        if not isinstance(prompt, ChatPrompt) and (think != "auto" or think_budget is not None):
            raise InvalidParameterError("thinking needs messages for the chat template, not a raw prompt")
        sampling, fusion = self.params(function, settings)
        max_tokens, stop = SETTINGS["max_tokens"].read(max_tokens), SETTINGS["stop"].read(stop)
        n_top = count("top_logprobs", top_logprobs)
        own = {} if prompts is None else prompts
        if not isinstance(own, Mapping):
            raise InvalidParameterError(f"prompts must map members to prompts, not {shown(own)}")
        names = self._ensemble.names
        if unknown := sorted(set(own) - set(names)):
            raise InvalidParameterError(f"prompts names {shown(unknown[0])}; the members are {', '.join(names)}")
        tokens = self._tokens(prompt, own, names)
        roles, n_ctx = self._ensemble.roles(fusion), self._ensemble.n_ctx
        longest = max(len(tokens[name]) for name in roles.members)
        if longest >= n_ctx:
            raise ContextOverflowError(
                f"the prompt has {longest} tokens and the answer at least 1: together {longest + 1}, "
                f"more than the context of {n_ctx}"
            )
        self._ensemble.require(roles.members)
        request = GenerationRequest(
            roles,
            tokens,
            fusion,
            sampling,
            max_tokens=min(max_tokens or n_ctx, n_ctx - longest),
            n_top=min(n_top, self._ensemble.n_vocab),
            traced=flag("trace", trace),
            n_draft=self._n_draft(draft),
            is_end=self._ends,
        )
        stops = stop or ()
        if not isinstance(prompt, ChatPrompt):
            constraint = self.tokenizer.constraint(grammar, json_schema, self._ends)
            return Answer(Generation(request, constraint), self._piece, MessageStream(stops))
        think_budget = SETTINGS["think_budget"].read(think_budget)
        constraint = self.tokenizer.chat_constraint(prompt, grammar, json_schema, think_budget, self._ends)
        one_call = prompt.tools is not None and prompt.tools.one_call
        text = MessageStream(stops, prompt.parser(), one_call=one_call)
        return Answer(Generation(request, constraint), self._pieces_of(prompt), text)

    def _tokens(self, prompt: Prompt, own: Mapping[str, Prompt], names: Sequence[str]) -> dict[str, Sequence[int]]:
        """Return the tokens of each member's prompt: those that its own template made, where there are such."""
        shared = self.tokenizer.prompt(prompt)
        tokens: dict[str, Sequence[int]] = {}
        for name in names:
            given = own.get(name, prompt)
            if isinstance(given, MemberPrompts) and name in given.own:
                tokens[name] = given.own[name]
            else:
                tokens[name] = self.tokenizer.prompt(given) if name in own else shared
        return tokens

    def chat(self, messages: Sequence[Message], arguments: dict[str, Any]) -> ChatPrompt:
        """Return the prompt of a chat, by what concerns its template, which is taken out of `arguments`."""
        if (response_format := arguments.pop("response_format", None)) is not None:
            arguments["json_schema"] = schema_of(response_format)
        *of_tools, variables = (arguments.pop(name, None) for name in OF_TEMPLATE)
        if not isinstance(variables, Mapping | None):
            raise InvalidParameterError(f"chat_template_kwargs must be an object, not {shown(variables)}")
        think = SETTINGS["think"].read(arguments.get("think", "auto"))
        return self.tokenizer.conversations.prompt(messages, read_tools(*of_tools), think, variables)

    def _pieces_of(self, prompt: ChatPrompt) -> Callable[[int], bytes]:
        """Return the bytes of each token, those of a control token that marks a part of the answer being its name."""
        if not prompt.dialect.control or prompt.parser() is None:
            return self._piece
        marks = {mark.encode() for mark in prompt.dialect.control}

        def piece(token: int) -> bytes:
            return self._piece(token) or (name if (name := self.tokenizer.name_bytes(token)) in marks else b"")

        return piece

    def scorer(self, settings: Mapping[str, Any]) -> Callable[[tuple[Prompt, Sequence[int]]], Answer]:
        """Return what makes a pair of a prompt and the tokens of its answer ready to be scored."""
        if unknown := sorted(set(settings) - FUSION - {"profile"}):
            raise TypeError(f"score() got an unexpected keyword argument {shown(unknown[0])}")
        _, fusion = self.params("score", settings)
        roles, n_ctx = self._ensemble.roles(fusion), self._ensemble.n_ctx
        self._ensemble.require(roles.members)
        greedy = SamplingParams(temperature=0.0, seed=0)

        def scored(pair: tuple[Prompt, Sequence[int]]) -> Answer:
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise InvalidParameterError(f"a pair must be a prompt and the tokens of its answer, not {shown(pair)}")
            prompt, answer = pair
            forced, prompts = tuple(self.tokenizer.known(answer)), self._tokens(prompt, {}, roles.members)
            require(forced, "the answer to be scored has no tokens")
            longest = max(map(len, prompts.values()))
            if longest + len(forced) - 1 > n_ctx:
                raise ContextOverflowError(
                    f"the prompt has {longest} tokens and the answer {len(forced)}: more than the context of {n_ctx}"
                )
            request = GenerationRequest(roles, prompts, fusion, greedy, max_tokens=len(forced), n_top=1, forced=forced)
            return Answer(Generation(request), self._piece)

        return scored

    def request(
        self,
        request: Request,
        *,
        raw: bool = True,
        system: str | None = None,
        draft: int | str = "auto",
        trace: bool = False,
        **settings: Any,
    ) -> Completion:
        """Return the answer to a line of a batch or to a call of the server. A profile that it names goes before
        `settings`, what it sets by itself before both."""
        if request.columns and not self._said_columns:
            self._said_columns = True
            logger.warning("no request uses these columns: %s", ", ".join(request.columns))
        named = profile_of(self._profiles, request.settings.get("profile"))
        arguments = {**settings, **named, **request.settings}
        logprobs, n_top = arguments.pop("logprobs", None), arguments.pop("top_logprobs", 0)
        arguments["top_logprobs"] = (n_top if logprobs else 0) if request.is_chat else logprobs or 0
        prompt = self._content(request, arguments, raw=raw, system=system)
        if not isinstance(prompt, ChatPrompt):  # what the caller says of thinking is about its chats
            arguments = {n: v for n, v in arguments.items() if n not in _OF_THINKING or n in request.settings}
        answer = self.answer("prepare", prompt, draft=draft, trace=trace, **arguments)
        if request.is_chat:
            completion = ChatCompletion(answer, self._name, bool(logprobs), self.tokenizer.name_bytes)
            completion.prompt = prompt
            return completion
        return self.completion(answer, prompt, logprobs)

    def completion(self, answer: Answer, prompt: Prompt, logprobs: int | None) -> Completion:
        """Return the shape of a completion of `prompt`."""
        text = prompt if isinstance(prompt, str) else self.tokenizer.detokenize(prompt)
        return Completion(answer, self._name, logprobs is not None, self.tokenizer.name_bytes, len(text))

    def _content(self, request: Request, arguments: dict[str, Any], *, raw: bool, system: str | None) -> Prompt:
        """Return the prompt of a batched request."""
        content: Any = request.content
        if request.prompt is not None:
            for name in OF_TEMPLATE:
                arguments.pop(name, None)
            return request.prompt  # type: ignore[no-any-return]
        if not request.is_chat:
            if raw or request.is_raw or not isinstance(content, str):
                return request.content  # type: ignore[no-any-return]
            content = [{"role": "user", "content": content}]
        if system is not None and content[0].get("role") != "system":
            content = [{"role": "system", "content": system}, *content]
        return self.chat(content, arguments)

    def check_batch(self, settings: Mapping[str, Any], *, draft: int | str, trace: bool) -> None:
        """Raise what concerns every request of a batch."""
        given = {name: value for name, value in settings.items() if name not in (*_OF_THINKING, *OF_TEMPLATE)}
        self.params("batch", {name: value for name, value in given.items() if name not in _OF_BATCH})
        self.answer("batch", [0], draft=draft, trace=trace, **given)
        read_tools(*map(settings.get, OF_TEMPLATE[:-1]))

    def params(self, function: str, settings: Mapping[str, Any]) -> tuple[SamplingParams, FusionParams]:
        """Return `settings` over those of their profile and the family's defaults, which None leaves as they are.

        Raises TypeError for a name that is no setting.
        """
        if unknown := sorted(set(settings) - SAMPLING - FUSION - {"profile"}):
            raise TypeError(f"{function}() got an unexpected keyword argument {shown(unknown[0])}")
        profile = settings.get("profile")
        named = profile_of(self._profiles, self._profile if profile is None else profile)
        given = {name: value for name, value in settings.items() if value is not None or DEFAULTS[name] is None}
        sampling, fusion = params_of({**self._defaults, **named, **given})
        self.tokenizer.known(list(sampling.logit_bias or ()))
        return sampling, fusion

    def _n_draft(self, draft: int | str) -> int | None:
        """Return the tokens to draft at each step; None for "auto"."""
        draft = SETTINGS["draft"].read(draft)
        return 0 if draft == "off" else None if draft == "auto" else int(draft)


def many(name: str, items: Iterable[_T]) -> Iterable[_T]:
    """`items`, if they are several and no text or mapping. Raises InvalidParameterError."""
    if isinstance(items, str | bytes | Mapping) or not isinstance(items, Iterable):
        raise InvalidParameterError(f"{name} must be a list, or another iterable, not {shown(items)}")
    return items
