"""Every setting once: its name, type, bounds, default and help, and the places where it may be given.

A setting of the fusion or of sampling is a field of FusionParams or SamplingParams, made by `_row`; the others are rows
of SETTINGS. From these rows come the checks of both classes, the options of the command line with their environment
variables, the [defaults] of a family.toml, the fields of a request, the chat's /set, eval's method strings and the
server's OpenAPI document. A new setting is a new row, and the code that uses it.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any, Literal, TypeAlias, TypeVar, get_args

from .errors import InvalidParameterError, require, shown

METHODS = ("dynamic", "static", "blend", "weighted", "large", "base")
MAX_DRAFT = 8
"""Most tokens that are drafted at once."""
Overlap: TypeAlias = Literal["off", "queue", "threads"]
"""How members that have devices of their own are decoded: each once the one before is done, or handed over one after
the other without waiting for any, or handed over by a thread each."""
OVERLAPS: tuple[Overlap, ...] = get_args(Overlap)

_T = TypeVar("_T")
_FINITE = 1e38  # as float32


class Kind:
    """Type and bounds of a value. `name` stands for a value in --help."""

    name = "text"

    def parse(self, text: str) -> Any:
        """Return what a user typed as JSON would hold it, or the text if it is nothing like it."""
        return text

    def read(self, setting: str, value: Any) -> Any:
        """Return a value of JSON, TOML or Python, converted. Raises InvalidParameterError, which names the setting."""
        raise NotImplementedError

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of what `read` takes."""
        raise NotImplementedError


@dataclass(frozen=True)
class Text(Kind):
    """A text, one of `choices` if there are any."""

    choices: tuple[str, ...] = ()

    def read(self, setting: str, value: Any) -> str:
        if isinstance(value, str) and (not self.choices or value in self.choices):
            return str(value)
        wanted = f"one of {', '.join(self.choices)}" if isinstance(value, str) else "text"
        raise InvalidParameterError(f"{setting} must be {wanted}, not {shown(value)}")

    def schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": list(self.choices)} if self.choices else {"type": "string"}


class Texts(Kind):
    """One text, or at most 128: each is looked for after every token. None is empty or longer than 4,096 characters."""

    def read(self, setting: str, value: Any) -> tuple[str, ...]:
        texts = (value,) if isinstance(value, str) else value
        are_texts = isinstance(texts, Sequence) and all(isinstance(text, str) for text in texts)
        require(are_texts, f"{setting} must be text or a list of texts, not {shown(value)}")
        require("" not in texts, f"a {setting} string must not be empty")
        require(len(texts) <= 128, f"there are {len(texts)} {setting} strings, more than 128")
        require(all(len(text) <= 4096 for text in texts), f"a {setting} string may have 4096 characters")
        return tuple(texts)

    def schema(self) -> dict[str, Any]:
        text = {"type": "string", "minLength": 1, "maxLength": 4096}
        return {"anyOf": [text, {"type": "array", "items": text, "maxItems": 128}]}


@dataclass(frozen=True)
class Number(Kind):
    """A finite number from `low` to `high`, or one of `words`.

    is_open: `low` itself is left out.
    is_whole: the number is an integer.
    minus_one: what -1 stands for, as llama.cpp's users write it; ... where it stands for nothing.
    """

    low: float = -math.inf
    high: float = math.inf
    is_open: bool = False
    is_whole: bool = False
    words: tuple[str, ...] = ()
    minus_one: Any = ...

    @property
    def name(self) -> str:  # type: ignore[override]
        return "|".join((*self.words, "N")) if self.words else "integer" if self.is_whole else "float"

    @property
    def type(self) -> str:
        """The type, in an error."""
        return "an integer" if self.is_whole else "a finite number"

    @property
    def range(self) -> str:
        """The values that are taken, in an error."""
        if self.high == math.inf:
            span = f"above {self.low}" if self.is_open else f"{self.low} or more"
        else:
            bracket = "(" if self.is_open else "["
            span = f"{self.low} to {self.high}" if self.is_whole else f"in {bracket}{self.low}, {self.high}]"
        return f"{', '.join(self.words)} or {span}" if self.words else span

    def parse(self, text: str) -> Any:
        try:
            return int(text) if self.is_whole else float(text)
        except ValueError:
            return text

    def read(self, setting: str, value: Any) -> Any:
        if isinstance(value, str) and value in self.words:
            return value
        if self.minus_one is not ... and isinstance(value, numbers.Real) and value == -1:
            return self.minus_one
        if self.is_whole and isinstance(value, float) and value.is_integer():  # as pandas and JavaScript write integers
            value = int(value)
        is_number = isinstance(value, numbers.Integral if self.is_whole else numbers.Real)
        is_right = is_number and not isinstance(value, bool) and -_FINITE < value < _FINITE
        if is_right and self.low <= value <= self.high and not (self.is_open and value == self.low):
            return int(value) if self.is_whole else float(value)
        require(is_right or self.words, f"{setting} must be {self.type}, not {shown(value)}")
        raise InvalidParameterError(f"{setting} must be {self.range}, not {shown(value)}")

    def schema(self) -> dict[str, Any]:
        number: dict[str, Any] = {"type": "integer" if self.is_whole else "number"}
        if self.low > -math.inf:
            number["exclusiveMinimum" if self.is_open else "minimum"] = self.low
        if self.high < math.inf:
            number["maximum"] = self.high
        others = [*self.words, *(() if self.minus_one is ... else (-1,))]
        return {"anyOf": [{"enum": others}, number]} if others else number


@dataclass(frozen=True)
class ByName(Kind):
    """A number for each name: NAME=NUMBER,…, or, if `has_common`, one number for all."""

    number: Number = Number()
    has_common: bool = True

    @property
    def name(self) -> str:  # type: ignore[override]
        return "number|name=number" if self.has_common else "name=number"

    def parse(self, text: str) -> Any:
        if "=" not in text:
            return self.number.parse(text)
        pairs = [part.partition("=") for part in text.split(",")]
        return {name.strip(): self.number.parse(number) for name, _, number in pairs}

    def read(self, setting: str, value: Any) -> Any:
        if isinstance(value, Mapping):
            return {str(name): self.number.read(f"{setting} of {name!s:.80}", number) for name, number in value.items()}
        wanted = f"{self.number.type} or NAME=NUMBER,…" if self.has_common else "NAME=NUMBER,…"
        is_common = self.has_common and not isinstance(value, str)
        require(is_common, f"{setting} must be {wanted}, not {shown(value)}")
        return self.number.read(setting, value)

    def schema(self) -> dict[str, Any]:
        number = self.number.schema()
        by_name = {"type": "object", "additionalProperties": number}
        return {"anyOf": [number, by_name]} if self.has_common else by_name


class Biases(Kind):
    """A number for each of 65,536 token ids at most, which every step looks at; −inf bans the token."""

    _ID, _MOST = "[0-9]{1,18}", 2**16

    def read(self, setting: str, value: Any) -> dict[int, float]:
        n_tokens = len(value) if isinstance(value, Mapping) else 0
        require(n_tokens <= self._MOST, f"{setting} names {n_tokens} tokens, more than {self._MOST}")
        is_map = isinstance(value, Mapping) and all(re.fullmatch(self._ID, str(token)) for token in value)
        require(is_map, f"{setting} must map token ids to numbers, not {shown(value)}")
        return {
            int(token): bias if bias == -math.inf else Number().read(f"{setting} of {token}", bias)
            for token, bias in value.items()
        }

    def schema(self) -> dict[str, Any]:
        ids, number = {"pattern": f"^{self._ID}$"}, {"type": "number"}
        return {"type": "object", "propertyNames": ids, "additionalProperties": number, "maxProperties": self._MOST}


Place: TypeAlias = Literal["command line", "chat", "family", "body", "edge_dlf", "eval"]
"""Where a setting may be given: as an option or environment variable, by /set, in [defaults] of a family.toml, in the
body of a request or under its "edge_dlf", or in a method string of eval."""
_FUSION: frozenset[Place] = frozenset(("chat", "family", "edge_dlf", "eval"))
_SAMPLING: frozenset[Place] = frozenset(("chat", "family", "body"))
_CLI: frozenset[Place] = frozenset(("command line",))
_FUSED, _DRAWN = _FUSION | _CLI, _SAMPLING | _CLI
_CHAT: frozenset[Place] = frozenset(("command line", "chat", "body"))


@dataclass(frozen=True)
class Setting:
    """One setting. default: what holds where nobody gives it. places: where it may be given."""

    name: str
    default: Any
    kind: Kind
    places: frozenset[Place]
    help: str

    def parse(self, text: str) -> Any:
        """Return the value that a user typed. Raises InvalidParameterError."""
        return self.read(self.kind.parse(text))

    def read(self, value: Any) -> Any:
        """Return a value of JSON, TOML or Python, checked and converted. Raises InvalidParameterError."""
        return None if value is None and self.default is None else self.kind.read(self.name, value)

    def schema(self) -> dict[str, Any]:
        """Return the JSON schema of a value."""
        return {**self.kind.schema(), "description": self.help}


def _row(default: _T, kind: Kind, places: frozenset[Place], help: str) -> _T:
    """Make a field of FusionParams or SamplingParams that is a row of SETTINGS too."""
    return dataclasses.field(default=default, metadata={"kind": kind, "places": places, "help": help})


def _check(params: FusionParams | SamplingParams) -> None:
    """Set every field to what its row of SETTINGS reads. Raises InvalidParameterError."""
    for field in dataclasses.fields(params):
        if (value := getattr(params, field.name)) is not field.default:
            object.__setattr__(params, field.name, SETTINGS[field.name].read(value))


@dataclass(frozen=True)
class FusionParams:
    """How the members' logits become one row.

    With "dynamic" and "static": fused = large + Σ_t α_t (expert_t − base); "static" adds α_t corrector_t as it is.
    With "weighted": fused(v) ∝ exp Σ_m w_m log p_m(v), over the members m with a weight w_m other than 0. Weights
    (1, −Σα, α_1, …) of large, base and experts are "static", 0.5 for large and 0.5 for all experts together "blend", a
    single weight of 1 that member alone.

    method: "dynamic" (α found at each step by KL divergences), "static" (fixed α), "blend", "weighted" (fixed weights),
        "large", "base", or the name of an expert (that member alone).
    search: "grid" (the paper's Algorithm 1: α over 0, alpha_step, …, alpha_max, one expert at a time) or
        "exact" (the continuous optimum of the same objective in [0, alpha_max]).
    alpha: for "static" only; one float for every expert, or a mapping from expert name to float.
    weights: for "weighted" only; a mapping from member to its weight. Members that it does not name, or gives 0, are
        not decoded.
    plausibility: β of contrastive decoding; the fusion chooses only among tokens to which an expert with a weight gives
        at least β times the probability of its best one. 0 is off. It is a filter: logprobs are those without it.
    Raises InvalidParameterError where a value cannot be used.
    """

    method: str = _row("dynamic", Text(), _FUSION - {"eval"} | _CLI, f"{', '.join(METHODS)}, or an expert's name.")
    search: str = _row("grid", Text(("grid", "exact")), _FUSED, "How dynamic finds α.")
    alpha: float | Mapping[str, float] = _row(
        1.0, ByName(), _FUSED, "α for static: one for all, or for each expert by name."
    )
    weights: Mapping[str, float] | None = _row(
        None, ByName(has_common=False), _FUSED, "For weighted, by member: large=0.5,math=0.8; the others do not run."
    )
    alpha_max: float = _row(2.0, Number(0, 100, is_open=True), _FUSION, "Largest α that dynamic looks at.")
    alpha_step: float = _row(0.1, Number(0, is_open=True), _FUSION, "Distance between the values of α on the grid.")
    plausibility: float = _row(
        0.0, Number(0, 1), _FUSED, "Least probability by an expert, relative to its likeliest token; 0 is off."
    )

    def __post_init__(self) -> None:
        _check(self)
        is_weighted = self.method != "weighted" or bool(self.weights)
        require(is_weighted, "method weighted needs weights of members, such as large=0.5,math=0.8")
        require(self.weights is None or any(self.weights.values()), "weights must give a member a number other than 0")
        require(self.alpha_step <= self.alpha_max, f"alpha_step must be in (0, alpha_max], not {self.alpha_step!r}")
        ratio = self.alpha_max / self.alpha_step
        require(ratio < 1001 - 1e-9, f"alpha_max / alpha_step must not exceed 1000, not {ratio:.0f}")


@dataclass(frozen=True)
class SamplingParams:
    """How a token is drawn from a fused row, in this order: penalties and logit_bias, then, unless temperature is 0,
    top-k, top-p, min-p, temperature, draw.

    temperature: 0 takes the most likely token.
    top_k: 0 keeps all, as -1 does.
    top_p: 1 keeps all, 0 the most likely token alone.
    min_p: 0 keeps all.
    repeat_penalty, frequency_penalty, presence_penalty: over the last `repeat_last_n` tokens (0: none, -1: all).
    logit_bias: token id -> number added to its logit. seed: None, or -1, draws a new one for each request.
    Raises InvalidParameterError where a value cannot be used.
    """

    temperature: float = _row(0.8, Number(0), _DRAWN, "0 takes the most likely token.")
    top_k: int = _row(40, Number(0, is_whole=True, minus_one=0), _DRAWN, "Likely tokens to draw from; 0 for all.")
    top_p: float = _row(0.95, Number(0, 1), _DRAWN, "Probability of the tokens to draw from.")
    min_p: float = _row(0.05, Number(0, 1), _DRAWN, "Least probability, relative to the likeliest token.")
    repeat_penalty: float = _row(1.0, Number(0, is_open=True), _DRAWN, "Penalty on recent tokens; 1 for none.")
    repeat_last_n: int = _row(
        64, Number(-1, is_whole=True), _SAMPLING, "Recent tokens that are penalised: 0 for none, -1 for all."
    )
    frequency_penalty: float = _row(
        0.0, Number(), _SAMPLING, "Taken from a recent token's logit as often as it occurs."
    )
    presence_penalty: float = _row(0.0, Number(), _SAMPLING, "Taken from the logit of each recent token.")
    logit_bias: Mapping[int, float] | None = _row(None, Biases(), _SAMPLING - {"chat"}, "Added to logits, by token id.")
    seed: int | None = _row(
        None, Number(0, 2**64 - 1, is_whole=True, minus_one=None), _DRAWN, "Makes runs repeat [a new one each time]."
    )

    def __post_init__(self) -> None:
        _check(self)

    @property
    def penalises(self) -> bool:
        """Whether a token's chance depends on the tokens before it."""
        return self.repeat_penalty != 1.0 or self.frequency_penalty != 0.0 or self.presence_penalty != 0.0

    @cached_property
    def biases(self) -> tuple[Any, Any]:
        """Arrays of logit_bias: tokens, ascending, and what is added to logits. Computed once: there may be many."""
        import numpy as np  # `--help` takes as long without it as it takes to import

        pairs = sorted((self.logit_bias or {}).items())
        return np.array([token for token, _ in pairs], np.int64), np.array([value for _, value in pairs], np.float64)


_FIELDS = (*dataclasses.fields(FusionParams), *dataclasses.fields(SamplingParams))
_ROWS = (
    *(Setting(field.name, field.default, **field.metadata) for field in _FIELDS),
    Setting(
        "max_tokens", None, Number(1, is_whole=True, minus_one=None), _CHAT, "Longest answer [to the context's end]."
    ),
    Setting("stop", None, Texts(), _CHAT, "Text that ends the answer."),
    Setting("think", "auto", Text(("auto", "on", "off")), _CHAT, "Think first; auto leaves it to the chat template."),
    Setting("think_budget", None, Number(0, is_whole=True), _CHAT, "Tokens after which thinking is closed [none]."),
    Setting(
        "draft",
        "auto",
        Number(0, MAX_DRAFT, is_whole=True, words=("auto", "off")),
        _CLI | {"chat"},
        "Tokens that an expert runs ahead at each step: auto (what pays), a number, or off.",
    ),
    Setting("profile", None, Text(), _CLI | {"chat", "body"}, "Settings that the family has under this name."),
)
SETTINGS: Mapping[str, Setting] = {row.name: row for row in _ROWS}
DEFAULTS: Mapping[str, Any] = {row.name: row.default for row in _ROWS}
FUSION = frozenset(field.name for field in dataclasses.fields(FusionParams))
SAMPLING = frozenset(field.name for field in dataclasses.fields(SamplingParams))


@cache
def settable(place: Place) -> Mapping[str, Setting]:
    """Return the settings that may be given at `place`, by name."""
    return {row.name: row for row in _ROWS if place in row.places}


def params_of(settings: Mapping[str, Any]) -> tuple[SamplingParams, FusionParams]:
    """Make both of those `settings` that are their fields. Raises InvalidParameterError."""
    sampling = SamplingParams(**{name: value for name, value in settings.items() if name in SAMPLING})
    return sampling, FusionParams(**{name: value for name, value in settings.items() if name in FUSION})


def profile_of(profiles: Mapping[str, Mapping[str, Any]], name: str | None) -> Mapping[str, Any]:
    """Return the settings of the profile `name`; of None, no settings. Raises InvalidParameterError."""
    known = f"there are {', '.join(profiles)}" if profiles else "the family has none"
    require(name is None or (isinstance(name, str) and name in profiles), f"there is no profile {shown(name)}; {known}")
    return {} if name is None else profiles[name]


def check_settings(settings: Mapping[str, Any], experts: Sequence[str]) -> None:
    """Raise InvalidParameterError where a family with these experts cannot use settings that are right one by one."""
    _, fusion = params_of(settings)
    methods = (*METHODS, *experts)
    require(fusion.method in methods, f"method must be one of {', '.join(methods)}, not {shown(fusion.method)}")
    check_names(fusion, experts)


def check_names(fusion: FusionParams, experts: Sequence[str]) -> None:
    """Raise InvalidParameterError where `alpha` or `weights` name what a family with these experts has not."""
    alpha = fusion.alpha if isinstance(fusion.alpha, Mapping) else ()
    unknown = [name for name in alpha if name not in experts]
    require(not unknown, f"alpha names {', '.join(map(shown, unknown[:9]))}; the experts are {', '.join(experts)}")
    members = ("large", "base", *experts)
    unknown = [name for name in fusion.weights or () if name not in members]
    require(not unknown, f"weights names {', '.join(map(shown, unknown[:9]))}; the members are {', '.join(members)}")
