"""`edge-dlf train`."""

from __future__ import annotations

import re
import shlex
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..errors import InvalidParameterError, require
from ..params import METHODS
from ..system.machine import MAX_THREADS
from .interrupts import interruptible
from .opening import open_family, size
from .options import FACTOR, SEED, Options
from .progress import ProgressLine, duration
from .prompts import raw_option
from .screen import Screen, one_line

if TYPE_CHECKING:
    from ..evidence.train.job import Job, Prepared
    from ..evidence.train.loop import State

_PATH = click.Path(path_type=Path)
_COUNT = click.IntRange(min=1)
_SHOWN = 60
"""Letters of a sample answer that are shown."""


@click.command(short_help="Train an expert on examples with answers.")
@click.argument("base", metavar="BASE")
@click.argument("data", metavar="DATA.jsonl...", type=_PATH, nargs=-1, required=True)
@click.option("--out", "-o", type=_PATH, required=True, help="The adapter's file.")
@click.option("--through", metavar="GGUF|FAMILY", help="Large model that the expert is to be fused with.")
@click.option("--no-base", is_flag=True, help="Train a corrector: it is added to the large model, without a base.")
@click.option(
    "--experts", metavar="GGUF,…", help="Adapters over BASE that are fused already; this one is added to them."
)
@raw_option
@click.option("--system", help="System prompt.")
@click.option("--rank", type=click.IntRange(1, 1 << 16), default=16, help="Rank of the updates [16].")
@click.option("--alpha", type=FACTOR, default=32.0, help="alpha / rank scales the updates [32].")
@click.option("--lr", type=FACTOR, default=4e-4, help="Highest learning rate [0.0004].")
@click.option("--batch", type=_COUNT, default=512, help="Tokens of a step [512].")
@click.option("--epochs", type=_COUNT, help="Times that each example is seen [as give 200 steps, 20 at most].")
@click.option("--steps", type=_COUNT, help="Steps, in place of epochs.")
@click.option("--max-length", type=click.IntRange(min=2), default=1024, help="Most tokens of an example [1024].")
@click.option("--seed", type=SEED, default=0, help="Of the order of the examples and the first weights [0].")
@click.option("--threads", type=click.IntRange(1, MAX_THREADS), help="CPU threads [the physical cores].")
def train(
    base: str,
    data: tuple[Path, ...],
    out: Path,
    through: str | None,
    no_base: bool,
    experts: str | None,
    raw: bool,
    system: str | None,
    threads: int | None,
    **settings: Any,
) -> None:
    """Train an expert: a LoRA over BASE, on the rows {"prompt": …, "answer": …} or {"messages": […]} of DATA.jsonl.

    With --through, it learns what the large model lacks: the loss is that of the fused answer. In place of BASE and
    --through, the name of a family means its base and its large model. A row may have a "weight".

    Some of the prompts are held out. The weights that do best on them are kept, and training stops where they get
    worse. Given again, a command that was stopped continues.
    """
    screen = Screen()
    try:
        import torch

        from ..evidence.train.job import Prepared
    except ImportError as error:
        raise InvalidParameterError(f"train needs torch: pip install 'edge-dlf[train]' ({error})") from error
    from ..evidence.examples import read_rows, tokenized
    from ..llama import default_n_threads
    from ..system.file_locks import locked

    job = _job(base, data, out, through, no_base, experts, settings)
    n_ctx, n_threads = job.check(), threads or default_n_threads()
    torch.set_num_threads(n_threads)
    rows = [row for path in data for row in read_rows(path)]
    loading = {"n_ctx": n_ctx, "n_threads": n_threads, "n_parallel": "auto"}
    with locked([out]):
        with open_family(Options(job.family(), None, loading, {}, system), screen) as llm:
            if llm.files.tokens.maps:
                raise InvalidParameterError(
                    "an expert cannot be trained through a model whose control tokens are others"
                )
            prepared = Prepared(job, tokenized(llm, rows, raw=raw, system=system), llm.n_vocab)
            if prepared.is_done:
                job.checkpoint.unlink(missing_ok=True)  # of a run that was killed at its very end
                screen.say(f"{out}: has been trained so already")
                return
            screen.say(_plan(prepared))
            constants = _read_large(screen, prepared, llm, n_threads)
            pieces = [llm.detokenize([token]) for token in range(llm.n_vocab)]
        state = _train(screen, prepared, constants, pieces)
    screen.say(_summary(prepared, state))
    for line in _next_steps(job, raw=raw):
        screen.show(line)


def _job(
    base: str,
    data: tuple[Path, ...],
    out: Path,
    through: str | None,
    no_base: bool,
    experts: str | None,
    settings: dict[str, Any],
) -> Job:
    """The training that the options ask for. Raises InvalidParameterError or FamilyError."""
    from ..evidence.train.job import Job, Settings
    from ..families.spec import FamilySpec

    family = None if base.endswith(".gguf") or Path(base).is_file() else FamilySpec.load(base)
    large = family.large.local_path() if family else None
    if through:
        is_file = through.endswith(".gguf") or Path(through).is_file()
        large = Path(through) if is_file else FamilySpec.load(through).large.local_path()
    others = [Path(part) for part in experts.split(",") if part] if experts else []
    if large is None and (no_base or others):
        raise InvalidParameterError(f"{'--no-base' if no_base else '--experts'} needs --through, the large model")
    require(not (no_base and others), "--experts are fused with their base, and --no-base is without one")
    return Job(
        base=family.base.local_path() if family else Path(base),
        data=data,
        out=out,
        large=large,
        kind="expert" if large is None else "corrector" if no_base else "fusion",
        settings=Settings(**settings),
        others=others,
    )


def _plan(prepared: Prepared) -> str:
    from ..evidence.train.job import where

    n_learnt = sum(len(example.answer) for example in prepared.examples)
    parts = (
        f"{len(prepared.taken):,} examples and {len(prepared.held_out):,} held out",
        f"{n_learnt:,} tokens to learn",
        f"{prepared.n_steps:,} steps on {where()}",
        f"about {size(prepared.n_bytes)} of memory",
    )
    return " · ".join(parts)


def _read_large(screen: Screen, prepared: Prepared, llm: Any, n_threads: int) -> Any:
    """Show progress while the models to train through read the examples; return their rows."""
    progress = ProgressLine(len(prepared.examples))
    progress.unit = "examples read by the large model"
    with interruptible(screen, llm.interrupt) as stop, progress.shown(screen):
        return prepared.read_rows(llm, n_threads, progress.counter(stop.check))


class _Line(ProgressLine):
    """Steps, loss, speed and time left."""

    state: State | None = None

    def figures(self) -> str:
        state = self.state
        if state is None:
            return "reading the base …"
        parts = [f"step {state.step:,}/{state.n_steps:,}"]
        if state.step:
            parts.append(f"loss {state.loss:.3f}")
        if state.checks:
            parts.append(f"held out {state.checks[-1].loss:.3f}")
        parts += _speed(state)
        if self.left_s is not None:
            parts.append(f"{duration(self.left_s)} left")
        return " · ".join(parts)


def _train(screen: Screen, prepared: Prepared, constants: Any, pieces: Sequence[str]) -> State:
    """Show progress while it trains, and at each check what the held-out examples say."""
    line = _Line(prepared.n_steps)
    with interruptible(screen, lambda: None, (signal.SIGINT, signal.SIGTERM)) as stop, line.shown(screen):

        def tell(state: State) -> None:
            if line.state is None:
                line.n_before = state.step
                line.start_clock()
                n_told[0] = max(0, len(state.checks) - 1)
            line.state, line.n_done = state, state.step
            for check in state.checks[n_told[0] :]:
                wanted = prepared.examples[check.sample[0]].text
                said = "".join(pieces[token] for token in check.sample[1])
                held_out = f"held out {check.loss:.3f} nats a token, {check.right:.0%} of answers right"
                screen.say(f"step {check.step:,}: {held_out} · {_short(wanted)} → {_short(said)}")
            n_told[0] = len(state.checks)
            line.tell()
            if stop.signal is not None:
                screen.say(f"stopped after step {state.step:,}; the same command continues")
            stop.check()

        n_told = [0]
        return prepared.train(constants, tell)


def _speed(state: State) -> list[str]:
    return [f"{state.n_tokens / state.elapsed_s:,.0f} tokens/s"] if state.n_tokens else []


def _short(text: str) -> str:
    text = one_line(text)
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 1]}…"


def _summary(prepared: Prepared, state: State) -> str:
    out, best = prepared.job.out, state.best
    parts = [f"{out}: {size(out.stat().st_size)}", f"{state.step:,} steps", *_speed(state), f"loss {state.loss:.3f}"]
    if best:
        parts.append(f"held out {state.checks[0].loss:.3f} → {best.loss:.3f} nats a token (step {best.step:,})")
    return " · ".join(parts)


def _next_steps(job: Job, *, raw: bool) -> Iterator[str]:
    """What to do with the adapter, in the form that it was trained with."""
    name = _name(job.out)
    large = shlex.quote(str(job.large or "LARGE.gguf"))
    files = f"--large {large} --base {shlex.quote(str(job.base))}"
    experts = [*job.others, job.out]
    named = " ".join(f"--expert {shlex.quote(f'{_name(path)}={path}')}" for path in experts)
    yield "To use it:"
    yield f"  edge-dlf new {shlex.quote(name)} {files} {named}"
    yield f"  edge-dlf tune OTHER_EXAMPLES.jsonl -f {shlex.quote(name)} --write{' --raw' if raw else ''}"
    yield f"  edge-dlf generate --raw -f {shlex.quote(name)} PROMPT" if raw else f"  edge-dlf chat {shlex.quote(name)}"


def _name(path: Path) -> str:
    """A name that a family and an expert may have, after a file's."""
    name = re.sub("[^A-Za-z0-9._-]+", "-", path.stem).lstrip("._-") or "expert"
    return f"{name}-expert" if name in METHODS else name
