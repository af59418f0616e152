"""Compiled kernels on disk, as numba keeps them, with checksums: a file that is damaged is compiled again."""

from __future__ import annotations

import pickle
import zlib
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any

from numba.core import caching

_Cache: Any = caching.FunctionCache
_File: Any = caching.IndexDataCacheFile
_SOURCES = sha256(b"".join(path.read_bytes() for path in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
"""Names all that kernels are compiled from. numba itself looks at the file of a kernel, not at those that it uses."""


class CheckedCache(_Cache):  # type: ignore[misc]
    """numba's cache of one kernel, in which whatever a damaged file brings up means that there is none."""

    def _load_overload(self, signature: Any, target: Any) -> Any:
        try:
            return super()._load_overload(signature, target)
        except Exception:  # a damaged pickle may raise anything
            return None


class CheckedFile(_File):  # type: ignore[misc]
    """Its files: an index, and machine code for each type of arguments.

    A power cut leaves files empty, cut or with zeros in them. numba itself would raise, or run what is left.
    """

    def save(self, key: Any, data: Any) -> None:
        with suppress(OSError):  # where it cannot be kept, it is compiled again next time
            super().save(key, data)

    def _dump(self, obj: Any) -> bytes:
        content: bytes = super()._dump(obj)
        return content + _checksum(content)

    def _load_index(self) -> Any:
        try:
            _require_file(path := Path(self._index_path))
            version = pickle.dumps(self._version, protocol=-1)  # stands before what `_dump` has made
            content = path.read_bytes()
            if not content.startswith(version):
                return {}
            _require_whole(content.removeprefix(version))
            return super()._load_index()
        except Exception:  # a damaged pickle may raise anything
            return {}

    def _load_data(self, name: str) -> Any:
        _require_file(path := Path(self._cache_path, name))
        content = path.read_bytes()
        _require_whole(content)
        return pickle.loads(content)


def kept(kernel: Any) -> Any:
    """Let a compiled function keep its files this way, where numba finds a folder that can be written."""
    if hasattr(kernel, "enable_caching"):  # unless NUMBA_DISABLE_JIT left the function as it was
        with suppress(RuntimeError):
            kernel.enable_caching()
            kernel._cache.__class__, file = CheckedCache, kernel._cache._cache_file
            file.__class__, file._source_stamp = CheckedFile, _SOURCES
    return kernel


def is_ready(kernel: Any) -> bool:
    """Whether a function has been compiled, or cannot be compiled by another process for this one."""
    file = getattr(getattr(kernel, "_cache", None), "_cache_file", None)
    return not isinstance(file, CheckedFile) or bool(kernel.signatures or file._load_index())


def cache_folder(kernel: Any) -> Path | None:
    """The folder that holds the files of a compiled function; None where they are not kept."""
    path = kernel.stats.cache_path if hasattr(kernel, "stats") else None
    return Path(path) if path else None


def _checksum(content: bytes) -> bytes:
    return zlib.crc32(content).to_bytes(4, "big")


def _require_file(path: Path) -> None:
    """Raise OSError for a pipe, whose reader would wait for ever, or a device."""
    if not path.is_file():
        raise OSError("no file")


def _require_whole(content: bytes) -> None:
    """Raise OSError where a file is damaged: a damaged pickle may take any memory."""
    if _checksum(content[:-4]) != content[-4:]:
        raise OSError("damaged")
