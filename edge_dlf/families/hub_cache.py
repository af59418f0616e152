"""The Hugging Face hub's cache on this machine: what of it is here, where, and how it leaves.

The layout is huggingface-hub's documented one (`HF_HOME`, `HF_HUB_CACHE`), shared with every program that uses it. It
is read here without that library's clients, whose import would take 0.2 s of every start. Nothing here uses a network.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path, PurePosixPath

from huggingface_hub import constants

from ..errors import InvalidParameterError

COMMIT = re.compile("[0-9a-f]{40}")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w./-]{0,199}", re.ASCII)
_UNSAFE_IN_NAME = re.compile(r"[\x00-\x1f\x7f\\:*?\"<>|]")
_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_SHARDS = 1000


def check_names(repo: str, file: str, revision: str | None) -> None:
    """Raise InvalidParameterError where one of the names could lead out of the cache, or is none of the hub's."""
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise InvalidParameterError(f"{repo!r} is no repository of the hub; those are named OWNER/NAME")
    parts = PurePosixPath(file).parts
    is_plain = "/".join(parts) == file and ".." not in parts and not _UNSAFE_IN_NAME.search(file)
    if not is_plain or file.startswith("/") or not file.lower().endswith(".gguf"):
        raise InvalidParameterError(f"{file!r} is no name of a GGUF file inside a repository")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InvalidParameterError(f"{revision!r} is no revision; that is a branch, a tag or a commit")


def shards(name: str) -> tuple[str, ...]:
    """Every file of the model that `name` is a file of, in order; just `name` where it is whole."""
    match = _SHARD.fullmatch(name)
    count = int(match["count"]) if match else 1
    if match is None or not 1 < count <= _MAX_SHARDS:
        return (name,)
    return tuple(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf" for number in range(1, count + 1))


def folder(repo: str) -> Path:
    """The folder of a repository in the cache."""
    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def snapshot(repo: str, commit: str) -> Path:
    """The folder where a repository's files at one commit go by their names."""
    return folder(repo) / "snapshots" / commit


def commit_of(repo: str, revision: str | None) -> str | None:
    """The commit that the cache has for a branch, a tag or a commit; None where it has none."""
    revision = revision or "main"
    if COMMIT.fullmatch(revision):
        return revision
    try:
        commit = (folder(repo) / "refs" / revision).read_text("ascii").strip()
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def note_revision(repo: str, revision: str | None, commit: str) -> None:
    """Keep which commit a branch or a tag stood for when it was downloaded."""
    if revision != commit:
        ref = folder(repo) / "refs" / (revision or "main")
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit, "ascii")


def cached(repo: str, file: str, revision: str | None = None) -> Path | None:
    """Where `file` lies in the cache; None unless it and all further files of its model are there."""
    check_names(repo, file, revision)
    commit = commit_of(repo, revision)
    if commit is None or not all((snapshot(repo, commit) / name).is_file() for name in shards(file)):
        return None
    return snapshot(repo, commit) / file


def locate(path: Path) -> tuple[str, str, str] | None:
    """The (repo, file, commit) that a path into the cache stands for; None for any other path."""
    try:
        parts = path.absolute().relative_to(Path(constants.HF_HUB_CACHE).absolute()).parts
    except ValueError:
        return None
    if len(parts) < 4 or not parts[0].startswith("models--") or parts[1] != "snapshots":
        return None
    owner, _, name = parts[0].removeprefix("models--").partition("--")
    repo, file, commit = f"{owner}/{name}", "/".join(parts[3:]), parts[2]
    try:
        check_names(repo, file, commit)
    except InvalidParameterError:
        return None
    return (repo, file, commit) if COMMIT.fullmatch(commit) else None


def cached_models() -> list[tuple[str, str, str]]:
    """(repo, file, commit) of every GGUF in the cache; of split ones the first file, where all are there."""
    paths = sorted(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/**/*.gguf"))
    places = [place for place in map(locate, paths) if place]
    return [place for place in places if shards(place[1])[0] == place[1] and cached(*place)]


def partial_downloads(repo: str) -> list[Path]:
    """What downloads that broke off have left."""
    return sorted((folder(repo) / "blobs").glob("*.incomplete"))


def remove(repo: str, file: str, commit: str) -> int:
    """Take one file out of the cache, and its content where no other revision has it too; returns the bytes freed."""
    check_names(repo, file, commit)
    pointer, snapshots = snapshot(repo, commit) / file, folder(repo) / "snapshots"
    blob = _blob_of(pointer, repo)
    # A blob that is itself a symlink leads into the store that all repositories share.
    frees = pointer.is_file() and not (blob and blob.is_symlink())
    n_bytes = pointer.stat().st_size if frees else 0
    pointer.unlink(missing_ok=True)
    if blob and blob not in {_blob_of(other, repo) for other in snapshots.rglob("*")}:
        blob.unlink(missing_ok=True)
    elif blob:
        n_bytes = 0
    if not any(not path.is_dir() for path in snapshot(repo, commit).rglob("*")):
        shutil.rmtree(snapshot(repo, commit), ignore_errors=True)
    if snapshots.is_dir() and not any(snapshots.iterdir()) and not partial_downloads(repo):
        shutil.rmtree(folder(repo), ignore_errors=True)
    return n_bytes


def _blob_of(pointer: Path, repo: str) -> Path | None:
    """The file of the repository's store that a symlink of a snapshot leads to, if it leads there."""
    if not pointer.is_symlink():
        return None
    blob = Path(os.path.normpath(pointer.parent / pointer.readlink()))
    return blob if blob.parent == Path(os.path.normpath(folder(repo) / "blobs")) else None
