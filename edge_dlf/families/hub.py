"""The Hugging Face hub: listing the GGUF files of a repository, and downloading them into the cache, checked."""

from __future__ import annotations

import errno
import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from huggingface_hub import constants

from ..errors import DownloadError
from ..gguf.shards import shard_names
from .hub_cache import COMMIT, check_names, folder, snapshot

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer
    from huggingface_hub.errors import HfHubHTTPError

_SHA256 = re.compile("[0-9a-f]{64}")
_CHUNK_BYTES = 1 << 20
_MAGIC = b"GGUF"
_TIMEOUT_S = 30.0
_GOES_ON = "the same command later goes on where it stopped"


@dataclass(frozen=True)
class HubFile:
    """One file of a repository at one commit.

    blob: its name in the cache's store, by content. sha256: None for the small files that git itself keeps.
    """

    repo: str
    name: str
    commit: str
    n_bytes: int
    blob: str
    sha256: str | None

    @property
    def path(self) -> Path:
        """Where the file is once it has been downloaded."""
        return snapshot(self.repo, self.commit) / self.name

    @property
    def stored(self) -> Path:
        """Where its content is then."""
        return folder(self.repo) / "blobs" / self.blob

    @property
    def partial(self) -> Path:
        """Where its content grows meanwhile."""
        return self.stored.with_name(f"{self.blob}.incomplete")


@dataclass(frozen=True)
class Repo:
    """The GGUF files of a repository at one commit, by name in their order there."""

    name: str
    commit: str
    files: Mapping[str, HubFile]

    def file(self, name: str) -> HubFile:
        """The file of that name. Raises DownloadError."""
        if name not in self.files:
            raise DownloadError(f"{self.name} has no file {name} at {self.commit[:12]}{_some(self.files)}")
        return self.files[name]


def choose(repo: str, names: Iterable[str], quant: str | None) -> str:
    """Which of the GGUF files `names` of `repo` is of that quantization; of a split model the first file.

    Without `quant` as llama.cpp's `-hf` does: Q4_K_M, else the first model there is. Raises DownloadError.
    """
    models = [name for name in names if not re.search("mmproj|imatrix", name, re.IGNORECASE)]
    models = [name for name in models if shard_names(name)[0] == name]
    if not models:
        raise DownloadError(f"{repo} has no GGUF model; repositories that do are mostly named …-GGUF")
    found = [name for name in models if of_quant(name, quant or "Q4_K_M")]
    if found or not quant:
        return (found or models)[0]
    raise DownloadError(f"{repo} has no {quant}{_some(models)}")


def of_quant(name: str, quant: str) -> bool:
    """Whether a file's name says that it is of a quantization, such as "Q4_K_M", in whatever case."""
    return bool(re.search(rf"(?<![A-Za-z0-9]){re.escape(quant)}(?![A-Za-z0-9_])", name, re.IGNORECASE))


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return f"; it has {', '.join(listed[:8])}{' …' if len(listed) > 8 else ''}" if listed else ""


def read_repo(repo: str, revision: str | None = None) -> Repo:
    """Ask the hub what GGUF files `repo` has. Raises DownloadError with the one reason, and what to do."""
    from huggingface_hub import HfApi

    check_names(repo, "x.gguf", revision)
    with _explained(repo, repo):
        api = HfApi(endpoint=constants.ENDPOINT, library_name="edge-dlf")
        info = api.model_info(repo, revision=revision, files_metadata=True, timeout=_TIMEOUT_S)
        commit, files = str(info.sha), {}
        if not COMMIT.fullmatch(commit):
            raise ValueError(f"the commit {commit!r}")
        for sibling in info.siblings or ():
            if sibling.rfilename.lower().endswith(".gguf"):
                check_names(repo, sibling.rfilename, commit)
                sha256 = sibling.lfs.sha256 if sibling.lfs else None
                blob, n_bytes = sha256 or str(sibling.blob_id), sibling.size
                if not (_SHA256 if sha256 else COMMIT).fullmatch(blob) or n_bytes is None:
                    raise ValueError(f"the hash {blob!r} or the size {n_bytes} of {sibling.rfilename!r}")
                files[sibling.rfilename] = HubFile(repo, sibling.rfilename, commit, n_bytes, blob, sha256)
    return Repo(repo, commit, files)


def missing_bytes(file: HubFile) -> int:
    """Bytes of `file` that are yet to be downloaded."""
    if file.stored.exists() or file.path.is_file():
        return 0
    return max(file.n_bytes - (file.partial.stat().st_size if file.partial.exists() else 0), 0)


def check_space(files: Iterable[HubFile]) -> int:
    """Bytes to download for all of `files`. Raises DownloadError where the disk of the cache has no room for them."""
    n_bytes = sum(map(missing_bytes, files))
    cache = Path(constants.HF_HUB_CACHE)
    free = shutil.disk_usage(next(folder for folder in (cache, *cache.absolute().parents) if folder.exists())).free
    if n_bytes > free:
        raise DownloadError(
            f"{n_bytes / 1e9:.2f} GB are to be downloaded, and {cache} has {free / 1e9:.2f} GB free: make room, or "
            f"set HF_HUB_CACHE to a folder on another disk"
        )
    return n_bytes


def download(file: HubFile) -> Path:
    """Bring `file` into the cache, from where an earlier attempt broke off, and check it; returns its path.

    A file that is there already is checked too. Raises DownloadError; a file of another content is removed.
    """
    from filelock import FileLock, Timeout
    from huggingface_hub import hf_hub_download

    lock = Path(constants.HF_HUB_CACHE) / ".locks" / folder(file.repo).name / f"{file.blob}.lock"
    with _explained(f"{file.name} of {file.repo}", file.repo):
        file.stored.parent.mkdir(parents=True, exist_ok=True)
        lock.parent.mkdir(parents=True, exist_ok=True)
        try:
            with FileLock(lock, timeout=0):
                if file.path.is_file() and _is_intact(file.path, file):
                    return file.path
                file.path.unlink(missing_ok=True)
                if file.stored.exists() and not _is_intact(file.stored, file):
                    file.stored.unlink()
                if not file.stored.exists():
                    _fetch(file)
        except Timeout:
            raise DownloadError(f"{file.name} of {file.repo} is being downloaded by another process") from None
        # It finds the file in its store and only links it under the repository's name.
        hf_hub_download(
            file.repo, file.name, revision=file.commit, cache_dir=constants.HF_HUB_CACHE, endpoint=constants.ENDPOINT
        )
    return file.path


def _fetch(file: HubFile) -> None:
    """Download the content of `file` into the store, from where an earlier process stopped.

    hf_hub_download has begun anew in every process since huggingface-hub 2.
    """
    from huggingface_hub import hf_hub_url
    from huggingface_hub.file_download import http_get
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # documented, though not re-exported

    if file.n_bytes > constants.MAX_HTTP_DOWNLOAD_SIZE:
        raise DownloadError(
            f"{file.name} of {file.repo} is larger than the hub sends in one piece; bring it by "
            f"`hf download {file.repo} {file.name}`, then try again"
        )
    if file.partial.is_file() and (file.partial.stat().st_size > file.n_bytes or not _begins_well(file.partial)):
        file.partial.unlink()
    url = hf_hub_url(file.repo, file.name, revision=file.commit, endpoint=constants.ENDPOINT)
    headers = build_hf_headers(library_name="edge-dlf")
    # http_get itself resumes after most errors; the loop is for the rest, such as a connection that is reset.
    named = {"expected_size": file.n_bytes, "displayed_filename": file.name}
    with _Growing(file) as target:
        target.seek(0, os.SEEK_END)
        while (had := target.tell()) < file.n_bytes:
            try:
                http_get(url, target, resume_size=had, headers=headers, **named)  # type: ignore[arg-type]
            except _transport_error():
                if target.tell() == had:
                    raise
    if not _is_intact(file.partial, file):
        file.partial.unlink()
        raise DownloadError(
            f"{file.name} of {file.repo} came with another content than its sha256 {file.blob[:12]}… stands for, and "
            f"was removed; try again"
        )
    file.partial.replace(file.stored)


class _Growing(io.FileIO):
    """The part of a file that is here, to which `http_get` adds.

    It takes no beginning but a GGUF's: a proxy that asks for a password, or a page about an error, must neither become
    the beginning of a download nor replace one. So what http_get takes back is only given up when more has come.
    """

    def __init__(self, file: HubFile) -> None:
        super().__init__(os.open(file.partial, os.O_RDWR | os.O_CREAT, 0o666), "r+")
        self._what = f"{file.name} of {file.repo}"

    def truncate(self, size: int | None = None, /) -> int:
        return self.tell() if size is None else size

    def write(self, chunk: ReadableBuffer, /) -> int:
        begun = bytes(memoryview(chunk)[: len(_MAGIC)])
        if self.tell() == 0 and not _MAGIC.startswith(begun):
            raise DownloadError(
                f"{self._what} came as something that is no GGUF and begins with {begun!r}, as a proxy's login page "
                "does; nothing of it was kept"
            )
        if os.fstat(self.fileno()).st_size > self.tell():
            super().truncate(self.tell())
        n_bytes = memoryview(chunk).nbytes
        n_written = super().write(chunk)
        while n_written < n_bytes:  # a disk that is filling up; the next call says why
            n_written += super().write(memoryview(chunk)[n_written:])
        return n_bytes


def _begins_well(path: Path) -> bool:
    with path.open("rb") as content:
        return _MAGIC.startswith(content.read(len(_MAGIC)))


def _is_intact(path: Path, file: HubFile) -> bool:
    """Whether the file at `path` has the size and the hash of `file`."""
    if path.stat().st_size != file.n_bytes:
        return False
    # git's own hash of a file is the SHA-1 of its length and its content.
    digest = hashlib.sha256() if file.sha256 else hashlib.sha1(b"blob %d\0" % file.n_bytes, usedforsecurity=False)
    with path.open("rb") as content:
        while chunk := content.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest() == file.blob


@contextmanager
def _explained(what: str, repo: str) -> Iterator[None]:
    """Turn what huggingface-hub and the system raise into a DownloadError that says what to do."""
    from huggingface_hub.errors import HfHubHTTPError

    if constants.HF_HUB_OFFLINE:
        raise DownloadError(f"{what} is not on this machine, and HF_HUB_OFFLINE forbids the network")
    transport_error = _transport_error()
    try:
        yield
    except (OSError, transport_error) as error:
        refusal = error if isinstance(error, HfHubHTTPError) else error.__cause__
        if isinstance(refusal, HfHubHTTPError):
            raise DownloadError(f"{what} {_reason(refusal, repo)}") from error
        why = f"{_one_line(error)}; {_GOES_ON}"
        if isinstance(error, transport_error):
            why = f"the connection to {constants.ENDPOINT} failed ({_one_line(error)}); {_GOES_ON}"
        elif getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            why = f"the disk of {constants.HF_HUB_CACHE} is full; make room, and {_GOES_ON}"
        raise DownloadError(f"{what}: {why}") from error
    except UnicodeEncodeError as error:
        raise DownloadError(f"{what}: the token has letters that no token has; correct HF_TOKEN") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DownloadError(f"{what}: {constants.ENDPOINT} answers with nonsense ({_one_line(error)})") from error


def _transport_error() -> type[Exception]:
    """What the HTTP library raises; which one that is differs between versions of huggingface-hub."""
    from huggingface_hub.errors import HfHubHTTPError

    base: type[Exception] = HfHubHTTPError.__mro__[1]
    return base


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _reason(error: HfHubHTTPError, repo: str) -> str:
    """What the hub refuses, as the end of a sentence that begins with what was asked for."""
    from huggingface_hub import errors

    status = error.response.status_code
    log_in = "`hf auth login`, or HF_TOKEN"
    if isinstance(error, errors.GatedRepoError):
        return f"is gated: accept its terms at {constants.ENDPOINT}/{repo}, then log in as who accepted them ({log_in})"
    if isinstance(error, errors.RevisionNotFoundError):
        return "has no such revision"
    if isinstance(error, errors.RepositoryNotFoundError) or status in (401, 403):
        return f"does not exist, or it is private and needs a token that gives access to it ({log_in})"
    hints = {404: "it is not there", 429: "there were too many requests; wait some minutes, or log in"}
    hint = f"the hub is out of order; {_GOES_ON}" if status >= 500 else hints.get(status, _one_line(error))
    return f"is refused (HTTP {status}): {hint}"
