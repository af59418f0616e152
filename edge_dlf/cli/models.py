"""`edge-dlf list` and `edge-dlf show`."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import FamilyError
from .opening import size
from .screen import Screen, printable
from .screen import show as shown

if TYPE_CHECKING:
    from ..families.catalogue import Entry
    from ..families.spec import FamilySpec

_CONTEXT = 4096


@click.command("list", short_help="Families that are here, and those of the catalogue.")
@click.option("--json", is_flag=True, help="Print one JSON object.")
def list_(json: bool) -> None:
    """List the families on this machine, those of the catalogue, and single models pulled from the hub."""
    from ..families.catalogue import read_catalogue
    from ..families.hub_cache import cached_models
    from ..families.library import installed

    screen, families = Screen(), installed()
    used = {path for family in families if family.spec for path in family.spec.local_files}
    models: list[dict[str, Any]] = [
        {"repo": model.repo, "file": model.file, "path": str(model.path), "bytes": _total(s.path for s in model.shards)}
        for model in cached_models()
        if model.path not in used
    ]
    here: list[dict[str, Any]] = [
        {
            "name": family.name,
            "path": str(family.folder),
            "complete": family.is_complete,
            "problem": family.problem,
            "bytes": _total(family.files),
        }
        for family in families
    ]
    names = {family.name for family in families}
    entries = [entry for name, entry in read_catalogue().items() if name not in names]
    sizes = [{"bytes": entry.download_bytes, "memory_bytes": entry.memory_bytes} for entry in entries]
    catalogue = [
        {"name": entry.spec.name, **_catalogued(entry), **own} for entry, own in zip(entries, sizes, strict=True)
    ]
    if json:
        screen.show_json({"families": here, "catalogue": catalogue, "models": models})
        return
    rows = [("FAMILY", "SIZE", "MEMORY", "", "")]
    rows += [(row["name"], size(row["bytes"]), "", "here", _state(row)) for row in here]
    rows += [(row["name"], size(row["bytes"]), size(row["memory_bytes"]), "", row["good_at"]) for row in catalogue]
    rows += [(f"{row['repo']} {row['file']}", size(row["bytes"]), "", "here", "a single model") for row in models]
    room = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for line in _columns(rows, right={1, 2}):
        screen.show(line if room is None or len(line) <= room else f"{line[: room - 1]}…")
    if catalogue and sys.stdout.isatty():
        screen.say("`edge-dlf pull FAMILY` downloads one that is not here; memory is with a context of 4096 tokens")


def _total(paths: Iterable[Path]) -> int:
    return sum(path.stat().st_size for path in paths)


def _state(row: dict[str, Any]) -> str:
    if row["problem"]:
        return f"cannot be read: {row['problem']}"
    return "" if row["complete"] else f"not complete; `edge-dlf pull {row['name']}`"


def _catalogued(entry: Entry | None) -> dict[str, Any]:
    """What only the catalogue knows of a family."""
    return {"license": entry.license, "good_at": entry.good_at, "sure": entry.sure} if entry else {}


def _columns(rows: Sequence[Sequence[str]], right: Collection[int] = ()) -> list[str]:
    """The rows as lines, each column as wide as its widest cell; columns without a cell are left out."""
    rows = [[printable(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if number in right else cell.ljust(width)
            for number, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        ).rstrip()
        for row in rows
    ]


@click.command(
    context_settings={"auto_envvar_prefix": "EDGE_DLF"}, short_help="Everything about one family, and whether it fits."
)
@click.argument("family", metavar="FAMILY")
@click.option("--ctx-size", type=click.IntRange(min=1), default=_CONTEXT, help="Tokens of the context [4096].")
@click.option("--json", is_flag=True, help="Print one JSON object.")
def show(family: str, ctx_size: int, json: bool) -> None:
    """Show one family: its files, sizes, quantization, context, tokenizer, template and licence, and whether it fits
    into this machine's memory. FAMILY is a name, a family.toml, or the folder of one.
    """
    from ..families.catalogue import read_catalogue
    from ..families.library import is_installed
    from ..families.spec import FamilySpec

    screen, entry = Screen(), read_catalogue().get(family)
    try:
        spec = FamilySpec.load(family)
    except FamilyError:
        if entry is None or is_installed(family):
            raise
        spec = entry.spec
    about = _about(spec, entry)
    if spec.is_downloaded:
        about |= _measured(spec, about["members"], ctx_size)
    elif entry:
        about["memory"] = _fit({"total": entry.memory_bytes, "n_ctx": _CONTEXT})
    if json:
        screen.show_json(about)
        return
    for line in _lines(about):
        screen.show(printable(line))
    if not about["complete"]:
        screen.say(f"`edge-dlf pull {family}` downloads what is missing; more can be shown then")


def _about(spec: FamilySpec, entry: Entry | None) -> dict[str, Any]:
    """What the family's own file and the catalogue say."""
    sizes = entry.n_bytes if entry else {}
    members = [
        {
            "member": role,
            **{key: value for key in ("repo", "file", "revision") if (value := getattr(source, key))},
            "path": str(source.local_file) if source.local_file else None,
            "bytes": _total(source.local_files) or sizes.get(source),
            "scale": scale,
        }
        for role, source, scale in spec.members
    ]
    about = {"name": spec.name, "complete": spec.is_downloaded, **_catalogued(entry)}
    settings = {"defaults": dict(spec.defaults), "profiles": {name: dict(own) for name, own in spec.profiles.items()}}
    return {**about, **settings, "members": members}


def _measured(spec: FamilySpec, members: Sequence[dict[str, Any]], n_ctx: int) -> dict[str, Any]:
    """What the headers of the files say; they are checked to fit together. Raises what `check_files` raises."""
    from ..families.describe import describe, memory_bytes
    from ..families.files import check_files

    files = check_files(spec)
    told = describe(files)
    told["members"] = [{**member, **own} for member, own in zip(members, told["members"], strict=True)]
    return {**told, "memory": _fit(memory_bytes(files, n_ctx))}


def _fit(memory: dict[str, int]) -> dict[str, Any]:
    import psutil

    free = psutil.virtual_memory().available
    return {**memory, "free": free, "fits": memory["total"] <= free}


def _lines(about: dict[str, Any]) -> list[str]:
    from ..families.catalogue import SURENESS

    sure = f"{about['sure']}: {SURENESS[about['sure']]}" if "sure" in about else None
    facts = [("licence", about.get("license")), ("good at", about.get("good_at")), ("catalogue", sure)]
    if tokenizer := about.get("tokenizer"):
        text = f"{tokenizer['kind']}, {tokenizer['n_vocab']:,} tokens shared by all, sha256 {tokenizer['sha256'][:16]}…"
        template = about.get("template")
        facts += [
            ("tokenizer", text),
            ("template", f"{len(template):,} characters, by the large model" if template else "none"),
            ("context", f"{about['n_ctx_train']:,} tokens" if "n_ctx_train" in about else None),
        ]
    for name, settings in (("defaults", about["defaults"]), *about["profiles"].items()):
        label = name if name == "defaults" else f"profile {name}"
        facts.append((label, ", ".join(f"{key} = {shown(value)}" for key, value in settings.items())))
    if memory := about.get("memory"):
        parts = [f"{name} {size(memory[name])}" for name in ("weights", "kv", "other") if name in memory]
        detail = f" ({', '.join(parts)})" if parts else ""
        total, fits = size(memory["total"]), "fits" if memory["fits"] else "does not fit"
        text = f"{total} with {memory['n_ctx']:,} tokens{detail}; {fits}, {size(memory['free'])} free"
        facts.append(("memory", text))
    rows = [("", "SIZE", "", "FILE")]
    for member in about["members"]:
        kind = " ".join(filter(None, (member.get("kind"), member.get("quantization"))))
        where = f"{member['repo']} {member['file']}" if "repo" in member else member["path"]
        scale = "" if member.get("scale") in (None, 1.0) else f" × {member['scale']:g}"
        rows.append((member["member"], size(member["bytes"]), kind, where + scale))
    return [
        about["name"],
        *_columns([(f"  {name}", value) for name, value in facts if value]),
        "",
        *(f"  {line}" for line in _columns(rows, right={1})),
    ]
