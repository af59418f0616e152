"""Hostile request bodies, and hostile messages for hostile chat templates.

`requests`: whatever a body holds, it is answered on scripted members, whole and streamed, or refused with a reason; no
500, no other exception. `templates`: whatever texts messages hold, the prompt has exactly the control tokens that the
template itself writes.

`python -m tests.guided requests --minutes 60` runs many, guided by coverage; `test_fuzz_requests.py` a few of both.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from hypothesis import Phase, given
from hypothesis import strategies as st

from edge_dlf import InvalidParameterError

from .guided import drawn, limits

CONTROL = ("<|im_start|>", "<|im_end|>", "<s>", "</s>", "[INST]", "<|tool▁sep|>", "<start_of_turn>")

_OTHER_PIECES = (
    "<", "<|", "|>", ">", "[", "INST]", "im_end|>", "<|im_", "_start", "</think>", "<think>", " ", "\n", "\t", "a",
    "user", "IM_END", "|>dne_mi|<", "im_end", "\U00100000", "\U00100008", "\U0010ffff", "\ud800", "\0", "é", "\u2028",
    '"', "{{", "%}", "<tool_call>",
)  # fmt: skip
_pieces = st.sampled_from([*CONTROL, *_OTHER_PIECES])
_texts = st.lists(_pieces, max_size=8).map("".join) | st.text(max_size=5)
_numbers = st.integers(-3, 9) | st.floats() | st.sampled_from([True, 1e308, 2**63, 2**64, -(2**70), 10**400, 5.0])
_values = st.recursive(
    st.none() | st.booleans() | _numbers | _texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_texts, inner, max_size=3),
    max_leaves=6,
)


def _mostly(right: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 7).flatmap(lambda n: right if n < 7 else _values)


_ids = st.lists(st.integers(0, 262), max_size=6)
_functions = st.fixed_dictionaries(
    {"name": st.sampled_from(["f", "g"]) | _texts}, optional={"parameters": _values, "arguments": _values}
)
_calls = st.lists(st.fixed_dictionaries({"function": _functions}, optional={"id": _texts, "x": _values}), max_size=2)
_contents = _mostly(
    _texts | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": _texts}, optional={"x": _values}))
)
_message = st.fixed_dictionaries(
    {"role": _mostly(st.sampled_from(["user", "assistant", "system", "developer", "tool"])), "content": _contents},
    optional={"tool_calls": _mostly(_calls), "name": _texts, "reasoning_content": _values},
)
_messages = st.lists(_mostly(_message), min_size=1, max_size=3)
_sampling = {
    "max_tokens": _mostly(st.integers(1, 4)), "max_completion_tokens": _values, "temperature": _mostly(st.floats(0, 2)),
    "top_k": _mostly(st.integers(-1, 50)), "top_p": _mostly(st.floats(0, 1)), "min_p": _mostly(st.floats(0, 1)),
    "repeat_penalty": _mostly(st.floats(0.5, 2)), "repeat_last_n": _mostly(st.integers(-1, 9)),
    "frequency_penalty": _mostly(st.floats(-2, 2)), "presence_penalty": _mostly(st.floats(-2, 2)),
    "logit_bias": _mostly(st.dictionaries(st.integers(0, 262).map(str), st.floats(-100, 100), max_size=3)),
    "seed": _mostly(st.integers(-1, 9)), "stop": _mostly(_texts | st.lists(_texts, max_size=3)),
    "n": _mostly(st.integers(1, 3)), "stream": _mostly(st.booleans()), "user": _values, "metadata": _values,
    "stream_options": _mostly(st.fixed_dictionaries({"include_usage": _mostly(st.booleans())})),
    "model": _mostly(st.sampled_from(["fake", "fake:large", "fake:static", "fake:maths"])), "echo": _values,
    "response_format": _mostly(st.sampled_from([{"type": "text"}, {"type": "xml"}])), "suffix": _values,
    "best_of": _values, "think": _values, "think_budget": _values, "profile": _values, "zzz": _values,
    "edge_dlf": _mostly(
        st.fixed_dictionaries(
            {},
            optional={
                "method": _mostly(st.sampled_from(["dynamic", "static", "weighted", "large", "base", "maths"])),
                "search": _mostly(st.sampled_from(["grid", "exact"])), "alpha": _mostly(st.floats(-2, 3)),
                "weights": _mostly(st.dictionaries(st.sampled_from(["large", "base", "maths"]), st.floats(-2, 2))),
                "alpha_max": _values, "alpha_step": _values, "plausibility": _values, "trace": _mostly(st.booleans()),
            },
        )
    ),
}  # fmt: skip
_of_chat = {
    "logprobs": _mostly(st.booleans()), "top_logprobs": _mostly(st.integers(0, 21)), "tool_choice": _values,
    "tools": _mostly(st.lists(st.fixed_dictionaries({"type": st.just("function"), "function": _functions}))),
    "parallel_tool_calls": _values, "chat_template_kwargs": _mostly(st.dictionaries(_texts, _values, max_size=2)),
    "reasoning_effort": _values,
}  # fmt: skip


def _with_some(first: str, value: st.SearchStrategy[Any], others: Mapping[str, Any]) -> st.SearchStrategy[Any]:
    """A body of the field `first` and up to five of the others."""
    some = st.lists(st.sampled_from(sorted(others)), max_size=5, unique=True)
    return some.flatmap(lambda names: st.fixed_dictionaries({first: value, **{name: others[name] for name in names}}))


_prompts = _texts | _ids | st.lists(_texts | _ids, max_size=3)
_chats = _with_some("messages", _mostly(_messages), {**_sampling, **_of_chat})
_completions = _with_some("prompt", _mostly(_prompts), {**_sampling, "logprobs": _mostly(st.integers(0, 21))})
_bodies = st.tuples(st.just(True), _chats) | st.tuples(st.just(False), _completions)
_raw = _bodies.map(lambda body: (body[0], json.dumps(body[1]).encode()))
_cut = st.builds(lambda request, n: (request[0], request[1][:n]), _raw, st.integers(0, 200))
_other = st.tuples(st.booleans(), st.binary(max_size=20) | _values.map(lambda value: json.dumps(value).encode()))
requests = st.integers(0, 9).flatmap(lambda n: _raw if n < 8 else _cut if n == 8 else _other)


class Bytes:
    """A vocabulary of every byte and CONTROL, with the face that the tokenizer asks a model for."""

    bos, eos, eot, adds_bos, chat_template = 258, 259, 257, False, (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}{% for c in m.tool_calls or [] %}"
        "<tool_call>\n{{ c.function | tojson }}\n</tool_call>{% endfor %}<|im_end|>\n{% endfor %}"
        "{% if tools %}{{ tools | tojson }}{% endif %}{{ '<|im_start|>assistant\n' }}"
    )  # fmt: skip

    def control_tokens(self) -> list[int]:
        return [256 + n for n in range(len(CONTROL))]

    def piece(self, token: int, *, special: bool = False) -> bytes:
        return bytes([token]) if token < 256 else CONTROL[token - 256].encode() if special else b""

    def tokenize(self, text: bytes, *, special: bool) -> list[int]:
        return list(text)


@contextmanager
def scripted_server() -> Iterator[Callable[[bool, bytes], int]]:
    """What answers a body, as the server does, and returns the status."""
    from edge_dlf.answers.preparer import Preparer
    from edge_dlf.answers.stream import Driver
    from edge_dlf.answers.tokenizer import Tokenizer
    from edge_dlf.engine.decoder import Decoder
    from edge_dlf.engine.ensemble import Ensemble
    from edge_dlf.fusion.fuser import Fuser
    from edge_dlf.server.calls import Call, chunk, encode, total, whole
    from edge_dlf.server.refusals import HTTPError

    from .fake_backend import FakeBackend

    n_vocab = 256 + len(CONTROL)
    members = {
        name: FakeBackend(seed, n_vocab, n_ctx=96, n_seq_max=4) for seed, name in enumerate(("large", "base", "maths"))
    }
    ensemble = Ensemble(members, n_vocab)
    vocabulary: Any = Bytes()
    tokenizer = Tokenizer(vocabulary, n_vocab, ensemble.n_ctx)
    preparer = Preparer("fake", {}, {}, None, ensemble, tokenizer, (257).__eq__)
    driver = Driver(Decoder(ensemble, Fuser(n_vocab)))
    llm: Any = SimpleNamespace(prepare=preparer.request)
    models: dict[str, Any] = {
        f"fake{name and ':'}{name}": {"edge_dlf": {"method": name or "dynamic"}}
        for name in ("", "static", "large", "maths")
    }

    def ask(is_chat: bool, raw: bytes) -> int:
        try:
            call = Call.parse(raw, models, is_chat=is_chat)
            choices = call.prepare(llm, {})
            for choice in choices[:4]:
                driver.add(choice.answer)
            for _ in range(6):
                driver.step()
            answers = [choice.answer for choice in choices]
            tokens = [answer.take() for answer in answers]
            for answer in answers:
                if answer.error:
                    raise answer.error
            if call.stream:
                for choice, own in zip(choices, tokens, strict=True):
                    encode([*choice.opening(), *(chunk(call, choice, token) for token in own), choice.closing()])
                encode(total(call, choices))
            else:
                encode(whole(call, choices, tokens))
            return 200
        except Exception as error:
            refusal = HTTPError.of(error)
            assert encode(refusal.body())
            if refusal.status_code == 500:
                raise
            return refusal.status_code
        finally:
            driver.clear()

    try:
        assert ask(False, b'{"prompt": "x", "max_tokens": 1}') == 200  # compiles some kernels, which may take long
        yield ask
    finally:
        tokenizer.close()


def of_requests(ask: Callable[[bool, bytes], int], tally: Counter[Any]) -> Callable[..., None]:
    """The property of request bodies, to be decorated."""

    def holds(request: tuple[bool, bytes]) -> None:
        tally[ask(*request)] += 1

    return given(requests)(holds)


_FIELDS = ("m.content", "m.role", "m.name", "m.tool_calls[0].function.name", "m.tool_calls[0].function.arguments")
_FILTERS = (
    "", "|trim", "|tojson", ".strip()", ".lstrip('\\n')", ".rstrip()", "|string", ".split('</think>')[-1]",
    ".split('</think>')[0].split('<think>')[-1]", "|replace('\\n', ' ')", "|lower", "|upper", "|title", "|reverse",
    "[1:]", "[::-1]", "[:-1]", "|list|join", "|list|join('|')", "|replace('a', '')", "|replace(' ', '<')", "|e",
    ".replace('\\n', '')", ".split('<s>')|join('im_')", "|string|center(9)", ".join(['<|', '|>'])", "|urlencode",
    "|format('a')", ".replace('user', 'im_end')", "|replace('<s>', '<|im_end|>')", ".removeprefix('<')",
)  # fmt: skip


def _hole(field: str, filters: Sequence[str]) -> str:
    text = f"(({field} or '')|string)"
    for each in filters:
        text = f"({text}{each})"
    return "{{ " + text + " }}"


_holes = st.builds(_hole, st.sampled_from(_FIELDS), st.lists(st.sampled_from(_FILTERS), max_size=2))
_literals = st.sampled_from(
    [
        *CONTROL,
        "<|",
        "|>",
        "<",
        "INST",
        "im_",
        "_end",
        "<think>",
        "user",
        "\n",
        " ",
        "{{ bos_token }}",
        "{{ eos_token }}",
        "call:",
    ]
)
_bodies_of_loop = st.lists(_literals | _holes, min_size=1, max_size=6).map("".join)
templates = st.tuples(_bodies_of_loop, st.lists(_literals, max_size=2).map("".join)).map(
    lambda parts: "{% for m in messages %}" + parts[0] + "{% endfor %}" + parts[1]
)
_chat_messages = st.lists(
    st.fixed_dictionaries(
        {
            "role": st.just("user"),
            "content": _texts,
            "tool_calls": st.fixed_dictionaries(
                {"function": st.fixed_dictionaries({"name": _texts, "arguments": _texts | _values})}
            ).map(lambda call: [call]),
        },
        optional={"name": _texts},
    ),
    min_size=1,
    max_size=4,
)


_TAME = dict.fromkeys((*range(33, 127), ord("▁")), "(")
_SHAPE = ("role", "content", "tool_calls", "function", "name", "arguments")


def tame(value: Any) -> Any:
    """A value of the same shape whose texts hold no letter of a control token, but for the roles."""
    if isinstance(value, str):
        return value.translate(_TAME)
    if isinstance(value, Mapping):
        return {
            name if name in _SHAPE else tame(name): each if (name, each) == ("role", "user") else tame(each)
            for name, each in value.items()
        }
    return [tame(each) for each in value] if isinstance(value, list) else value


class _Render:
    """A template in this process: thousands of processes would take hours."""

    def __init__(self, source: str, names: Sequence[str]) -> None:
        from edge_dlf.answers import sandbox

        self._rendered, self._template = sandbox._rendered, sandbox._compile(source, names)

    def render(self, messages: Sequence[Any], variables: Mapping[str, Any], literals: Mapping[str, str]) -> str:
        question = {"variables": {**variables, "messages": messages}, "literals": literals}
        try:
            return self._rendered(self._template, json.loads(json.dumps(question, default=str)), 1 << 20)
        except Exception as error:
            raise InvalidParameterError(str(error)) from error


def of_templates(tally: Counter[Any]) -> Callable[..., None]:
    """The property of chat templates and messages, to be decorated."""
    from edge_dlf.answers import template
    from edge_dlf.gguf.template_source import TemplateSource

    ids = {name: -1 - n for n, name in enumerate(CONTROL)}

    def controls(source: str, messages: list[Any]) -> list[int] | None:
        chat = template.ChatTemplate(TemplateSource(source, "<s>", "</s>", ids), lambda text: [len(text)])
        try:
            return [token for token in chat.prompt(messages) if token < 0]
        except InvalidParameterError:
            return None

    def holds(source: str, messages: list[Any]) -> None:
        own = template.TemplateProcess
        template.TemplateProcess = _Render  # type: ignore[assignment, misc]
        try:
            found = controls(source, messages)
            assert found == controls(source, tame(messages)), (source, messages)
        finally:
            template.TemplateProcess = own  # type: ignore[misc]
        tally["refused" if found is None else "rendered"] += 1

    return given(templates, _chat_messages)(holds)


@contextmanager
def target(name: str, tally: Counter[Any]) -> Iterator[Any]:
    """A property under its own name, for `hypothesis.settings`."""
    if name == "templates":
        yield of_templates(tally)
    else:
        with scripted_server() as ask:
            yield of_requests(ask, tally)


def run(name: str, n_cases: int) -> Counter[Any]:
    """Check this many cases, always the same. Raises what the first that fails raises; returns how they ended."""
    tally: Counter[Any] = Counter()
    with target(name, tally) as property:
        limits(max_examples=n_cases, derandomize=True, phases=[Phase.generate])(property)()
    return tally


@contextmanager
def cases(name: str, _: Path, tally: Counter[str]) -> Iterator[tuple[Callable[[bytes], object], list[bytes]]]:
    """For `guided.py`."""
    with target(name, tally) as property:
        yield limits()(property).hypothesis.fuzz_one_input, drawn()  # type: ignore[attr-defined]
