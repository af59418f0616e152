"""Settings written into [defaults] or a profile of a family.toml, with everything else of the file kept as it is."""

from __future__ import annotations

from codecs import BOM_UTF8
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.items import InlineTable

from ..errors import FamilyError, InvalidParameterError
from ..system.durable import replacing
from ..system.paths import shipped_dir
from .spec import FamilySpec, find_family, parse_toml


def own_file(family: str | Path | None) -> Path:
    """The family.toml of a family that the user may change. Raises InvalidParameterError for any other family."""
    if family is None:
        raise InvalidParameterError("a family made of files has no family.toml to write to; `edge-dlf new` makes one")
    path = find_family(family).resolve()
    if path.is_relative_to(shipped_dir().resolve()):
        raise InvalidParameterError(f"{path}: ships with edge-dlf and is not changed; copy its folder to change it")
    return path


def write_settings(path: Path, tables: Mapping[str | None, Mapping[str, Any]]) -> None:
    """Put the settings of each profile into its table of a family.toml, those of None into [defaults]. A setting that
    is None is taken out.

    Raises InvalidParameterError, and leaves the file as it is, where the family could not be used then.
    """
    try:
        content = path.read_bytes()
        text = content.decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise FamilyError(f"{path}: cannot be read ({error})") from error
    try:
        for profile, settings in tables.items():
            text = with_settings(text, settings, profile)
        changed = text.encode("utf-8-sig" if content.startswith(BOM_UTF8) else "utf-8")
        FamilySpec.from_table(parse_toml(changed), path.parent)
    except ValueError as error:  # of this library, or of tomlkit, as for a file that has been damaged meanwhile
        raise InvalidParameterError(f"{path}: is not changed, for then {error}") from error
    with replacing(path) as file:
        file.write(changed)


def with_settings(text: str, settings: Mapping[str, Any], profile: str | None = None) -> str:
    """The text of a family.toml with `settings` in its profile, or in [defaults]."""
    document: Any = tomlkit.parse(text)
    if profile is None:
        table = document.setdefault("defaults", tomlkit.table())
    else:
        profiles = document.setdefault("profiles", tomlkit.table(is_super_table=True))
        is_dotted = any(key and key.key == "profiles" and key.is_dotted() for key, _ in document.body)
        is_inline = is_dotted or isinstance(profiles, InlineTable)
        table = profiles.setdefault(profile, tomlkit.inline_table() if is_inline else tomlkit.table())
    for name, value in settings.items():
        if value is None:
            table.pop(name, None)
        elif isinstance(value, Mapping):
            table[name] = tomlkit.inline_table()
            table[name].update(value)
        else:
            table[name] = value
    written: str = document.as_string()
    return written.replace("\r\n", "\n").replace("\n", "\r\n") if "\r\n" in text else written
