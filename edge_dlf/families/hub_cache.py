"""The Hugging Face hub's cache on this machine: finding and removing files.

The layout is huggingface-hub's documented one (`HF_HOME`, `HF_HUB_CACHE`), shared with every program that uses it. It
is read here without that library's clients, whose import would take 0.2 s of every start. Nothing here uses a network.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from ..errors import InvalidParameterError
from ..gguf.shards import shard_names

try:
    from huggingface_hub import constants
except ValueError as error:  # it takes HF_ENDPOINT apart when it is loaded
    raise InvalidParameterError(
        f"HF_ENDPOINT must be the address of a hub, such as https://huggingface.co ({error})"
    ) from error

COMMIT = re.compile("[0-9a-f]{40}")
_REPO = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_REVISION = re.compile(r"[A-Za-z0-9_][\w./-]{0,199}", re.ASCII)
_UNSAFE_IN_NAME = re.compile(r"[\x00-\x1f\x7f\\:*?\"<>|]")


def check_names(repo: str, file: str, revision: str | None) -> None:
    """Raise InvalidParameterError if a name is not one of the hub's, or could lead out of the cache."""
    if not _REPO.fullmatch(repo) or ".." in repo or "--" in repo:
        raise InvalidParameterError(f"{repo!r} is no repository of the hub; those are named OWNER/NAME")
    parts = PurePosixPath(file).parts
    is_plain = "/".join(parts) == file and ".." not in parts and not _UNSAFE_IN_NAME.search(file)
    if not is_plain or file.startswith("/") or not file.lower().endswith(".gguf"):
        raise InvalidParameterError(f"{file!r} is no name of a GGUF file inside a repository")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise InvalidParameterError(f"{revision!r} is no revision; that is a branch, a tag or a commit")


def folder(repo: str) -> Path:
    """The folder of a repository in the cache."""
    return Path(constants.HF_HUB_CACHE) / f"models--{repo.replace('/', '--')}"


def snapshot(repo: str, commit: str) -> Path:
    """The folder where a repository's files at one commit go by their names."""
    return folder(repo) / "snapshots" / commit


class CachedFile(NamedTuple):
    """A file of the cache: its repository, its name there, and the commit."""

    repo: str
    file: str
    commit: str

    @property
    def path(self) -> Path:
        """Where the file is, if it is there."""
        return snapshot(self.repo, self.commit) / self.file

    @property
    def shards(self) -> tuple[CachedFile, ...]:
        """Every file of the model that this one belongs to."""
        return tuple(self._replace(file=name) for name in shard_names(self.file))


def commit_of(repo: str, revision: str | None) -> str | None:
    """The commit in the cache for a branch, a tag or a commit; None if there is none."""
    revision = revision or "main"
    if COMMIT.fullmatch(revision):
        return revision
    try:
        ref = folder(repo) / "refs" / revision
        commit = ref.read_text("ascii").strip() if ref.is_file() else ""
    except (OSError, ValueError):
        return None
    return commit if COMMIT.fullmatch(commit) else None


def note_revision(repo: str, revision: str | None, commit: str) -> None:
    """Record the commit that a branch or a tag stood for when it was downloaded."""
    if revision != commit:
        ref = folder(repo) / "refs" / (revision or "main")
        ref.parent.mkdir(parents=True, exist_ok=True)
        ref.write_text(commit, "ascii")


def cached(repo: str, file: str, revision: str | None = None) -> Path | None:
    """Path of `file` in the cache; None unless it and all other files of its model are there."""
    check_names(repo, file, revision)
    commit = commit_of(repo, revision)
    if commit is None or not all(shard.path.is_file() for shard in CachedFile(repo, file, commit).shards):
        return None
    return snapshot(repo, commit) / file


def locate(path: Path) -> CachedFile | None:
    """The file of the cache that a path stands for; None if the path leads elsewhere."""
    try:
        name, kind, commit, *parts = path.absolute().relative_to(Path(constants.HF_HUB_CACHE).absolute()).parts
        repo, file = name.removeprefix("models--").replace("--", "/", 1), "/".join(parts)
        check_names(repo, file, commit)
    except ValueError:
        return None
    is_snapshot = name.startswith("models--") and kind == "snapshots" and COMMIT.fullmatch(commit)
    return CachedFile(repo, file, commit) if is_snapshot else None


def cached_models() -> list[CachedFile]:
    """Every GGUF in the cache; of split ones the first file, if all are there."""
    found = map(locate, sorted(Path(constants.HF_HUB_CACHE).glob("models--*/snapshots/*/**/*.gguf")))
    return [model for model in found if model and model.shards[0] == model and cached(*model)]


def partial_downloads(repo: str) -> list[Path]:
    """Files of downloads that broke off."""
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
