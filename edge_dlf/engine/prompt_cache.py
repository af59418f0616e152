"""The prompt cache: a folder with what models know of texts that they have read, for later processes.

Each file holds the state of one model after the tokens of one text. Its name is made of two hashes: of the key, which
is everything that the state depends on beside the tokens, and of the tokens. The content is checked before any of it is
used, by a hash that only those who know the key can make. A file that fails the check is ignored.
"""

from __future__ import annotations

import logging
import os
import re
import struct
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import EdgeDLFError, InvalidParameterError
from ..system.durable import new_name, replacing
from ..system.machine import this_machine
from ..system.paths import expanded
from .backend import State

logger = logging.getLogger(__name__)

Tokens = npt.NDArray[np.int32]

MAX_BYTES = 8 * 10**9
"""Most bytes of all files together. Those used longest ago are removed."""
WORTH_KEEPING = 256
"""Tokens by which a text must be longer than what is kept of it, to be kept by itself."""
WORTH_READING = 64
"""Tokens for which a state is read from the folder."""
_HEAD = struct.Struct("<8s32sQ")  # magic, hash of what follows, number of tokens
_MAGIC = b"edgedlf\1"
_MOST_TOKENS = 2**24
_NAME = re.compile(r"[0-9a-f]{16}-[0-9a-f]{32}\.state")
_PATIENCE_S = 30.0  # for another process that is writing
_LOCK = ".lock"


class Found(NamedTuple):
    """A kept text. n_common: its first tokens that are those of the text it was looked up for."""

    name: str
    tokens: Tokens
    n_common: int


class Kept(NamedTuple):
    """A text to keep. replaced: names of files that its own one makes superfluous."""

    key: bytes
    tokens: Tokens
    state: State
    replaced: Sequence[str]

    @property
    def name(self) -> str:
        return _name(self.key, self.tokens)

    @property
    def n_bytes(self) -> int:
        return _HEAD.size + self.tokens.nbytes + self.state.nbytes


class PromptCache:
    """Files of one folder, which several processes may share. All methods are for one thread.

    Raises InvalidParameterError if there can be no such folder. Whatever fails later is said in one line, once.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = expanded(folder)
        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)  # what was said is nobody else's business
            os.scandir(self.folder).close()
        except (OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise InvalidParameterError(f"prompt_cache: {self.folder}: {reason.lower()}") from error
        self._known: dict[bytes, dict[str, Tokens]] = {}
        self._writer = ThreadPoolExecutor(1)
        self._job: Future[str | None] | None = None
        self._in_work: Sequence[Kept] = ()
        self._can_write = True
        self._said: set[str] = set()

    def find(self, key: bytes, text: Tokens, *, can_cut: bool, n_most: int) -> Found | None:
        """Return the kept text that has the most tokens in common with the beginning of `text`; of several the
        shortest.

        can_cut: whether a part of a state can be used; otherwise the whole of the kept text must be the beginning.
        n_most: tokens that there is room for.
        """
        best = None
        for name, tokens in self._files(key).items():
            n_common = _n_common(tokens, text)
            if len(tokens) <= n_most and n_common >= (1 if can_cut else max(1, len(tokens))):
                found = Found(name, tokens, n_common)
                if best is None or (n_common, -len(tokens)) > (best.n_common, -len(best.tokens)):
                    best = found
        return best

    def parting(self, key: bytes, text: Tokens) -> int:
        """Return the most tokens that `text` has in common with any kept one, in whole or in part."""
        return max((_n_common(tokens, text) for tokens in self._texts(key)), default=0)

    def n_kept(self, key: bytes, text: Tokens, *, can_cut: bool) -> int:
        """Return how many of the first tokens of `text` are kept so that they can be used, or will be."""
        numbers = ((_n_common(tokens, text), len(tokens)) for tokens in self._texts(key))
        return max((n for n, length in numbers if can_cut or n == length), default=0)

    def read(self, key: bytes, found: Found) -> State | None:
        """Return the state of a kept text; None if the file is damaged, which is said, or gone."""
        path = self.folder / found.name
        try:
            with path.open("rb") as file:
                head, n_bytes = file.read(_HEAD.size), os.fstat(file.fileno()).st_size
                if n_bytes > this_machine().free_bytes:
                    raise MemoryError
                body = np.empty(max(0, min(n_bytes, MAX_BYTES) - _HEAD.size), np.uint8)
                is_whole = file.readinto(body.data) == len(body) and not file.read(1)
            magic, checksum, n_tokens = _HEAD.unpack(head)
            is_right = is_whole and magic == _MAGIC and n_tokens == len(found.tokens)
            if is_right and checksum == _checksum(key, body) and _name(key, body[: 4 * n_tokens]) == found.name:
                with suppress(OSError):
                    os.utime(path)
                return body[4 * n_tokens :]
            self.reject(key, found.name, "is damaged")
        except (OSError, struct.error, MemoryError) as error:
            self._reject_for(key, found.name, error)
        return None

    def keep(self, texts: Sequence[tuple[bytes, Tokens, State, bool]]) -> None:
        """Write texts with their states, in the background: key, tokens, state, and whether a part of the state can be
        used. If so, it takes the place of kept ones that the text begins with."""
        self.wait()
        kept = [
            Kept(key, tokens, state, self._replaced(key, tokens) if can_cut else ())
            for key, tokens, state, can_cut in texts
        ]
        n_bytes = sum(text.n_bytes for text in kept)
        if n_bytes > MAX_BYTES:
            self.note(f"a prompt of {n_bytes / 1e9:.1f} GB is not kept: more than {self.folder} may hold")
        elif self._can_write and kept:
            self._in_work = kept
            self._job = self._writer.submit(self._write, kept)

    def wait(self) -> None:
        """Return once everything is written. Says what has failed, after which nothing more is written."""
        if self._job and (failure := self._job.result()):
            self._can_write = False
            self.note(f"prompts are not kept: {failure}")
        for text in self._in_work:
            self._known.get(text.key, {}).pop(text.name, None)  # what was damaged may be good now
        self._job, self._in_work = None, ()

    def close(self) -> None:
        """Return once everything is written. Calling it twice is no error."""
        self.wait()
        self._writer.shutdown()

    def note(self, message: str) -> None:
        """Say something once."""
        if message not in self._said:
            self._said.add(message)
            logger.warning("%s", message)

    def reject(self, key: bytes, name: str, reason: str) -> None:
        """Use a file no more, and say why."""
        self._known[key][name] = np.empty(0, np.int32)
        self.note(f"{self.folder / name}: {reason} and is ignored")

    def _reject_for(self, key: bytes, name: str, error: Exception) -> None:
        if isinstance(error, FileNotFoundError):  # another process has removed it
            self._known[key].pop(name, None)
        elif isinstance(error, OSError):
            self.reject(key, name, f"cannot be read ({(error.strerror or str(error)).lower()})")
        else:
            self.reject(key, name, "is too large for the memory" if isinstance(error, MemoryError) else "is damaged")

    def _texts(self, key: bytes) -> Iterator[Tokens]:
        """Tokens of the texts that are kept, or will be."""
        yield from self._files(key).values()
        yield from (text.tokens for text in self._in_work if text.key == key)

    def _replaced(self, key: bytes, tokens: Tokens) -> list[str]:
        """Names of the kept texts that `tokens` begin with."""
        files = self._files(key).items()
        return [name for name, kept in files if 0 < len(kept) == _n_common(kept, tokens) < len(tokens)]

    def _files(self, key: bytes) -> Mapping[str, Tokens]:
        """Tokens of each file under this key, by its name; none of one that is damaged."""
        known, beginning = self._known.setdefault(key, {}), _of_key(key)
        names = {file.name for file in _files(self.folder) if file.name.startswith(beginning)}
        for name in known.keys() - names:
            del known[name]
        for name in sorted(names - known.keys()):
            try:
                with (self.folder / name).open("rb") as file:
                    magic, _, n_tokens = _HEAD.unpack(file.read(_HEAD.size))
                    tokens = np.frombuffer(file.read(4 * min(n_tokens, _MOST_TOKENS)), np.int32)
                if magic == _MAGIC and _name(key, tokens) == name:
                    known[name] = tokens
                else:
                    self.reject(key, name, "is damaged, or no file of this version,")
            except (OSError, struct.error, ValueError) as error:
                self._reject_for(key, name, error)
        return known

    def _write(self, texts: Sequence[Kept]) -> str | None:
        """Write files, and remove those that are too many. Returns why that failed. Runs in a thread of its own."""
        from filelock import FileLock, Timeout  # which takes as long to import as a prompt of a few tokens

        try:
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with FileLock(self.folder / _LOCK, timeout=_PATIENCE_S):
                for torn in self.folder.glob(new_name(self.folder / "*.state").name):
                    torn.unlink(missing_ok=True)  # by a process that was killed
                for text in texts:
                    checksum = _checksum(text.key, text.tokens, text.state)
                    with replacing(self.folder / text.name, 0o600) as file:
                        file.write(_HEAD.pack(_MAGIC, checksum, len(text.tokens)))
                        file.writelines((text.tokens.data, text.state.data))
                    for name in text.replaced:
                        (self.folder / name).unlink(missing_ok=True)
                self._remove_oldest({text.name for text in texts})
        except Timeout:
            return f"another process holds {self.folder / _LOCK}"
        except (OSError, NotImplementedError, EdgeDLFError) as error:
            return str(error)
        return None

    def _remove_oldest(self, spared: set[str]) -> None:
        """Remove the files used longest ago until the others are within the limit."""
        files = {}
        for file in _files(self.folder):
            with suppress(OSError):
                files[file.name] = file.stat(follow_symlinks=False)
        n_bytes = sum(status.st_size for status in files.values())
        for name in sorted(files.keys() - spared, key=lambda name: files[name].st_mtime_ns):
            if n_bytes <= MAX_BYTES:
                break
            (self.folder / name).unlink(missing_ok=True)
            n_bytes -= files[name].st_size


def _files(folder: Path) -> list[os.DirEntry[str]]:
    """The files of a prompt cache, and nothing else that may lie beside them."""
    with suppress(OSError), os.scandir(folder) as entries:
        return [entry for entry in entries if _NAME.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)]
    return []


def _of_key(key: bytes) -> str:
    """What the names of all files under this key begin with."""
    return blake2b(key, digest_size=8).hexdigest()


def _name(key: bytes, tokens: Tokens | State) -> str:
    return f"{_of_key(key)}-{blake2b(tokens.data, key=key, digest_size=16).hexdigest()}.state"


def _checksum(key: bytes, *parts: Tokens | State) -> bytes:
    checksum = blake2b(key=key, digest_size=32)
    for part in parts:
        checksum.update(part.data)
    return checksum.digest()


def _n_common(a: Tokens, b: Tokens) -> int:
    """Return the length of the longest common prefix."""
    n = min(len(a), len(b))
    differing = np.flatnonzero(a[:n] != b[:n])
    return int(differing[0]) if len(differing) else n
