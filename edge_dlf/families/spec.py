"""`family.toml` → `FamilySpec`: which files make a family, by which names, with which defaults."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from ..errors import FamilyError, InvalidParameterError, require, shown
from ..gguf.shards import shard_names
from ..params import METHODS, Number, check_settings, profile_of, settable
from ..system.paths import CATALOGUE, expanded, models_dir, shipped_dir
from .hub_cache import cached, check_names

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Table: TypeAlias = dict[str, Any]

FILE_NAME = "family.toml"
_MAX_FILE_BYTES, _MAX_DOTS, _MAX_EXPERTS = 1 << 20, 1000, 1000
NAME_RULE = "letters, digits, '.', '_' and '-', and begin with a letter or digit"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True)
class ModelSource:
    """Where a GGUF is: a `path` on this machine, or a `file` of a Hugging Face `repo`.

    file: of a model in several files the first. sha256: of each of its files in turn, or none.
    """

    path: Path | None = None
    repo: str | None = None
    file: str | None = None
    revision: str | None = None
    sha256: tuple[str, ...] = ()

    @property
    def local_file(self) -> Path | None:
        """The file on this machine; None if it is yet to be downloaded."""
        if self.repo and self.file:
            return cached(self.repo, self.file, self.revision)
        return self.path

    @property
    def local_files(self) -> tuple[Path, ...]:
        """Every file of the model that is on this machine; a split model has several."""
        path = self.local_file
        paths = [path.with_name(name) for name in shard_names(path.name)] if path else []
        return tuple(path for path in paths if path.is_file())

    def local_path(self) -> Path:
        """The file on this machine. Raises FamilyError if it is yet to be downloaded."""
        path = self.local_file
        if path is None:
            raise FamilyError(f"{self.file} of {self.repo} is not on this machine; `edge-dlf pull` downloads it")
        return path


@dataclass(frozen=True)
class ExpertSpec:
    """One expert: a model, a LoRA over the base, or several LoRAs with scales.

    files: (file, scale) pairs. A file without a scale is the only one; its header tells whether it is a LoRA.
    as_corrector: whether it is added to the large model without the base, whatever its header says.
    """

    name: str
    files: tuple[tuple[ModelSource, float | None], ...]
    as_corrector: bool = False


@dataclass(frozen=True)
class FamilySpec:
    """One large model, one base and at least one expert.

    base: also the model that LoRA experts go over; where all experts are correctors it is that alone.
    defaults: fields of FusionParams and SamplingParams by name.
    profiles: name -> settings as in `defaults`, which hold where the profile is chosen.
    profile: the one that is chosen for all requests.
    examples: prompts that show what the family can do.
    origin: the name or path that it was loaded by.
    """

    name: str
    large: ModelSource
    base: ModelSource
    experts: tuple[ExpertSpec, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)
    profiles: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    profile: str | None = None
    examples: tuple[str, ...] = ()
    origin: str | None = field(default=None, compare=False)

    def settings(self, profile: str | None = None) -> dict[str, Any]:
        """Return the defaults, under the settings of `profile`, or else of the chosen one.

        Raises InvalidParameterError for an unknown profile.
        """
        return {**self.defaults, **profile_of(self.profiles, profile or self.profile)}

    def choosing(self, profile: str | None) -> FamilySpec:
        """Return the family with another profile chosen. Raises InvalidParameterError for an unknown one."""
        profile_of(self.profiles, profile)
        return dataclasses.replace(self, profile=profile)

    @property
    def members(self) -> tuple[tuple[str, ModelSource, float | None], ...]:
        """(role, file, scale) of every file in the order large, base, experts; None for a file without a scale."""
        experts = [(expert.name, source, scale) for expert in self.experts for source, scale in expert.files]
        return (("large", self.large, None), ("base", self.base, None), *experts)

    @property
    def sources(self) -> tuple[ModelSource, ...]:
        """Every file, in the order of `members`."""
        return tuple(source for _, source, _ in self.members)

    @property
    def local_files(self) -> list[Path | None]:
        """The file of each source on this machine; None for one that is yet to be downloaded."""
        return [source.local_file for source in self.sources]

    @property
    def is_downloaded(self) -> bool:
        """Whether no file is yet to be downloaded."""
        return None not in self.local_files

    def check_is_here(self) -> None:
        """Raise FamilyError where a file is yet to be downloaded."""
        missing = [source for source in dict.fromkeys(self.sources) if source.local_file is None]
        if missing:
            more = f" and {len(missing) - 1} more are" if len(missing) > 1 else " is"
            raise FamilyError(
                f"{self.name}: {missing[0].file}{more} not on this machine; "
                f"`edge-dlf pull {self.origin or self.name}` downloads what is missing"
            )

    @classmethod
    def load(cls, family: str | Path) -> FamilySpec:
        """Read the family in a `family.toml`, in the folder that holds one, or of that name in the models folder.

        Relative paths count from the file's folder. Raises FamilyError, which names the file and the reason.
        """
        path = find_family(family)
        try:
            return dataclasses.replace(cls.from_table(read_toml(path), path.parent), origin=str(family))
        except InvalidParameterError as error:
            raise FamilyError(f"{path}: {error}") from error
        except OSError as error:
            raise FamilyError(f"{path}: {(error.strerror or str(error)).lower()}") from error

    @classmethod
    def from_table(cls, table: Table, folder: Path) -> FamilySpec:
        """Make a family of the contents of a `family.toml` in `folder`. Raises InvalidParameterError."""
        _known(table, {"name", "large", "base", "experts", "defaults", "profiles", "examples"}, "the file")
        name = table.get("name")
        require(is_name(name), f"name must have {NAME_RULE}, not {shown(name)}")
        sources = {}
        for role in ("large", "base"):
            require(isinstance(table.get(role), dict), f"needs a table [{role}]")
            sources[role] = _source(table[role], folder, f"[{role}]")
        experts = table.get("experts", [])
        require(
            isinstance(experts, list) and all(isinstance(expert, dict) for expert in experts),
            "experts must be tables, [[experts]]",
        )
        names = [expert.get("name") for expert in experts]
        _check_names(names)
        defaults = _settings(table.get("defaults", {}), "defaults")
        check_settings(defaults, names)
        examples = table.get("examples", [])
        require(isinstance(examples, list), "examples must be a list of prompts")
        return cls(
            name=str(name),
            large=sources["large"],
            base=sources["base"],
            experts=tuple(_expert(expert, folder) for expert in experts),
            defaults=defaults,
            profiles=_profiles(table.get("profiles", {}), defaults, names),
            examples=tuple(_text(example, "an example") for example in examples),
        )

    @classmethod
    def from_files(
        cls,
        large: str | Path,
        base: str | Path,
        experts: Mapping[str, str | Path | Sequence[tuple[str | Path, float]]],
        as_correctors: Collection[str] = (),
    ) -> FamilySpec:
        """Make a family of files: `experts` maps a name to a GGUF (a model or a LoRA) or to [(LoRA, scale), …].

        as_correctors: names of experts that are correctors of this large model, whatever their headers say.

        Raises InvalidParameterError.
        """
        folder = Path()
        specs = []
        require(isinstance(experts, Mapping), f"experts must map names to files, not {shown(experts)}")
        of_large, of_base = _local(large, folder, "large"), _local(base, folder, "base")
        for name, files in experts.items():
            pairs = [(files, None)] if isinstance(files, str | os.PathLike) else _pairs(name, files)
            where = f"expert {shown(name)}"
            sources = tuple((_local(file, folder, where), scale) for file, scale in pairs)
            specs.append(ExpertSpec(name, sources, name in as_correctors))
        _check_names([spec.name for spec in specs])
        for name in as_correctors:
            require(name in experts, f"as_corrector names {shown(name)}; the experts are {', '.join(experts)}")
        return cls(Path(large).stem, of_large, of_base, tuple(specs))


def is_name(text: Any) -> bool:
    """Whether `text` may be the name of a family or an expert."""
    return isinstance(text, str) and bool(_NAME.fullmatch(text))


def check_profile_name(name: str) -> None:
    """Raise InvalidParameterError for a name that no profile may have: a server's model is FAMILY:PROFILE."""
    require(is_name(name), f"a profile's name must have {NAME_RULE}, not {shown(name)}")
    require(name not in METHODS, f"a profile cannot be named {shown(name)}: that is a role or a method")


def find_family(family: str | Path) -> Path:
    """The `family.toml` that a path or a name stands for."""
    path = expanded(family)
    candidates = [path, path / FILE_NAME]
    if is_name(family):
        candidates += [folder / str(family) / FILE_NAME for folder in (models_dir(), shipped_dir())]
    try:
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        exists = path.exists() and not path.is_dir()
    except (OSError, ValueError) as error:
        raise FamilyError(f"{family}: {error}") from error
    if exists:
        raise FamilyError(f"{family}: is not a regular file")
    if family in catalogue_names():
        raise FamilyError(f"{family} is in the catalogue and not yet on this machine: `edge-dlf pull {family}`")
    looked = ", ".join(map(str, candidates))
    raise FamilyError(f"{family}: no such family; looked for {looked}; `edge-dlf list` names those that are here")


def catalogue_names() -> list[str]:
    """The families of the catalogue that ships with edge-dlf."""
    path = shipped_dir() / CATALOGUE
    return [family["name"] for family in read_toml(path)["families"]] if path.is_file() else []


def read_toml(path: Path) -> Table:
    """The file's table. Raises OSError, and InvalidParameterError where it is no TOML."""
    with path.open("rb") as file:
        return parse_toml(file.read(_MAX_FILE_BYTES + 1))


def parse_toml(content: bytes) -> Table:
    """The table of a family.toml of these bytes. Raises InvalidParameterError where it is no TOML."""
    is_model = content.startswith(b"GGUF")
    require(not is_model, "is a model; a family is made of several: give --large, --base and --expert")
    require(len(content) <= _MAX_FILE_BYTES, "is larger than 1 MiB, so it is no family.toml")
    # A key of so many parts takes Python's parser minutes.
    has_long_key = any(line.count(b".") > _MAX_DOTS for line in content.splitlines())
    require(not has_long_key, f"has a line with more than {_MAX_DOTS} dots, so it is no family.toml")
    try:
        table: Table = tomllib.loads(content.decode("utf-8-sig"))
        return table
    except (ValueError, RecursionError) as error:  # also for bytes that are not UTF-8, a number of thousands of digits
        raise InvalidParameterError(f"is not valid TOML: {error}") from error


def _check_names(names: Sequence[Any]) -> None:
    require(names, "has no expert; it needs at least one")
    require(len(names) <= _MAX_EXPERTS, f"has {len(names)} experts, more than {_MAX_EXPERTS}")
    for name in names:
        require(is_name(name), f"an expert's name must have {NAME_RULE}, not {shown(name)}")
        require(name not in METHODS, f"an expert cannot be named {shown(name)}: that is a role or a method")
        require(names.count(name) == 1, f"two experts are named {shown(name)}")


def _known(table: Table, keys: set[str], where: str) -> None:
    unknown = sorted(table.keys() - keys)
    require(not unknown, f"{where} has the unknown key {', '.join(map(shown, unknown[:9]))}")


def _text(value: Any, where: str) -> str:
    require(isinstance(value, str) and value, f"{where} must be a non-empty string, not {shown(value)}")
    require(not _CONTROL.search(value), f"{where} must not have control characters: {shown(value)}")
    return str(value)


def _local(path: Any, folder: Path, where: str) -> ModelSource:
    text = os.fspath(path) if isinstance(path, os.PathLike) else path
    return ModelSource(path=folder / expanded(_text(text, f"the path of {where}")))


def _source(table: Table, folder: Path, where: str, also: frozenset[str] = frozenset()) -> ModelSource:
    """A model given by `path`, or by `repo` and `file`."""
    if "path" in table:
        _known(table, {"path", "sha256", *also}, f"{where}, which has a path,")
        return dataclasses.replace(_local(table["path"], folder, where), sha256=_sha256(table, where))
    require("repo" in table and "file" in table, f"{where} needs a path, or a repo and a file")
    _known(table, {"repo", "file", "revision", "sha256", *also}, where)
    texts = {key: _text(table[key], f"{key} of {where}") for key in ("repo", "file", "revision") if key in table}
    repo, file, revision = texts["repo"], texts["file"], texts.get("revision")
    check_names(repo, file, revision)
    hashes = _sha256(table, where)
    is_complete = len(hashes) in (0, len(shard_names(file)))
    require(is_complete, f"{where} has {len(hashes)} in sha256 and {len(shard_names(file))} files")
    return ModelSource(None, repo, file, revision, hashes)


def _sha256(table: Table, where: str) -> tuple[str, ...]:
    given = table.get("sha256", [])
    hashes = tuple(given if isinstance(given, list) else [given])
    are_hashes = all(isinstance(sha256, str) and re.fullmatch("[0-9a-fA-F]{64}", sha256) for sha256 in hashes)
    require(are_hashes, f"sha256 of {where} must be 64 hexadecimal digits")
    return tuple(sha256.lower() for sha256 in hashes)


def _expert(table: Table, folder: Path) -> ExpertSpec:
    name = str(table["name"])
    where = f"expert {shown(name)}"
    as_corrector = table.get("as_corrector", False)
    require(isinstance(as_corrector, bool), f"as_corrector of {where} must be true or false, not {shown(as_corrector)}")
    if "lora" not in table:
        source = _source(table, folder, where, frozenset({"name", "as_corrector"}))
        return ExpertSpec(name, ((source, None),), as_corrector)
    _known(table, {"name", "lora", "scale", "as_corrector"}, f"{where}, which has a lora,")
    loras = table["lora"] if isinstance(table["lora"], list) else [table["lora"]]
    scales = table.get("scale", [1.0] * len(loras))
    scales = scales if isinstance(scales, list) else [scales]
    require(len(scales) == len(loras), f"{where} has {len(loras)} in lora and {len(scales)} in scale")
    pairs = _pairs(name, list(zip(loras, scales, strict=True)))
    return ExpertSpec(name, tuple((_local(lora, folder, where), scale) for lora, scale in pairs), as_corrector)


def _pairs(name: Any, files: Any) -> list[tuple[Any, float]]:
    """[(LoRA, scale), …], checked."""
    where = f"expert {shown(name)}"
    require(isinstance(files, Sequence) and len(files) > 0, f"{where} needs a file, or [(LoRA, scale), …]")
    for pair in files:
        require(isinstance(pair, Sequence) and len(pair) == 2, f"{where} needs pairs (LoRA, scale), not {shown(pair)}")
    return [(lora, Number().read(f"a scale of {where}", scale)) for lora, scale in files]


def _settings(table: Any, name: str) -> Table:
    """The table of that name, each value checked and converted."""
    require(isinstance(table, dict), f"{name} must be a table, [{name}]")
    known = settable("family")
    _known(table, set(known), f"[{name}]")
    return {name: known[name].read(value) for name, value in table.items()}


def _profiles(table: Any, defaults: Table, experts: Sequence[str]) -> dict[str, Table]:
    """The settings of each profile, which are usable over the defaults."""
    require(isinstance(table, dict), "profiles must be tables, [profiles.NAME]")
    profiles = {}
    for name, own in table.items():
        check_profile_name(name)
        profiles[name] = _settings(own, f"profiles.{name}")
        try:
            check_settings({**defaults, **profiles[name]}, experts)
        except InvalidParameterError as error:
            raise InvalidParameterError(f"[profiles.{name}]: {error}") from error
    return profiles
