"""The files that a batch writes: names, locks, and whether this run may continue what is in them."""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

from ..errors import EdgeDLFError, InvalidParameterError
from ..families.manifest import Manifest
from ..system.jsonl import read_lines
from .intake import fingerprint
from .ledger import Ledger, locked, resume

STDIO = "-"
_AGAIN = "; give the same again, or --restart, which keeps the earlier file and begins anew"


@dataclass(frozen=True)
class Targets:
    """Paths, links resolved.

    output: None for stdout.
    errors: None if failed rows go to the output.
    """

    output: Path | None
    errors: Path | None

    @classmethod
    def of(cls, output: str, errors: str | None, input: IO[bytes]) -> Targets:
        """Raises InvalidParameterError where two of them and the input are one file."""
        if errors == STDIO:
            raise InvalidParameterError("--errors must be a file")
        targets = cls(_real(output) if output != STDIO else None, _real(errors) if errors else None)
        reading, writing = status_of(input), status_of(targets.output or sys.stdout)
        for path in filter(None, (targets.output, targets.errors)):
            if path.is_dir():
                raise InvalidParameterError(f"{path}: is a folder")
            if _same(reading, status_of(path)):
                raise InvalidParameterError(f"{path}: is the input; write the answers elsewhere")
        if targets.output is None and _same(reading, writing):
            raise InvalidParameterError("stdout is the input; write the answers elsewhere")
        if targets.errors and (targets.errors == targets.output or _same(writing, status_of(targets.errors))):
            raise InvalidParameterError(f"{targets.errors}: is both the output and the file of errors")
        return targets

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
    notice: Callable[[str], None],
) -> Iterator[tuple[Ledger, int | None]]:
    """Lock the files, compare them with this run's `manifest`, and open them at their ends.

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

        def opened(path: Path | None) -> Callable[[bytes], None]:
            if path and _is_file(path):
                return stack.enter_context(resume(ledger, path, retry_errors=retry_errors, notice=notice)).append
            return _stream(stack, path)

        ledger.write_to(opened(targets.output), opened(targets.errors) if targets.errors else None)
        yield ledger, n_rows


def _compare(targets: Targets, begun: list[Path], input: IO[bytes], now: Manifest) -> int | None:
    """Check that the files were begun with the same manifest, and save it. Returns how many rows the input has."""
    assert targets.output
    errors = os.path.relpath(targets.errors, targets.output.parent) if targets.errors else None
    now = replace(now, parameters={**now.parameters, "errors": errors})
    before = Manifest.load(targets.manifest) if begun else None
    if begun and not before:
        raise InvalidParameterError(
            f"{begun[0]}: is no output of edge-dlf batch, for there is no {targets.manifest.name}; choose another "
            "name, or --restart, which keeps the file as it is under another name"
        )
    if before and (found := before.differences(now)):
        raise InvalidParameterError(f"{targets.output}: was begun with something else: {'; '.join(found)}{_AGAIN}")
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


def _real(name: str) -> Path:
    return Path(os.path.realpath(Path(name).expanduser()))


def _manifest(output: Path) -> Path:
    return output.with_name(f"{output.name}.manifest.json")


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")


def status_of(file: Any) -> os.stat_result | None:
    """Status of a path or an open file; None if there is no such file of the system's."""
    with suppress(OSError, AttributeError):
        return file.stat() if isinstance(file, Path) else os.fstat(file.fileno())
    return None


def _is_regular(status: os.stat_result | None) -> bool:
    return status is not None and stat.S_ISREG(status.st_mode)


def _is_file(path: Path) -> bool:
    """Whether it is a file that stays, or nothing yet."""
    status = status_of(path)
    return status is None or _is_regular(status)


def _same(one: os.stat_result | None, other: os.stat_result | None) -> bool:
    return _is_regular(one) and other is not None and os.path.samestat(one, other)  # type: ignore[arg-type]
