"""The finished rows of a batch: files of JSON lines that a later run reads, repairs and continues."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, TypeAlias

from ..system.durable import Appender, file_error, new_name, replacing
from ..system.jsonl import Line, dump_line, parse_object, read_lines
from .ids import Ids
from .intake import INCOMPLETE

Row: TypeAlias = Mapping[str, Any]


class Ledger:
    """Writes finished rows, and counts them.

    ids: those whose rows are finished.
    n_rows, n_failed: rows in the files, and those of them with an error, earlier runs included.
    """

    def __init__(self) -> None:
        self.ids = Ids()
        self.n_rows = self.n_failed = 0

    def write_to(self, output: Callable[[bytes], None], errors: Callable[[bytes], None] | None = None) -> None:
        """Set what takes the lines: `errors` those of rows with an error, if it is given, `output` all others."""
        self._append = {False: output, True: errors or output}

    def write(self, row: Row) -> None:
        """Add a row that is finished. Raises EdgeDLFError where it cannot be written."""
        self._append[bool(row["error"])](dump_line(row))
        self.count(row)

    def count(self, row: Row) -> None:
        """Count a row that is in a file."""
        self.n_rows += 1
        self.n_failed += bool(row["error"])


def resume(ledger: Ledger, path: Path, *, retry_errors: bool, notice: Callable[[str], None]) -> Appender:
    """Enter the rows of an earlier run into the ledger, and open the file at their end.

    A torn last line is cut off. The file is replaced by one without lines that are no rows, without rows whose id is
    repeated, and, with `retry_errors`, without rows with an error. So are the marks that other editors leave: a byte
    order mark, blank lines, and the line breaks of Windows.
    """
    new_name(path).unlink(missing_ok=True)
    try:
        with path.open("rb") as file:
            end, dropped, is_clean = _enter(ledger, file, retry_errors, lambda what: notice(f"{path}: {what}"))
            if dropped or not is_clean:
                file.seek(0)
                with replacing(path) as new:
                    lines = (line for line in read_lines(file) if line.is_whole and line.number not in dropped)
                    new.writelines((line.content or b"").strip() + b"\n" for line in lines)
                    end = new.tell()
    except FileNotFoundError:
        end = 0
    except OSError as error:
        raise file_error(path, error) from error
    return Appender(path, end)


def arrange(path: Path, ids: Ids) -> None:
    """Bring the rows of a file into the order in which the input has shown their `ids`. Others come first."""
    with path.open("rb") as file:
        rows = ((_row(line), line) for line in read_lines(file))
        places = [(ids.place(_id(row)), line.start, line.n_bytes) for row, line in rows if row]
        if (ordered := sorted(places)) == places:
            return
        with replacing(path) as new:
            for _, start, n_bytes in ordered:
                file.seek(start)
                new.write(file.read(n_bytes))


def _enter(
    ledger: Ledger, file: IO[bytes], retry_errors: bool, notice: Callable[[str], None]
) -> tuple[int, set[int], bool]:
    """Enter the rows of `file`. Returns where the last whole line ends, the numbers of lines to leave out, and whether
    the others lie there as they were written."""
    end = n_damaged = 0
    dropped: set[int] = set()
    is_clean = True
    for line in read_lines(file):
        if not line.is_whole:
            notice("the last line was torn; its row runs again")
            break
        is_clean = is_clean and line.start == end and len((line.content or b"").strip()) + 1 == line.n_bytes
        end = line.start + line.n_bytes
        row = _row(line)
        is_retried = row is not None and row["error"] and (retry_errors or row["error"].get("code") == INCOMPLETE)
        if row is not None and not is_retried and ledger.ids.finish(_id(row)):
            ledger.count(row)
        else:
            dropped.add(line.number)
            n_damaged += not is_retried
    if n_damaged:
        notice(f"{n_damaged} damaged or repeated rows are left out; what is missing runs again")
    return end, dropped, is_clean


def _row(line: Line) -> Row | None:
    """Parse a line of an output; None if it is no row."""
    try:
        row = parse_object(line.content or b"")
    except ValueError:
        return None
    response, error = row.get("response"), row.get("error")
    is_row = isinstance(row.get("custom_id"), str) and isinstance(response, dict) and error is None
    if isinstance(error, dict) and response is None:
        is_row = isinstance(row.get("custom_id"), str) or isinstance(error.get("line"), int)
    return row if is_row else None


def _id(row: Row) -> str | int:
    """The row's id, or the number of its input line if it has none."""
    id = row["custom_id"]
    return id if isinstance(id, str) else int(row["error"]["line"])
