"""`edge-dlf serve`."""

from __future__ import annotations

from typing import Any

import click

from ..errors import InvalidParameterError
from .opening import family_command, open_family
from .options import PARALLEL, POSITIVE, Options, family_argument, prompt_cache_option, shared_options
from .screen import Screen


@family_command(short_help="Serve OpenAI's API over HTTP.")
@family_argument
@click.option("--host", default="127.0.0.1", help="Address to listen at [127.0.0.1, this machine alone].")
@click.option("--port", type=click.IntRange(0, 65535), default=8080, help="Port; 0 for any [8080].")
@click.option("--api-key", metavar="KEY", help="What clients must send; better given as EDGE_DLF_API_KEY.")
@click.option("--no-auth", is_flag=True, help="Serve other machines without a key.")
@click.option("--parallel", type=PARALLEL, default="auto", help="Answers at once [auto: 16, or 32 on a GPU].")
@click.option("--queue", type=click.IntRange(min=0), default=64, help="Answers that may wait; more are refused [64].")
@click.option("--timeout", type=POSITIVE, default=600.0, help="Seconds an answer may take [600].")
@prompt_cache_option
@shared_options
@click.pass_context
def serve(
    ctx: click.Context, /, host: str, port: int, api_key: str | None, no_auth: bool, queue: int, timeout: float,
    **shared: Any,
) -> None:  # fmt: skip
    """Serve a family to programs that speak OpenAI's API, and a chat to browsers.

    The models on offer are the family's name (the family's own method, else dynamic), NAME:static, NAME:blend,
    NAME:weighted if the family has weights, NAME:large, NAME:EXPERT and NAME:PROFILE; any other setting of the fusion
    goes into a request's "edge_dlf". Ctrl-C lets answers end for a moment; a second one does not.
    """
    options, screen = Options.of(ctx, shared), Screen()
    try:
        from ..server import LOOPBACK, Address, Rules, run
    except ImportError as error:
        raise InvalidParameterError(f"serve needs a web server: pip install 'edge-dlf[serve]' ({error})") from error
    address = Address.bind(host, port)
    with address.socket:
        if not (address.is_local or api_key or no_auth):
            raise InvalidParameterError(
                f"{host} can be reached from other machines: give an --api-key, or --no-auth to let anyone in"
            )
        hosts = (*LOOPBACK, address.host, host.lower()) if address.is_local else None
        settings = {**options.settings, "system": options.system}
        rules = Rules(settings, n_waiting=queue, timeout_s=timeout, api_key=api_key, hosts=hosts)
        with open_family(options, screen) as llm:
            n_parallel = llm.driver.n_parallel
            ready = f"{llm.name} at {address.url} · OpenAI's API below /v1 · {n_parallel} answers at once"
            run(llm, address, rules, lambda: screen.say(f"{ready} · Ctrl-C ends"))
