"""Options that the commands share: which family, how it is loaded, how it answers."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click
from click.core import ParameterSource

from ..errors import InvalidParameterError
from ..params import OVERLAPS, SEARCHES
from ..system.paths import shipped_dir
from .settings import DEFAULTS, check, parse, parse_numbers, show

if TYPE_CHECKING:
    from ..api import FusedLlama
    from ..batch.ray import RayLlama
    from ..families.files import FamilyFiles
    from ..families.spec import FamilySpec

Decorator: TypeAlias = Callable[[Callable[..., Any]], Callable[..., Any]]

DEFAULT_N_CTX = 4096
_HOW_TO_NAME = "name a family: --family NAME|PATH, or --large FILE --base FILE --expert NAME=FILE"
_SHIPPED = "demo"
_LOADING = {
    "ctx_size": "n_ctx",
    "gpu_layers": "n_gpu_layers",
    "main_gpu": "main_gpu",
    "tensor_split": "tensor_split",
    "threads": "n_threads",
    "cache_type_k": "type_k",
    "cache_type_v": "type_v",
    "parallel": "n_parallel",
    "overlap": "overlap",
}
_WAYS = ("positional_family", "family", "large", "base", "expert")


@dataclass(frozen=True)
class Options:
    """What the shared options say.

    spec: the family. family: its name or path, None where it is made of files.
    loading: keyword arguments of FusedLlama from `n_ctx` on. settings: keyword arguments of its requests. Both hold
    only what was given. ray: address of a cluster to run on, "local" for one that starts here; None for this process.
    is_named: whether the user named the family; otherwise it is the one that ships.
    """

    spec: FamilySpec
    family: str | None
    loading: dict[str, Any]
    settings: dict[str, Any]
    system: str | None
    ray: str | None = None
    is_named: bool = True

    @classmethod
    def of(cls, ctx: click.Context, values: Mapping[str, Any]) -> Options:
        """From the values of the shared options. Raises InvalidParameterError or FamilyError."""
        from ..families.spec import FamilySpec

        is_named = names_a_family(values)
        family, experts = _source(ctx, values) if is_named else _shipped(), dict(values["expert"])
        if len(experts) < len(values["expert"]):
            raise InvalidParameterError("two experts have the same name")
        spec = FamilySpec.load(family) if family else FamilySpec.from_files(values["large"], values["base"], experts)
        given = {name: value for name, value in values.items() if value not in (None, ())}
        settings = {name: given[name] for name in DEFAULTS if name in given}
        check(settings, [expert.name for expert in spec.experts])
        settings |= _form(values)
        loading = {_LOADING[name]: value for name, value in given.items() if name in _LOADING}
        ray = given.get("ray")
        return cls(spec, family, loading, settings, given.get("system"), ray, is_named)

    @cached_property
    def files(self) -> FamilyFiles:
        """The family's files, read and checked once."""
        from ..families.files import check_files

        return check_files(self.spec)

    def load(self) -> FusedLlama:
        """The family, in memory."""
        from ..api import FusedLlama

        return FusedLlama.from_family(self.files, **{"n_ctx": None, **self.loading})

    def load_on_ray(self) -> RayLlama:
        """The family on the machines of the cluster. Raises InvalidParameterError where Ray is not installed."""
        from ..api import FusedLlama

        try:
            from ..batch.ray import RayLlama
        except ImportError as error:
            raise InvalidParameterError(f"--ray needs Ray: pip install 'edge-dlf[ray]' ({error})") from error
        # By its name, for a machine may keep the family in another folder.
        load = partial(FusedLlama.from_family, self.family or self.spec)
        return RayLlama(load, address=self.ray, **self.loading)


def names_a_family(values: Mapping[str, Any]) -> bool:
    """Whether the shared options name a family in any way."""
    return any(values.get(way) for way in _WAYS)


def _shipped() -> str:
    """The name of the family that ships. Raises InvalidParameterError where none does."""
    from ..families.spec import FILE_NAME

    if not (shipped_dir() / _SHIPPED / FILE_NAME).is_file():
        raise InvalidParameterError(f"no family is named; {_HOW_TO_NAME}")
    return _SHIPPED


def _source(ctx: click.Context, values: Mapping[str, Any]) -> str | None:
    """The family's name or path, None where it is made of files. What is typed goes before the environment."""
    ways = {
        "FAMILY": ["positional_family"],
        "--family": ["family"],
        "--large, --base and --expert": ["large", "base", "expert"],
    }
    given = {way: [name for name in names if values.get(name)] for way, names in ways.items()}
    typed = {
        way: [name for name in names if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        for way, names in given.items()
    }
    chosen = [way for way, names in (typed if any(typed.values()) else given).items() if names]
    if len(chosen) > 1:
        raise InvalidParameterError(f"the family is named both by {chosen[0]} and by {chosen[1]}; one is enough")
    if chosen[0] in ("FAMILY", "--family"):
        return str(values[ways[chosen[0]][0]])
    if missing := [name for name in ways[chosen[0]] if not values[name]]:
        raise InvalidParameterError(f"--{missing[0]} is missing; {_HOW_TO_NAME}")
    return None


class _Numbers(click.ParamType):  # type: ignore[type-arg]
    """One number for all, or NAME=NUMBER,…"""

    def __init__(self, kind: type[int] | type[float]) -> None:
        self.name = "number|name=number"
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return parse_numbers(value, self._kind) if isinstance(value, str) else value
        except InvalidParameterError as error:
            self.fail(str(error), param, ctx)


class _Shares(click.ParamType):  # type: ignore[type-arg]
    """Numbers with commas between them."""

    name = "N,N,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        try:
            return [float(part) for part in value.split(",")] if isinstance(value, str) else value
        except ValueError:
            self.fail(f"expected numbers with commas between them, such as 3,1; not {value!r}", param, ctx)


class _Expert(click.ParamType):  # type: ignore[type-arg]
    """NAME=FILE; in the environment several of them, separated as in PATH."""

    name = "NAME=FILE"
    envvar_list_splitter = os.pathsep

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, Path]:
        name, _, file = value.partition("=")
        if not (name and file):
            self.fail(f"expected NAME=FILE, not {value!r}", param, ctx)
        return name, Path(file)


class _Draft(click.ParamType):  # type: ignore[type-arg]
    """auto, off or a number."""

    name = "auto|off|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return parse("draft", value) if isinstance(value, str) else value


class Parallel(click.ParamType):  # type: ignore[type-arg]
    """auto, or how many at once."""

    name = "auto|N"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto":
            return value
        if not (value.isascii() and value.isdigit() and int(value)):
            self.fail(f"expected auto or a number from 1 on, not {value!r}", param, ctx)
        return int(value)


class _StopString(click.ParamType):  # type: ignore[type-arg]
    """A text; in the environment just one."""

    name = "text"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        return str(value)

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        return [rv]


def _setting(flag: str, kind: Any, about: str) -> Decorator:
    """Option of one setting; the help names the value that holds where the family has none of its own."""
    default = DEFAULTS[flag.lstrip("-").replace("-", "_")]
    return click.option(flag, type=kind, help=about if default is None else f"{about} [{show(default)}]")


_FAMILY: Sequence[Decorator] = (
    click.option("--family", "-f", metavar="NAME|PATH", help="Family: a name, a family.toml, or the folder of one."),
    click.option("--large", type=click.Path(path_type=Path), help="GGUF of the large model, in place of a family."),
    click.option("--base", type=click.Path(path_type=Path), help="GGUF of the base."),
    click.option(
        "--expert", type=_Expert(), multiple=True, help="An expert: a GGUF, or a LoRA over the base. Repeatable."
    ),
)
_SETTINGS: Sequence[Decorator] = (
    _setting("--search", click.Choice(SEARCHES), "How dynamic finds α."),
    _setting("--alpha", _Numbers(float), "α for static: one for all, or NAME=NUMBER,…"),
    _setting("--plausibility", float, "Least probability by an expert, relative to its likeliest token; 0 is off."),
    _setting("--max-tokens", click.IntRange(min=1), "Longest answer [to the end of the context]."),
    _setting("--temperature", float, "0 takes the most likely token."),
    _setting("--top-k", int, "Likely tokens to draw from; 0 for all."),
    _setting("--top-p", float, "Probability of the tokens to draw from."),
    _setting("--min-p", float, "Least probability, relative to the likeliest token."),
    _setting("--repeat-penalty", float, "Penalty on recent tokens; 1 for none."),
    _setting("--seed", int, "Makes runs repeat [a new one each time]."),
    _setting("--draft", _Draft(), "Tokens that an expert runs ahead at each step: auto (what pays), a number, or off."),
    click.option("--stop", type=_StopString(), multiple=True, help="Text that ends the answer. Repeatable."),
    click.option("--system", help="System prompt."),
)
_PLACING: Sequence[Decorator] = (
    click.option(
        "--ctx-size",
        type=click.IntRange(min=1),
        help=f"Tokens of the context [{DEFAULT_N_CTX}]; by itself never more than the large model was trained for.",
    ),
    click.option(
        "--gpu-layers", type=_Numbers(int), help="Layers on the GPU [-1, all]; large=20,base=0 for each member."
    ),
    click.option(
        "--main-gpu", type=_Numbers(int), help="The one GPU to be on, from 0 on; large=0,base=1 for each member."
    ),
    click.option(
        "--tensor-split", type=_Shares(), help="Shares of each GPU, such as 3,1 [what fits; a GPU a member at best]."
    ),
    click.option("--cache-type-k", help="Type of the KV cache's keys, such as q8_0 [f16]."),
    click.option("--cache-type-v", help="Type of the KV cache's values [f16]."),
)
_COMPUTING: Sequence[Decorator] = (
    click.option("--threads", type=click.IntRange(min=1), help="CPU threads [the physical cores]."),
    click.option(
        "--overlap",
        type=click.Choice(("auto", *OVERLAPS)),
        help="Members on GPUs at the same time: auto (what is fastest, measured once), or how.",
    ),
)
_FORM: Sequence[Decorator] = (
    click.option("--grammar", type=click.File(encoding="utf-8"), help="File of a GBNF grammar that answers keep to."),
    click.option("--json-schema", type=click.File("rb"), help="File of a JSON schema that answers are JSON of."),
)
family_argument = click.argument("positional_family", metavar="[FAMILY]", required=False)
EPILOG = (
    "In brackets: what holds where neither you nor the family says otherwise. Every option can also be given as an "
    "environment variable: EDGE_DLF_FAMILY, EDGE_DLF_TEMPERATURE, …"
)
method_option = _setting("--method", str, "dynamic, static, large, base, or the name of an expert.")


def files_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --large, --base and --expert."""
    for add in reversed(_FAMILY[1:]):
        command = add(command)
    return command


def shared_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that `Options.of` reads."""
    for add in reversed((*_FAMILY, *_SETTINGS, *_PLACING, *_COMPUTING)):
        command = add(command)
    return command


def measuring_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that name a family and say how it is computed, but for the size of the context."""
    for add in reversed((*_FAMILY, *_PLACING[1:], *_COMPUTING)):
        command = add(command)
    return command


def form_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add --grammar and --json-schema."""
    for add in reversed(_FORM):
        command = add(command)
    return command


def _form(values: Mapping[str, Any]) -> dict[str, Any]:
    """What answers must look like. Raises InvalidParameterError."""
    form: dict[str, Any] = {}
    if file := values.get("grammar"):
        try:
            form["grammar"] = file.read()
        except UnicodeDecodeError as error:
            raise InvalidParameterError(f"{file.name}: no UTF-8 ({error.reason})") from None
    if file := values.get("json_schema"):
        try:
            form["json_schema"] = json.load(file)
        except (ValueError, RecursionError) as error:
            raise InvalidParameterError(f"{file.name}: no JSON ({error})") from None
        if not isinstance(form["json_schema"], dict):
            raise InvalidParameterError(f"{file.name}: a JSON schema is an object")
    if len(form) == 2:
        raise InvalidParameterError("answers keep to a grammar or to a JSON schema, not to both")
    return form


def placing_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """Add the options that name a family and say what memory it takes where."""
    for add in reversed((*_FAMILY, *_PLACING)):
        command = add(command)
    return command
