"""The families on this machine: which there are, how one of the hub's comes here, and how one leaves."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import tomli_w

from ..errors import DownloadError, EdgeDLFError, FamilyError, InvalidParameterError
from ..system.paths import models_dir, shipped_dir
from . import hub_cache
from .catalogue import read_catalogue
from .hub import HubFile, Repo, of_quant, read_repo
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
        return self.spec is not None and all(source.place and source.place.exists() for source in self.spec.sources)

    @property
    def n_bytes(self) -> int:
        """Size of its files that are on this machine."""
        return sum(path.stat().st_size for path in _files(self.spec)) if self.spec else 0


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


def _files(spec: FamilySpec) -> list[Path]:
    """Every file of the family that is on this machine, the further ones of split models too."""
    paths = [path.parent / name for path in _places(spec) for name in hub_cache.shards(path.name)]
    return [path for path in dict.fromkeys(paths) if path.is_file()]


def _places(spec: FamilySpec) -> list[Path]:
    return [source.place for source in spec.sources if source.place]


@dataclass(frozen=True)
class Pull:
    """What a pull brings: `spec` with its revisions and hashes pinned, and its files on the hub."""

    spec: FamilySpec
    files: tuple[HubFile, ...]


def plan_pull(spec: FamilySpec) -> Pull:
    """Ask the hub for the files of `spec`; nothing is downloaded yet. Raises DownloadError."""
    repos: dict[tuple[str, str | None], Repo] = {}
    files: dict[HubFile, None] = {}

    def pinned(source: ModelSource) -> ModelSource:
        if source.repo is None or source.file is None:
            return source
        key = (source.repo, source.revision)
        if key not in repos:
            repos[key] = read_repo(*key)
        found = [repos[key].file(name) for name in hub_cache.shards(source.file)]
        for file, sha256 in zip(found, source.sha256, strict=False):
            if file.sha256 != sha256:
                raise DownloadError(
                    f"{file.name} of {file.repo} is not the file that {spec.name} names: its sha256 is "
                    f"{str(file.sha256)[:12]}…, not {sha256[:12]}…; nothing was downloaded"
                )
        files.update(dict.fromkeys(found))
        hashes = tuple(file.sha256 for file in found if file.sha256)
        return replace(source, revision=repos[key].commit, sha256=hashes if len(hashes) == len(found) else ())

    return Pull(change_sources(spec, pinned), tuple(files))


def change_sources(spec: FamilySpec, change: Callable[[ModelSource], ModelSource]) -> FamilySpec:
    """The same family with `change` applied to each source."""
    large, base = change(spec.large), change(spec.base)
    experts = [
        replace(
            expert,
            source=change(expert.source) if expert.source else None,
            loras=tuple((change(source), scale) for source, scale in expert.loras),
        )
        for expert in spec.experts
    ]
    return replace(spec, large=large, base=base, experts=tuple(experts))


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
    place = hub_cache.locate(source.path)
    if place is None:
        return ModelSource(source.path.absolute())
    repo, file, commit = place
    blobs = [(source.path.parent / name).resolve().name for name in hub_cache.shards(source.path.name)]
    are_hashes = all(len(blob) == 64 and not set(blob) - set("0123456789abcdef") for blob in blobs)
    return ModelSource(None, repo, file, commit, tuple(blobs) if are_hashes else ())


def write_family(spec: FamilySpec) -> Path:
    """Write `family.toml` of a new family into the models folder; returns its path. Raises FamilyError."""
    folder = models_dir() / spec.name
    if folder.is_symlink() or (folder / FILE_NAME).is_symlink() or (folder / FILE_NAME).exists():
        raise FamilyError(f"{spec.name} is there already, in {folder}; `edge-dlf rm {spec.name}` removes it")
    folder.mkdir(parents=True, exist_ok=True)
    experts = [_expert_table(expert) for expert in spec.experts]
    table = {"name": spec.name, "large": _table(spec.large), "base": _table(spec.base), "experts": experts}
    if spec.defaults:
        table["defaults"] = {key: _with_text_keys(value) for key, value in spec.defaults.items()}
    part = folder / f"{FILE_NAME}.part"
    part.unlink(missing_ok=True)
    part.write_text(tomli_w.dumps(table), "utf-8")
    return part.replace(folder / FILE_NAME)


def _with_text_keys(value: Any) -> Any:
    return {str(key): each for key, each in value.items()} if isinstance(value, dict) else value


def _table(source: ModelSource) -> dict[str, Any]:
    if source.repo is None:
        return {"path": str(source.path)}
    table: dict[str, Any] = {"repo": source.repo, "file": source.file}
    if source.revision:
        table["revision"] = source.revision
    if source.sha256:
        table["sha256"] = source.sha256[0] if len(source.sha256) == 1 else list(source.sha256)
    return table


def _expert_table(expert: ExpertSpec) -> dict[str, Any]:
    if expert.source:
        return {"name": expert.name, **_table(expert.source)}
    loras, scales = zip(*expert.loras, strict=True)
    return {"name": expert.name, "lora": [str(source.path) for source in loras], "scale": list(scales)}


@dataclass(frozen=True)
class Removal:
    """What goes: `paths`, and `hub_files` (repo, file, commit) of the cache; n_bytes of them together.

    folder: where the family's own files are. kept: files of the cache that other families name too.
    """

    name: str
    paths: tuple[Path, ...]
    hub_files: tuple[tuple[str, str, str], ...]
    n_bytes: int
    folder: Path | None = None
    kept: tuple[str, ...] = ()


def plan_removal(name: str) -> Removal:
    """What removing a family by its name means, or what has come of one of the catalogue. Raises FamilyError."""
    families = {family.name: family for family in installed()}
    family, catalogue = families.get(name), read_catalogue()
    if family is None and name not in catalogue:
        raise FamilyError(f"{name}: no such family")
    if family and family.folder.parent != models_dir():
        raise FamilyError(f"{name} ships with edge-dlf and stays")
    if family and family.folder.is_symlink():
        return Removal(name, (family.folder,), (), 0)
    spec = family.spec if family else catalogue[name].spec
    files = _files(spec) if spec else []
    own = dict.fromkeys(place for place in map(hub_cache.locate, files) if place)
    used = _hub_files(other for other in families.values() if other.name != name)
    repos = dict.fromkeys(source.repo for source in (spec.sources if spec else ()) if source.repo)
    paths = [path for repo in repos for path in hub_cache.partial_downloads(repo)]
    if family:
        paths += [family.folder / FILE_NAME, *(path for path in files if path.parent == family.folder)]
    if not paths and not own:
        raise FamilyError(f"{name}: is in the catalogue, and not on this machine")
    return _removal(name, paths, own, used, family.folder if family else None)


def plan_model_removal(repo: str, quant: str | None) -> Removal:
    """What removing the models of a repository from the cache means, those of `quant` only. Raises FamilyError."""
    models = [place for place in hub_cache.cached_models() if place[0] == repo]
    models = [place for place in models if not quant or of_quant(place[1], quant)]
    own = dict.fromkeys((repo, name, commit) for _, file, commit in models for name in hub_cache.shards(file))
    what = f"{repo}:{quant}" if quant else repo
    partials = [] if quant else hub_cache.partial_downloads(repo)
    if not own and not partials:
        raise FamilyError(f"{what} is not on this machine")
    for family in installed():
        if _hub_files([family]) & set(own):
            raise FamilyError(f"{what} belongs to {family.name}; `edge-dlf rm {family.name}` removes both")
    return _removal(what, partials, own, set(), None)


def _hub_files(families: Iterable[Installed]) -> set[tuple[str, str, str] | None]:
    """(repo, file, commit) of every file of the cache that one of `families` names."""
    return {hub_cache.locate(path) for family in families if family.spec for path in _files(family.spec)}


def _removal(
    name: str,
    paths: Sequence[Path],
    own: Iterable[tuple[str, str, str]],
    used: set[tuple[str, str, str] | None],
    folder: Path | None,
) -> Removal:
    hub_files = tuple(place for place in own if place not in used)
    pointers = [hub_cache.snapshot(repo, commit) / file for repo, file, commit in hub_files]
    contents = {path.resolve() for path in (*paths, *pointers)}
    n_bytes = sum(path.stat().st_size for path in contents if path.is_file())
    kept = tuple(file for repo, file, commit in own if (repo, file, commit) in used)
    return Removal(name, tuple(paths), hub_files, n_bytes, folder, kept)


def remove(removal: Removal) -> int:
    """Do it; returns the bytes freed. The folder stays where it holds anything else. Raises FamilyError."""
    freed = 0
    try:
        for path in removal.paths:
            freed += 0 if path.is_symlink() else path.stat().st_size
            path.unlink(missing_ok=True)
        freed += sum(hub_cache.remove(*place) for place in removal.hub_files)
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
