"""Settings written into [defaults] or a profile of a family.toml, with everything else of the file kept as it is."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import FamilyError, InvalidParameterError
from ..system.durable import replacing
from ..system.paths import shipped_dir
from .spec import FamilySpec, find_family

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

_BARE = re.compile(r"[A-Za-z0-9_-]+")


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

    Raises InvalidParameterError, and leaves the file as it is, where it cannot be changed line by line.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FamilyError(f"{path}: cannot be read ({error})") from error
    for profile, settings in tables.items():
        changed = with_settings(text, settings, profile)
        if changed is None:
            lines = "; ".join(_line(name, value) for name, value in settings.items() if value is not None)
            where = _header(profile)
            raise InvalidParameterError(f"{path}: cannot be changed line by line; put into its {where}: {lines}")
        text = changed
    try:
        FamilySpec.from_table(tomllib.loads(text), path.parent)
    except InvalidParameterError as error:
        raise InvalidParameterError(f"{path}: is not changed, for then {error}") from error
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def with_settings(text: str, settings: Mapping[str, Any], profile: str | None = None) -> str | None:
    """The text of a family.toml with `settings` in its profile, or in [defaults]; None where lines are not enough to
    change it."""
    newline = "\r\n" if "\r\n" in text else "\n"
    lines = text.split(newline)
    header = next((n for n, line in enumerate(lines) if _begins(line, profile)), None)
    if header is None:
        lines[len(lines) - (not lines[-1]) :] = [_header(profile), ""]
        header = len(lines) - 2
    stop = next((n for n in range(header + 1, len(lines)) if lines[n].lstrip().startswith("[")), len(lines))
    section = lines[header + 1 : stop]
    for name, value in settings.items():
        places = [n for n, line in enumerate(section) if re.match(rf'\s*"?{name}"?\s*=', line)]
        if value is None:
            section = [line for n, line in enumerate(section) if n not in places]
        elif places:
            section[places[0]] = _line(name, value) + _comment(section[places[0]])
        else:
            last = max((n for n, line in enumerate(section) if line.strip()), default=-1)
            section.insert(last + 1, _line(name, value))
    changed = newline.join([*lines[: header + 1], *section, *lines[stop:]])
    wanted = tomllib.loads(text)
    tables, key = (wanted, "defaults") if profile is None else (wanted.setdefault("profiles", {}), profile)
    kept = {name: value for name, value in tables.get(key, {}).items() if name not in settings}
    tables[key] = kept | {name: value for name, value in settings.items() if value is not None}
    try:
        return changed if tomllib.loads(changed) == wanted else None
    except tomllib.TOMLDecodeError:
        return None


def _header(profile: str | None) -> str:
    """The line that begins the table of a profile, or the defaults."""
    return "[defaults]" if profile is None else f"[profiles.{_key(profile)}]"


def _begins(line: str, profile: str | None) -> bool:
    """Whether a line is the header of a profile's table, or of the defaults, however it is written."""
    if not line.lstrip().startswith("["):
        return False
    try:
        return bool(tomllib.loads(line) == ({"defaults": {}} if profile is None else {"profiles": {profile: {}}}))
    except tomllib.TOMLDecodeError:
        return False


def _key(name: str) -> str:
    return name if _BARE.fullmatch(name) else json.dumps(name)


def _line(name: str, value: Any) -> str:
    if isinstance(value, Mapping):
        pairs = (f"{_key(key)} = {number!r}" for key, number in value.items())
        return f"{name} = {{ {', '.join(pairs)} }}"
    return f"{name} = {json.dumps(value)}"


def _comment(line: str) -> str:
    """The comment at the end of a line that assigns a value, with the spaces before it."""
    for match in re.finditer(r"\s*#", line):
        try:
            tomllib.loads(line[: match.start()])
        except tomllib.TOMLDecodeError:
            continue
        return line[match.start() :]
    return ""
