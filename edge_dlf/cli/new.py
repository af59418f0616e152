"""`edge-dlf new`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import click

from ..errors import InvalidParameterError
from .options import files_options
from .screen import Screen


@click.command(short_help="Make a family of given files.")
@click.argument("name")
@files_options
def new(name: str, large: Path | None, base: Path | None, expert: tuple[tuple[str, Path], ...]) -> None:
    """Write the family.toml of a new family NAME into the models folder, after checking that its files fit together.

    The files stay where they are. Those that `edge-dlf pull` brought are named by repository, revision and sha256,
    others by their path. The path of the family.toml goes to stdout.
    """
    from ..families.files import check_files
    from ..families.library import as_hub_source, change_sources, write_family
    from ..families.spec import NAME_RULE, FamilySpec, is_name

    if not is_name(name):
        raise InvalidParameterError(f"a family's name must have {NAME_RULE}, not {name!r}")
    if large is None or base is None or not expert:
        raise InvalidParameterError("give the files: --large FILE --base FILE --expert NAME=FILE")
    if len(dict(expert)) < len(expert):
        raise InvalidParameterError("two experts have the same name")
    spec = replace(FamilySpec.from_files(large, base, dict(expert)), name=name)
    check_files(spec)
    Screen().show(str(write_family(change_sources(spec, as_hub_source))))
