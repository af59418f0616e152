"""`edge-dlf eval`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InvalidParameterError, require
from ..params import DEFAULTS, FUSION, settable
from ..system.paths import expanded
from .interrupts import interruptible
from .opening import family_command, open_family
from .options import Options, family_argument, shared_options
from .screen import Screen

if TYPE_CHECKING:
    from ..api import FusedLlama
    from ..evidence.evaluate import Variant
    from ..families.manifest import Manifest


@family_command("eval", short_help="Measure methods on tasks.")
@family_argument
@click.option("--tasks", "-t", metavar="TASK,…", required=True, help="Tasks of lm-evaluation-harness, or YAML files.")
@click.option(
    "--methods",
    metavar="METHOD …",
    help="What is compared: `static:alpha=0.5 dynamic:search=exact,plausibility=0.1 large:fewshot=5` "
    "[large, each expert, static, blend, weighted where there are weights, and dynamic].",
)
@click.option(
    "--data",
    metavar="TASK=FILE[,FILE]",
    multiple=True,
    help="JSON lines for a task in place of the hub's: to be answered, and for few-shot prompts. Repeatable.",
)
@click.option("--limit", type=click.IntRange(min=1), help="Examples of each task [all].")
@click.option("--fewshot", type=click.IntRange(min=0), help="Examples in each prompt [what the task says].")
@click.option("--chat", is_flag=True, help="Put prompts through the chat template.")
@click.option("--parallel", type=click.IntRange(min=1), help="Examples at once [16, or 32 on a GPU].")
@click.option(
    "--output", "-o", metavar="FOLDER", type=click.Path(path_type=Path), required=True, help="Where results are kept."
)
@shared_options
@click.pass_context
def evaluate(
    ctx: click.Context,
    /,
    tasks: str,
    methods: str | None,
    data: tuple[str, ...],
    limit: int | None,
    fewshot: int | None,
    chat: bool,
    output: Path,
    **shared: Any,
) -> None:
    """Measure several methods of one family on tasks of lm-evaluation-harness: a table of means and paired differences,
    with 95% intervals, as results.md and results.json in FOLDER.

    Given again, the same command goes on where it was stopped: answers are kept in FOLDER. The paper's tasks are
    paper_gsm8k, paper_truthfulqa, paper_triviaqa, paper_cnn_dm and paper_mmlu.
    """
    parallel = shared.pop("parallel") or "auto"
    options, screen = Options.of(ctx, {**shared, "parallel": parallel}), Screen()
    require(chat or not options.system, "a system prompt needs the chat template: add --chat")
    try:
        from ..evidence.evaluate import Plan, run
    except ImportError as error:
        raise InvalidParameterError(f"eval needs the harness: pip install 'edge-dlf[eval]' ({error})") from error
    output = expanded(output)
    plan = Plan([task for task in tasks.split(",") if task], _data(data), limit, fewshot, chat, options.system)
    require(plan.tasks, "--tasks names no task")
    named = options.methods(options.files) if methods is None else methods.split()
    require(named, "--methods names no method")
    variants = [_variant(text, options) for text in named]
    llm: FusedLlama | None = None
    with ExitStack() as stack:
        stop = stack.enter_context(interruptible(screen, lambda: llm.interrupt() if llm else None))

        def load() -> FusedLlama:
            nonlocal llm
            with stop.at_once():
                llm = llm or stack.enter_context(open_family(options, screen))
            return llm

        manifest, begin = partial(_manifest, options), lambda name: screen.say(f"{name} …")
        screen.write(run(plan, variants, load, manifest, output, begin))
    screen.say(f"results: {output / 'results.md'}, {output / 'results.json'}")


def _variant(text: str, options: Options) -> Variant:
    """METHOD[:SETTING=VALUE,…], over what the shared options and the family say."""
    from ..evidence.evaluate import Variant

    known, (method, _, rest) = settable("eval"), text.partition(":")
    settings: dict[str, Any] = {name: value for name, value in options.settings.items() if name in FUSION}
    settings["method"] = method
    n_fewshot = None
    names = "|".join(("fewshot", *known))
    for pair in filter(None, re.split(f",(?=$|(?:{names})=)", rest)):  # alpha and weights may hold commas: a=1,b=2
        name, _, value = pair.partition("=")
        if name == "fewshot" and value.isascii() and value.isdigit():
            n_fewshot = int(value)
        elif name in known:
            settings[name] = known[name].parse(value)
        else:
            raise InvalidParameterError(
                f"expected METHOD:SETTING=VALUE, not {text!r}; the settings are fewshot, {', '.join(known)}"
            )
    options.files.roles({**options.files.spec.settings(), **settings})
    return Variant(text, settings, n_fewshot)


def _data(given: Sequence[str]) -> dict[str, list[Path]]:
    data = {}
    for text in given:
        task, _, files = text.partition("=")
        paths = [Path(file) for file in files.split(",") if file]
        require(1 <= len(paths) <= 2, f"expected TASK=FILE or TASK=FILE,FILE, not {text!r}")
        data[task] = paths
    return data


def _manifest(options: Options, settings: Mapping[str, Any]) -> Manifest:
    """The family, and every parameter that can change an answer or a score."""
    from ..families.manifest import Manifest

    given = {**DEFAULTS, **options.files.spec.settings(), **settings}
    fusion = {name: value for name, value in given.items() if name in FUSION}
    return Manifest.of(options.files, {**fusion, "system": options.system, **options.cache})
