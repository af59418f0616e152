"""The catalogue that ships with edge-dlf: families known to be on the Hugging Face hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FamilyError, InvalidParameterError, require
from ..system.paths import CATALOGUE, shipped_dir
from .spec import FamilySpec, ModelSource, read_toml

SURENESS = {
    "checked": "commit, size and sha256 of every file are known, and the tokenizers have one origin",
    "card": "unverified, as model cards have it",
}
"""How sure an entry is -> what that means. Whatever it says, `pull` checks that the files fit together."""


@dataclass(frozen=True)
class Entry:
    """One family of the catalogue.

    n_bytes: sizes of its files that are known. sure: a key of SURENESS. memory_bytes: with a context of 4096.
    """

    spec: FamilySpec
    good_at: str
    license: str
    sure: str
    memory_bytes: int
    n_bytes: Mapping[ModelSource, int]

    @property
    def download_bytes(self) -> int | None:
        """Size of all files; None where one of them is unknown."""
        sources = set(self.spec.sources)
        return sum(self.n_bytes.values()) if sources <= self.n_bytes.keys() else None


def read_catalogue(path: Path | None = None) -> dict[str, Entry]:
    """The entries by name. Raises FamilyError where the file is damaged."""
    path = path or shipped_dir() / CATALOGUE
    try:
        entries = [_entry(table, path.parent) for table in read_toml(path)["families"]]
    except (InvalidParameterError, KeyError, TypeError, ValueError) as error:
        raise FamilyError(f"{path}: {error}") from error
    except OSError as error:
        raise FamilyError(f"{path}: {(error.strerror or str(error)).lower()}") from error
    return {entry.spec.name: entry for entry in entries}


def _entry(table: dict[str, Any], folder: Path) -> Entry:
    """Parse one entry: the table of a family.toml, with more facts, and with `n_bytes` for each file."""
    about = {key: table.pop(key) for key in ("good_at", "license", "sure", "memory_gb")}
    require(about["sure"] in SURENESS, f"sure must be one of {', '.join(SURENESS)}, not {about['sure']!r}")
    sizes = [source.pop("n_bytes", None) for source in (table["large"], table["base"], *table["experts"])]
    spec = FamilySpec.from_table(table, folder)
    n_bytes = {source: size for source, size in zip(spec.sources, sizes, strict=True) if size}
    memory_bytes = round(float(about["memory_gb"]) * 1e9)
    return Entry(spec, str(about["good_at"]), str(about["license"]), str(about["sure"]), memory_bytes, n_bytes)
