"""The families on this machine: listing, pinning to the hub, writing and removing them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomlkit

from ..errors import DownloadError, EdgeDLFError, FamilyError, InvalidParameterError
from ..gguf.shards import shard_names
from ..system.durable import replacing
from ..system.paths import models_dir, shipped_dir
from . import hub_cache
from .catalogue import read_catalogue
from .hub import HubFile, Repo, of_quant, read_repo
from .hub_cache import CachedFile
from .spec import FILE_NAME, ExpertSpec, FamilySpec, ModelSource, is_name


@dataclass(frozen=True)
class Installed:
    """A family in the models folder, or one that ships with edge-dlf; `problem` says why it cannot be read."""

    name: str
    folder: Path
    spec: FamilySpec | None
    problem: str | None

    @property
    def is_complete(self) -> bool:
        """Whether all its files are on this machine."""
        return self.spec is not None and all(file and file.exists() for file in self.spec.local_files)

    @property
    def files(self) -> list[Path]:
        """Every file of the family that is on this machine."""
        sources = self.spec.sources if self.spec else ()
        return list(dict.fromkeys(path for source in sources for path in source.local_files))

    @property
    def hub_files(self) -> list[CachedFile]:
        """Its files that are in the hub's cache."""
        return [file for file in map(hub_cache.locate, self.files) if file]


def installed() -> list[Installed]:
    """Every family that goes by a name, those of the models folder first."""
    families: dict[str, Installed] = {}
    for folder in (models_dir(), shipped_dir()):
        for path in sorted(folder.glob(f"*/{FILE_NAME}")):
            name = path.parent.name
            if is_name(name) and name not in families:
                try:
                    spec, problem = replace(FamilySpec.load(path), origin=name), None
                except EdgeDLFError as error:
                    spec, problem = None, str(error)
                families[name] = Installed(name, path.parent, spec, problem)
    return list(families.values())


def is_installed(name: str) -> bool:
    """Whether a family of that name is in the models folder or ships with edge-dlf, readable or not."""
    return name in {family.name for family in installed()}


def plan_pull(spec: FamilySpec) -> tuple[FamilySpec, list[HubFile]]:
    """Ask the hub for the files of `spec`, and pin it to their revisions and hashes; nothing is downloaded yet.

    Raises DownloadError.
    """
    repos: dict[tuple[str, str | None], Repo] = {}
    files: dict[HubFile, None] = {}

    def pinned(source: ModelSource) -> ModelSource:
        if source.repo is None or source.file is None:
            return source
        key = (source.repo, source.revision)
        if key not in repos:
            repos[key] = read_repo(*key)
        found = [repos[key].file(name) for name in shard_names(source.file)]
        for file, sha256 in zip(found, source.sha256, strict=False):
            if file.sha256 != sha256:
                raise DownloadError(
                    f"{file.name} of {file.repo} is not the file that {spec.name} names: its sha256 is "
                    f"{str(file.sha256)[:12]}…, not {sha256[:12]}…; nothing was downloaded"
                )
        files.update(dict.fromkeys(found))
        hashes = tuple(file.sha256 for file in found if file.sha256)
        return replace(source, revision=repos[key].commit, sha256=hashes if len(hashes) == len(found) else ())

    return change_sources(spec, pinned), list(files)


def change_sources(spec: FamilySpec, change: Callable[[ModelSource], ModelSource]) -> FamilySpec:
    """The same family with `change` applied to each source."""
    experts = tuple(
        replace(expert, files=tuple((change(source), scale) for source, scale in expert.files))
        for expert in spec.experts
    )
    return replace(spec, large=change(spec.large), base=change(spec.base), experts=experts)


def note_revisions(asked: FamilySpec, pinned: FamilySpec) -> None:
    """Keep which commits the branches that `asked` names stood for, so that it too finds its files."""
    for source, found in zip(asked.sources, pinned.sources, strict=True):
        if source.repo and found.revision:
            hub_cache.note_revision(source.repo, source.revision, found.revision)


def from_cache(spec: FamilySpec) -> FamilySpec:
    """`spec` with the revisions that the cache has. Raises FamilyError where a file is not there."""
    spec.check_is_here()

    def pinned(source: ModelSource) -> ModelSource:
        commit = hub_cache.commit_of(source.repo, source.revision) if source.repo else None
        return replace(source, revision=commit) if commit else source

    return change_sources(spec, pinned)


def as_hub_source(source: ModelSource) -> ModelSource:
    """A file of the hub's cache by its repository, commit and hash; any other by its full path."""
    assert source.path is not None, "a file on this machine"
    cached = hub_cache.locate(source.path)
    if cached is None:
        return ModelSource(source.path.absolute())
    blobs = tuple(shard.path.resolve().name for shard in cached.shards)
    are_hashes = all(re.fullmatch("[0-9a-f]{64}", blob) for blob in blobs)
    return ModelSource(None, *cached, blobs if are_hashes else ())


def write_family(spec: FamilySpec) -> Path:
    """Write `family.toml` of a new family into the models folder; returns its path.

    Raises FamilyError where there is one, InvalidParameterError for names that no TOML can hold.
    """
    folder = models_dir() / spec.name
    if folder.is_symlink() or (folder / FILE_NAME).is_symlink() or (folder / FILE_NAME).exists():
        raise FamilyError(f"{spec.name} is there already, in {folder}; `edge-dlf rm {spec.name}` removes it")
    experts = [_expert_table(expert) for expert in spec.experts]
    table = {"name": spec.name, "large": _table(spec.large), "base": _table(spec.base), "experts": experts}
    if spec.defaults:
        table["defaults"] = _plain(spec.defaults)
    if spec.profiles:
        table["profiles"] = {name: _plain(settings) for name, settings in spec.profiles.items()}
    try:
        content = tomlkit.dumps(table).encode()
    except UnicodeEncodeError:
        complaint = "a family.toml is UTF-8, which the name of one of these files is not; rename the file"
        raise InvalidParameterError(complaint) from None
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / FILE_NAME) as file:
        file.write(content)
    return folder / FILE_NAME


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings as TOML holds them, with text for every key."""
    return {
        name: {str(key): each for key, each in value.items()} if isinstance(value, dict) else value
        for name, value in settings.items()
    }


def _table(source: ModelSource) -> dict[str, Any]:
    if source.repo is None:
        return {"path": str(source.path)}
    sha256 = source.sha256[0] if len(source.sha256) == 1 else list(source.sha256)
    table = {"repo": source.repo, "file": source.file, "revision": source.revision, "sha256": sha256}
    return {key: value for key, value in table.items() if value}


def _expert_table(expert: ExpertSpec) -> dict[str, Any]:
    loras, scales = zip(*expert.files, strict=True)
    table: dict[str, Any] = {"name": expert.name, **({"as_corrector": True} if expert.as_corrector else {})}
    if scales == (None,):
        return {**table, **_table(loras[0])}
    return {**table, "lora": [str(source.path) for source in loras], "scale": list(scales)}


@dataclass(frozen=True)
class Removal:
    """What removing `name` deletes.

    paths: files outside the cache, and partial downloads.
    hub_files: files of the hub's cache.
    folder: the family's folder, removed too if nothing else is in it.
    kept: files of the cache that stay because other families name them.
    """

    name: str
    paths: tuple[Path, ...]
    hub_files: tuple[CachedFile, ...] = ()
    folder: Path | None = None
    kept: tuple[CachedFile, ...] = ()

    @property
    def n_bytes(self) -> int:
        """Bytes of all files together."""
        contents = {path.resolve() for path in (*self.paths, *(file.path for file in self.hub_files))}
        return sum(path.stat().st_size for path in contents if path.is_file())


def plan_removal(name: str) -> Removal:
    """What removing a family deletes, or what is left of a family of the catalogue. Raises FamilyError."""
    families = {family.name: family for family in installed()}
    family, catalogue = families.get(name), read_catalogue()
    if family is None and name not in catalogue:
        raise FamilyError(f"{name}: no such family")
    if family and family.folder.parent != models_dir():
        raise FamilyError(f"{name} ships with edge-dlf and stays")
    if family and family.folder.is_symlink():
        return Removal(name, (family.folder,))
    listed = family or Installed(name, models_dir() / name, catalogue[name].spec, None)
    repos = dict.fromkeys(source.repo for source in (listed.spec.sources if listed.spec else ()) if source.repo)
    paths = [path for repo in repos for path in hub_cache.partial_downloads(repo)]
    if family:
        paths += [family.folder / FILE_NAME, *(path for path in family.files if path.parent == family.folder)]
    if not paths and not listed.hub_files:
        raise FamilyError(f"{name}: is in the catalogue, and not on this machine")
    used = {file for other in families.values() if other.name != name for file in other.hub_files}
    removed = tuple(file for file in listed.hub_files if file not in used)
    kept = tuple(file for file in listed.hub_files if file in used)
    return Removal(name, tuple(paths), removed, family.folder if family else None, kept)


def plan_model_removal(repo: str, quant: str | None) -> Removal:
    """What removing the models of a repository deletes, or only those of `quant`. Raises FamilyError."""
    models = [model for model in hub_cache.cached_models() if model.repo == repo]
    files = {file for model in models if not quant or of_quant(model.file, quant) for file in model.shards}
    what = f"{repo}:{quant}" if quant else repo
    partials = [] if quant else hub_cache.partial_downloads(repo)
    if not files and not partials:
        raise FamilyError(f"{what} is not on this machine")
    for family in installed():
        if files.intersection(family.hub_files):
            raise FamilyError(f"{what} belongs to {family.name}; `edge-dlf rm {family.name}` removes both")
    return Removal(what, tuple(partials), tuple(sorted(files)))


def remove(removal: Removal) -> int:
    """Delete the files; returns the bytes freed. Raises FamilyError."""
    freed = 0
    try:
        for path in removal.paths:
            freed += 0 if path.is_symlink() else path.stat().st_size
            path.unlink(missing_ok=True)
        freed += sum(hub_cache.remove(*file) for file in removal.hub_files)
        if removal.folder and not any(removal.folder.iterdir()):
            removal.folder.rmdir()
    except OSError as error:
        raise FamilyError(f"{removal.name}: {error.filename}: {(error.strerror or str(error)).lower()}") from error
    return freed


def parse_repo(text: str) -> tuple[str, str | None] | None:
    """(OWNER/NAME, quantization or None) of a text such as "Qwen/Qwen2.5-7B-Instruct-GGUF:Q4_K_M"; else None."""
    repo, _, quant = text.removeprefix("hf.co/").removeprefix("https://huggingface.co/").partition(":")
    try:
        hub_cache.check_names(repo, "x.gguf", None)
    except InvalidParameterError:
        return None
    return repo, quant or None
