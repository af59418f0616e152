"""Extension of mkdocstrings: the arguments in a docstring become items of a list, and a tree a block of text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from griffe import Attribute, Class, Extension, Function, Object

_ENTRY = re.compile(r"^(\w+(?:, \w+)*):(.*)$")
_LATER = re.compile(r"(?<=[.)])\s+(\w+(?:, \w+)*):(?=\s)")
_TREE = re.compile(r"[├└│]")


class Arguments(Extension):
    """Rewrites docstrings in the style of this package, where `name: text` begins a line or follows a sentence."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            names = _names(obj)
            text = _LATER.sub(
                lambda entry: f"\n{entry[0].lstrip()}" if _is_of(entry[1], names) else entry[0], obj.docstring.value
            )
            obj.docstring.value = "\n".join(_rewritten(text.splitlines(), names))


def _names(obj: Object) -> set[str]:
    """What a docstring may describe: arguments of a function; of a class, its fields and what makes it."""
    if isinstance(obj, Function):
        return {parameter.name.lstrip("*") for parameter in obj.parameters}
    if isinstance(obj, Class):
        made = obj.members.get("__init__")
        fields = {name for name, member in obj.members.items() if isinstance(member, Attribute)}
        return fields | (_names(made) if isinstance(made, Function) else set())
    return set()


def _is_of(words: str, names: set[str]) -> bool:
    return {*words.split(", ")} <= names


def _rewritten(lines: list[str], names: set[str]) -> Iterator[str]:
    is_item = is_tree = False
    for number, line in enumerate(lines):
        entry = _ENTRY.match(line)
        if entry and _is_of(entry[1], names):
            yield from [] if is_item else [""]
            is_item = True
            yield f"- {', '.join(f'**`{name}`**' for name in entry[1].split(', '))}:{entry[2]}"
        elif is_item and line and not line.startswith("Raises "):
            yield f"  {line.strip()}"
        else:
            begins_tree = not is_tree and any(map(_TREE.search, lines[number + 1 : number + 2]))
            if begins_tree:
                yield "```text"
            if is_item or line.startswith("Raises "):
                yield ""
            yield line
            is_item = False
            is_tree = begins_tree or bool(is_tree and line)
            if is_tree and not any(lines[number + 1 : number + 2]):
                yield "```"
                is_tree = False
