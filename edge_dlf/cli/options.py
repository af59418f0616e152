"""Options that the commands share: which family, how it is loaded, how it answers."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click
from click.core import ParameterSource

from ..errors import InvalidParameterError, require
from ..params import OVERLAPS, SETTINGS, ByName, Kind, Number, Setting, Text, Texts, check_settings, settable
from ..system.jsonl import parse_object
from ..system.machine import MAX_THREADS
from ..system.paths import shipped_dir
from .screen import show
from .streams import read_all

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
    "prompt_cache": "prompt_cache",
}
_WAYS = {
    "FAMILY": ["positional_family"],
    "--family": ["family"],
    "--large, --base and --expert": ["large", "base", "expert"],
}
"""Ways to name a family, and the options of each."""


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
        family = _source(ctx, values) if is_named else _shipped()
        if family and values["as_corrector"]:
            raise InvalidParameterError("--as-corrector goes with --expert; a family.toml has as_corrector = true")
        spec = FamilySpec.load(family) if family else spec_of_files(values)
        given = {name: value for name, value in values.items() if value not in (None, ())}
        settings = {name: s.read(given[name]) for name, s in settable("command line").items() if name in given}
        spec = spec.choosing(settings.pop("profile", None))
        check_settings({**spec.settings(), **settings}, [expert.name for expert in spec.experts])
        settings |= _form(values)
        loading = {_LOADING[name]: value for name, value in given.items() if name in _LOADING}
        ray = given.get("ray")
        return cls(spec, family, loading, settings, given.get("system"), ray, is_named)

    def methods(self, files: FamilyFiles) -> tuple[str, ...]:
        """Return the methods to set side by side. "weighted" is one where the user or the family gives weights."""
        has_weights = {**self.spec.settings(), **self.settings}.get("weights") is not None
        experts = [expert.name for expert in self.spec.experts]
        wanted = ("large", *experts, "static", "blend", *(["weighted"] if has_weights else []), "dynamic")
        return tuple(name for name in wanted if name in files.methods)

    @cached_property
    def files(self) -> FamilyFiles:
        """The family's files, read and checked once."""
        from ..families.files import check_files

        return check_files(self.spec)

    @property
    def cache(self) -> dict[str, Any]:
        """Size and types of the KV cache, which an answer can depend on."""
        default = {"n_ctx": DEFAULT_N_CTX, "type_k": "f16", "type_v": "f16"}
        return {name: self.loading.get(name, value) for name, value in default.items()}

    def load(self) -> FusedLlama:
        """The family, in memory."""
        from ..api import FusedLlama

        self.files.roles({**self.files.spec.settings(), **self.settings})
        return FusedLlama.from_family(self.files, **{"n_ctx": None, **self.loading})

    def load_on_ray(self) -> RayLlama:
        """The family on the machines of the cluster. Raises InvalidParameterError where Ray is not installed."""
        from ..api import FusedLlama

        try:
            from ..batch.ray import RayLlama
        except ImportError as error:
            raise InvalidParameterError(f"--ray needs Ray: pip install 'edge-dlf[ray]' ({error})") from error
        # By its name, for a machine may keep the family in another folder.
        load = partial(FusedLlama.from_family, self.family or self.spec, profile=self.spec.profile)
        return RayLlama(load, address=self.ray, **self.loading)


def spec_of_files(values: Mapping[str, Any]) -> FamilySpec:
    """The family that --large, --base, --expert and --as-corrector make. Raises InvalidParameterError."""
    from ..families.spec import FamilySpec

    experts = dict(values["expert"])
    require(len(experts) == len(values["expert"]), "two experts have the same name")
    return FamilySpec.from_files(values["large"], values["base"], experts, values["as_corrector"])


def names_a_family(values: Mapping[str, Any]) -> bool:
    """Whether the shared options name a family in any way."""
    return any(values.get(name) for names in _WAYS.values() for name in names)


def _shipped() -> str:
    """The name of the family that ships. Raises InvalidParameterError where none does."""
    from ..families.spec import FILE_NAME

    require((shipped_dir() / _SHIPPED / FILE_NAME).is_file(), f"no family is named; {_HOW_TO_NAME}")
    return _SHIPPED


def _source(ctx: click.Context, values: Mapping[str, Any]) -> str | None:
    """The family's name or path, None where it is made of files. What is typed goes before the environment."""
    given = {way: [name for name in names if values.get(name)] for way, names in _WAYS.items()}
    typed = {
        way: [name for name in names if ctx.get_parameter_source(name) is ParameterSource.COMMANDLINE]
        for way, names in given.items()
    }
    chosen = [way for way, names in (typed if any(typed.values()) else given).items() if names]
    if len(chosen) > 1:
        raise InvalidParameterError(f"the family is named both by {chosen[0]} and by {chosen[1]}; one is enough")
    if chosen[0] in ("FAMILY", "--family"):
        return str(values[_WAYS[chosen[0]][0]])
    if missing := [name for name in _WAYS[chosen[0]] if not values[name]]:
        raise InvalidParameterError(f"--{missing[0]} is missing; {_HOW_TO_NAME}")
    return None


class _Typed(click.ParamType):  # type: ignore[type-arg]
    """A value of a kind that settings have; its errors are the kind's own."""

    def __init__(self, kind: Kind) -> None:
        self.name = kind.name
        self._kind = kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        is_text = isinstance(value, str) and not isinstance(self._kind, Texts)
        return self._kind.read(param.opts[0] if param else self.name, self._kind.parse(value)) if is_text else value

    def split_envvar_value(self, rv: str) -> Sequence[str]:
        return [rv]


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


def _option(setting: Setting) -> Decorator:
    """Option of one setting; the help names the value that holds where the family has none of its own."""
    kind, help = setting.kind, setting.help
    if setting.default is not None:
        help += f" [{show(setting.default)}]"
    flag = f"--{setting.name.replace('_', '-')}"
    is_many = isinstance(kind, Texts)
    if is_many:
        help += " Repeatable."
    choices = kind.choices if isinstance(kind, Text) else ()
    kind_of_value = click.Choice(choices) if choices else _Typed(kind)
    return click.option(flag, type=kind_of_value, multiple=is_many, help=help)


_FAMILY: Sequence[Decorator] = (
    click.option("--family", "-f", metavar="NAME|PATH", help="Family: a name, a family.toml, or the folder of one."),
    click.option("--large", type=click.Path(path_type=Path), help="GGUF of the large model, in place of a family."),
    click.option("--base", type=click.Path(path_type=Path), help="GGUF of the base."),
    click.option(
        "--expert", type=_Expert(), multiple=True, help="An expert: a GGUF, or a LoRA over the base. Repeatable."
    ),
    click.option(
        "--as-corrector",
        metavar="NAME",
        multiple=True,
        help="Take this --expert as a corrector of --large, whatever its file says. Repeatable.",
    ),
)
_SETTINGS: Sequence[Decorator] = (
    *(_option(setting) for name, setting in settable("command line").items() if name != "method"),
    click.option("--system", help="System prompt."),
)
_BY_MEMBER = _Typed(ByName(Number(is_whole=True)))
_PLACING: Sequence[Decorator] = (
    click.option(
        "--ctx-size",
        type=click.IntRange(min=1),
        help=f"Tokens of the context [{DEFAULT_N_CTX}]; by itself never more than the large model was trained for.",
    ),
    click.option("--gpu-layers", type=_BY_MEMBER, help="Layers on the GPU [-1, all]; large=20,base=0 for each member."),
    click.option(
        "--main-gpu", type=_BY_MEMBER, help="The one GPU to be on, from 0 on; large=0,base=1 for each member."
    ),
    click.option(
        "--tensor-split", type=_Shares(), help="Shares of each GPU, such as 3,1 [what fits; a GPU a member at best]."
    ),
    click.option("--cache-type-k", help="Type of the KV cache's keys, such as q8_0 [f16]."),
    click.option("--cache-type-v", help="Type of the KV cache's values [f16]."),
)
_COMPUTING: Sequence[Decorator] = (
    click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="CPU threads [the physical cores]."),
    click.option(
        "--overlap",
        type=click.Choice(("auto", *OVERLAPS)),
        help="Members on GPUs at the same time: auto (what is fastest, measured once), or how.",
    ),
)
prompt_cache_option = click.option(
    "--prompt-cache", metavar="DIR", help="Folder that keeps what was read of long prompts, for later runs."
)
family_argument = click.argument("positional_family", metavar="[FAMILY]", required=False)
EPILOG = (
    "In brackets: what holds where neither you nor the family says otherwise. Every option can also be given as an "
    "environment variable: EDGE_DLF_FAMILY, EDGE_DLF_TEMPERATURE, …"
)
method_option = _option(SETTINGS["method"])
POSITIVE = _Typed(Number(0, is_open=True))
FACTOR = _Typed(Number(0, 1_000_000, is_open=True))
SEED = _Typed(Number(0, 2**64 - 1, is_whole=True))
PARALLEL = _Typed(Number(1, is_whole=True, words=("auto",)))


def _adding(*options: Decorator) -> Decorator:
    """Add the options to a command, in this order."""

    def add(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return add


files_options = _adding(*_FAMILY[1:])
shared_options = _adding(*_FAMILY, *_SETTINGS, *_PLACING, *_COMPUTING)
"""What `Options.of` reads."""
measuring_options = _adding(*_FAMILY, *_PLACING[1:], *_COMPUTING)
"""Which family, and how it is computed, but for the size of the context."""
reading_options = _adding(*_FAMILY, *_PLACING, *_COMPUTING)
"""Which family, and how it is computed."""
placing_options = _adding(*_FAMILY, *_PLACING)
"""Which family, and how much memory it takes where."""
form_options = _adding(
    click.option("--grammar", type=click.File("rb"), help="File of a GBNF grammar that answers keep to."),
    click.option("--json-schema", type=click.File("rb"), help="File of a JSON schema that answers are JSON of."),
)


def _form(values: Mapping[str, Any]) -> dict[str, Any]:
    """What answers must look like. Raises InvalidParameterError."""
    form: dict[str, Any] = {}
    if file := values.get("grammar"):
        try:
            form["grammar"] = read_all(file, file.name).decode()
        except UnicodeDecodeError as error:
            raise InvalidParameterError(f"{file.name}: no UTF-8 ({error.reason})") from None
    if file := values.get("json_schema"):
        try:
            form["json_schema"] = parse_object(read_all(file, file.name))
        except ValueError as error:
            raise InvalidParameterError(f"{file.name}: {error}") from None
    require(len(form) < 2, "answers keep to a grammar or to a JSON schema, not to both")
    return form
