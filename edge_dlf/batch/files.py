"""The files that a batch writes: names, locks, and whether this run may continue what is in them."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, NamedTuple

from ..errors import EdgeDLFError, InvalidParameterError, require
from ..families.manifest import Manifest
from ..system.durable import new_name
from ..system.file_locks import lock_name, locked
from ..system.jsonl import read_lines
from ..system.paths import expanded
from .intake import fingerprint
from .ledger import Ledger, arrange, resume

_STDOUT = ("-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1")
_AGAIN = "; give the same again, or --restart, which keeps the earlier file and begins anew"


class _Place(NamedTuple):
    """A file by its path, where it has one, and its status, where it is there already."""

    role: str
    path: Path | None
    status: os.stat_result | None

    @classmethod
    def of(cls, role: str, path: Path) -> _Place:
        return cls(role, path, status_of(path))

    def is_same(self, other: _Place) -> bool:
        """Whether both are one file, or would become one."""
        is_one = self.status and other.status and os.path.samestat(self.status, other.status)
        is_own = self.status is not None and (stat.S_ISREG(self.status.st_mode) or stat.S_ISFIFO(self.status.st_mode))
        return bool((self.path and self.path == other.path) or (is_one and is_own))


@dataclass(frozen=True)
class Targets:
    """Paths, links resolved.

    output: None for stdout.
    errors: None if failed rows go to the output.
    """

    output: Path | None
    errors: Path | None

    @classmethod
    def of(cls, output: str, errors: str | None, input: IO[bytes], trace: Path | None = None) -> Targets:
        """Raises InvalidParameterError where two of them, the trace, the input or the files beside them are one."""
        require(errors not in _STDOUT, "--errors must be a file")
        targets = cls(None if output in _STDOUT else _real(output), _real(errors) if errors else None)
        for name, path in ((output, targets.output), (errors, targets.errors)):
            is_folder = path and (path.is_dir() or str(name).endswith(os.sep))
            require(not is_folder, f"{path}: is a folder")
        writing = [
            _Place("the output", targets.output, status_of(targets.output or sys.stdout)),
            *(_Place.of("the file of errors", path) for path in [targets.errors] if path),
            *(_Place.of("the trace", _real(path)) for path in [trace] if path),
        ]
        reading, beside = _Place("the input", None, status_of(input)), list(targets.beside())
        for number, place in enumerate(writing):
            require(not place.is_same(reading), f"{place.path or 'stdout'}: is the input; write the answers elsewhere")
            for other in [*writing[:number], *beside]:
                require(not place.is_same(other), f"{place.path or 'stdout'}: is both {other.role} and {place.role}")
        for place in beside:
            if place.is_same(reading):
                raise InvalidParameterError(f"{place.path}: is both the input and {place.role}; choose another output")
        return targets

    def beside(self) -> Iterator[_Place]:
        """The files that a run makes beside its output and errors."""
        if self.can_resume:
            yield _Place.of("the manifest", self.manifest)
        for path in self.files:
            yield _Place.of("a lock", lock_name(path))
            yield _Place.of("a file on its way", new_name(path))

    @property
    def can_resume(self) -> bool:
        """Whether a later run can read the output."""
        return self.output is not None and _is_file(self.output)

    @property
    def manifest(self) -> Path:
        assert self.output
        return _manifest(self.output)

    @property
    def files(self) -> list[Path]:
        """Output and errors, without streams."""
        return [path for path in (self.output, self.errors) if path and _is_file(path)]

    def set_aside(self) -> None:
        """Rename output, errors and manifest after the output's first free name of NAME.1, NAME.2, …"""
        number, files = 1, [path for path in self.files if path.exists()]
        while any(_numbered(path, number).exists() for path in files):
            number += 1
        for path in files:
            path.rename(_numbered(path, number))
        if self.can_resume and self.output in files and self.manifest.exists():
            self.manifest.rename(_manifest(_numbered(self.output, number)))


@contextmanager
def open_outputs(
    targets: Targets,
    input: IO[bytes],
    manifest: Callable[[], Manifest],
    *,
    restart: bool,
    retry_errors: bool,
    ordered: bool,
    notice: Callable[[str], None],
) -> Iterator[tuple[Ledger, int | None]]:
    """Lock the files, compare them with this run's `manifest`, and open them at their ends.

    At the end of a run that is `ordered`, the rows of earlier runs get their places in the order of the input.

    Yields a ledger that knows the rows of earlier runs, and how many rows the input has, None if it is a stream.
    Raises EdgeDLFError where another run writes to them, InvalidParameterError where they are not this run's.
    """
    ledger, n_rows = Ledger(), None
    with ExitStack() as stack:
        stack.enter_context(locked(targets.files))
        begun = [path for path in targets.files if path.is_file() and path.stat().st_size]
        if restart and begun:
            targets.set_aside()
            begun = []
        if targets.can_resume:
            n_rows = _compare(targets, begun, input, manifest())
        elif begun:
            raise InvalidParameterError(f"{begun[0]}: exists; --restart keeps it under another name")

        with ExitStack() as files:

            def opened(path: Path | None) -> Callable[[bytes], None]:
                if path and _is_file(path):
                    return files.enter_context(resume(ledger, path, retry_errors=retry_errors, notice=notice)).append
                return _stream(files, path)

            ledger.write_to(opened(targets.output), opened(targets.errors) if targets.errors else None)
            yield ledger, n_rows
        for path in begun if ordered else ():
            arrange(path, ledger.ids)


def _compare(targets: Targets, begun: list[Path], input: IO[bytes], now: Manifest) -> int | None:
    """Check that the files were begun with the same manifest, and save it. Returns how many rows the input has."""
    assert targets.output
    errors = os.path.relpath(targets.errors, targets.output.parent) if targets.errors else None
    now = replace(now, parameters={**now.parameters, "errors": errors})
    found = Manifest.load(targets.manifest)  # also where nothing is begun: a file of another kind is not replaced
    before = found if begun else None
    if begun and not before:
        raise InvalidParameterError(
            f"{begun[0]}: is no output of edge-dlf batch, for there is no {targets.manifest.name}; choose another "
            "name, or --restart, which keeps the file as it is under another name"
        )
    if before and (changed := before.differences(now)):
        raise InvalidParameterError(f"{targets.output}: was begun with something else: {'; '.join(changed)}{_AGAIN}")
    n_rows, earlier = None, before.input if before else None
    if _is_regular(status_of(input)) and input is not sys.stdin.buffer:
        if earlier and fingerprint(input, earlier["bytes"]) != earlier:
            raise InvalidParameterError(
                f"{targets.output}: was begun with another input: the first {earlier['bytes']:,} bytes of {input.name} "
                f"have changed (new rows may only be added at its end){_AGAIN}"
            )
        n_rows, earlier = sum(1 for _ in read_lines(input)), fingerprint(input)
    now = replace(now, input=earlier)
    if now != before:
        now.save(targets.manifest)
    return n_rows


def _stream(stack: ExitStack, path: Path | None) -> Callable[[bytes], None]:
    """What appends to stdout, or to a file that cannot be read again, such as a pipe."""
    file = path.open("wb") if path else sys.stdout.buffer

    def close() -> None:
        with suppress(OSError):  # of a write that failed before
            file.close()

    def append(line: bytes) -> None:
        try:
            file.write(line)
            file.flush()
        except BrokenPipeError:
            raise
        except OSError as error:
            raise EdgeDLFError(f"{path or 'stdout'}: {(error.strerror or str(error)).lower()}") from error

    if path:
        stack.callback(close)
    return append


def _real(name: str | Path) -> Path:
    """The path with its links resolved, but for one that leads to a pipe or a device, which has no other name."""
    path = expanded(name)
    status = status_of(path)
    return path if status and not _is_regular(status) else Path(os.path.realpath(path))


def _manifest(output: Path) -> Path:
    return output.with_name(f"{output.name}.manifest.json")


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def status_of(file: Any) -> os.stat_result | None:
    """Status of a path or an open file; None if there is no such file of the system's."""
    with suppress(OSError, AttributeError, ValueError):  # a name may be too long, or hold a NUL
        return file.stat() if isinstance(file, Path) else os.fstat(file.fileno())
    return None


def _is_regular(status: os.stat_result | None) -> bool:
    return status is not None and stat.S_ISREG(status.st_mode)


def _is_file(path: Path) -> bool:
    """Whether it is a file that stays, or nothing yet."""
    status = status_of(path)
    return status is None or _is_regular(status)
