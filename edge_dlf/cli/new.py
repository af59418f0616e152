"""`edge-dlf new`."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import click

from ..errors import InvalidParameterError, require
from .options import files_options, spec_of_files
from .screen import Screen


@click.command(short_help="Make a family of given files.")
@click.argument("name")
@files_options
def new(name: str, **files: Any) -> None:
    """Write the family.toml of a new family NAME into the models folder, after checking that its files fit together.

    The files stay where they are. Those that `edge-dlf pull` brought are named by repository, revision and sha256,
    others by their path. The path of the family.toml goes to stdout.

    Where control tokens of the models differ, it says how they were matched.

    An adapter that was trained as a corrector says so itself. Where all experts are correctors, the base only holds the
    weights that their LoRAs go over, and is not decoded.
    """
    from ..families.files import check_files
    from ..families.library import as_hub_source, change_sources, write_family
    from ..families.spec import NAME_RULE, is_name

    require(is_name(name), f"a family's name must have {NAME_RULE}, not {name!r}")
    if not all(files[role] for role in ("large", "base", "expert")):
        raise InvalidParameterError("give the files: --large FILE --base FILE --expert NAME=FILE")
    spec, screen = replace(spec_of_files(files), name=name), Screen()
    checked = check_files(spec)
    correctors = sorted(checked.correctors)
    screen.show(str(write_family(change_sources(spec, as_hub_source))))
    for match in checked.tokens.matches.values():
        screen.say(match.told())
        if warning := match.warning():
            screen.say(f"warning: {warning}")
    if correctors:
        screen.say(f"{' and '.join(correctors)}: added to the large model without the base")
    screen.say(f"`edge-dlf chat {name}` talks with it")
