"""`edge-dlf pull` and `edge-dlf rm`."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

import click

from ..errors import FamilyError, InvalidParameterError, require, shown
from .opening import Notices, notices, size
from .screen import Screen

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ..families.hub import HubFile
    from ..families.spec import FamilySpec


@click.command(short_help="Download a family, or one model, from the Hugging Face hub.")
@click.argument("target", metavar="FAMILY|REPO[:QUANT]")
@click.option("--offline", is_flag=True, help="Use only what is on this machine.")
def pull(target: str, offline: bool) -> None:
    """Download what is missing of a family (a name from `edge-dlf list`, a family.toml, or the folder of one), and
    check that its files fit together. REPO[:QUANT] brings one model, such as Qwen/Qwen2.5-0.5B-Instruct-GGUF:Q8_0;
    Q4_K_M where none is said.

    Files go to the cache that all programs with huggingface-hub share. A download that broke off goes on where it
    stopped. The path of the family.toml, or of the model, goes to stdout.
    """
    from ..families.catalogue import read_catalogue
    from ..families.library import is_installed, parse_repo, write_family
    from ..families.spec import FILE_NAME, FamilySpec, find_family
    from ..system.paths import expanded

    from huggingface_hub import constants  # isort: skip  # after what says why it cannot be loaded

    _check_endpoint(constants.ENDPOINT)
    import huggingface_hub.utils  # noqa: F401  # sets up its logger

    screen, offline = Screen(), offline or constants.HF_HUB_OFFLINE
    path = expanded(target)
    is_path = path.is_file() or (path / FILE_NAME).is_file()
    repo, catalogue = parse_repo(target), read_catalogue()
    with notices("huggingface_hub", Notices(screen)):
        if is_path or is_installed(target):
            _pull_family(FamilySpec.load(target), screen, offline)
            screen.show(str(find_family(target)))
        elif target in catalogue:
            spec = _pull_family(replace(catalogue[target].spec, origin=target), screen, offline)
            screen.show(str(write_family(spec)))
        elif repo:
            screen.show(str(_pull_model(*repo, screen, offline)))
        else:
            raise FamilyError(f"{target}: no such family; `edge-dlf list` names them, a model is given as OWNER/NAME")


def _check_endpoint(url: str) -> None:
    """Raise InvalidParameterError for what is no address of a hub, on which huggingface-hub fails when it is loaded."""
    try:
        parts = urlsplit(url)
        is_url = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # of the port, which is read when it is asked for
        is_url = False
    require(is_url, f"HF_ENDPOINT must be the address of a hub, such as https://huggingface.co, not {shown(url)}")


def _pull_family(spec: FamilySpec, screen: Screen, offline: bool) -> FamilySpec:
    """Bring all files of `spec` here, check them together, and return it with their revisions and hashes."""
    from ..families.files import check_files
    from ..families.library import from_cache, note_revisions, plan_pull

    if offline:
        try:
            pinned = from_cache(spec)
        except FamilyError as error:
            raise FamilyError(f"{error}, where the network may be used") from error
    else:
        pinned, files = plan_pull(spec)
        _download(files, screen)
        note_revisions(spec, pinned)
    check_files(pinned)
    screen.say(f"{spec.name} is complete: its files share one tokenizer")
    return pinned


def _pull_model(repo: str, quant: str | None, screen: Screen, offline: bool) -> Path:
    """Bring one model here; returns its path, of a split one that of the first file."""
    from ..families.hub import choose, read_repo
    from ..families.hub_cache import cached_models
    from ..gguf.info import read_info
    from ..gguf.shards import shard_names

    if offline:
        here = {model.file: model for model in cached_models() if model.repo == repo}
        if not here:
            raise FamilyError(f"{repo} is not on this machine, and the network may not be used")
        return here[choose(repo, here, quant)].path
    listing = read_repo(repo)
    files = [listing.file(name) for name in shard_names(choose(repo, listing.files, quant))]
    _download(files, screen)
    read_info(files[0].path)
    return files[0].path


def _download(files: Sequence[HubFile], screen: Screen) -> None:
    from ..families.hub import check_space, download, missing_bytes

    n_bytes = check_space(files)
    if n_bytes:
        screen.say(f"{size(n_bytes)} to download")
    try:
        for file in files:
            verb = "downloading" if missing_bytes(file) else "checking"
            screen.say(f"{verb} {file.name} of {file.repo} ({size(file.n_bytes)})")
            download(file)
    except KeyboardInterrupt:
        screen.say("stopped; the same command goes on from here")
        raise


@click.command(short_help="Remove a family, or one model, from this machine.")
@click.argument("target", metavar="FAMILY|REPO[:QUANT]")
@click.option("--yes", "-y", is_flag=True, help="Do not ask.")
@click.pass_context
def rm(ctx: click.Context, target: str, yes: bool) -> None:
    """Remove a family of the models folder: its family.toml, its files beside it, and its files in the hub's cache
    that no other family names. REPO[:QUANT] removes models that `edge-dlf pull` brought alone. Says first what goes.
    """
    from ..families.library import parse_repo, plan_model_removal, plan_removal, remove

    screen, repo = Screen(), parse_repo(target)
    removal = plan_model_removal(*repo) if repo else plan_removal(target)
    for path in removal.paths:
        screen.say(f"{path}")
    for owner, file, _ in removal.hub_files:
        screen.say(f"{file} of {owner}, in the cache that other programs may use too")
    for kept in removal.kept:
        screen.say(f"kept: {kept.file}, which another family names")
    try:
        is_wanted = yes or click.confirm(f"remove {removal.name} and free {size(removal.n_bytes)}?", err=True)
    except click.Abort:
        if sys.stdin.isatty():
            raise
        raise InvalidParameterError("nobody is there to ask; --yes removes without asking") from None
    if not is_wanted:
        screen.say("nothing was removed")
        ctx.exit(1)
    screen.say(f"{size(remove(removal))} freed")
