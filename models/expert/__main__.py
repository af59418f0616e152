"""`python -m models.expert BASE.gguf DATA.jsonl -o EXPERT.gguf`."""

from __future__ import annotations

from hashlib import blake2b
from pathlib import Path

import click
import torch

from edge_dlf.cli.screen import one_line
from edge_dlf.errors import EdgeDLFError

from ..recipe.export import write_lora
from ..recipe.train import Schedule, device, join, train
from .base import read_base
from .examples import Batches, read_examples

_PATH = click.Path(path_type=Path)


class _Command(click.Command):
    """Turns what it raises into one line and an exit code."""

    def invoke(self, ctx: click.Context) -> None:
        try:
            super().invoke(ctx)
        except EdgeDLFError as error:
            click.echo(f"models.expert: {one_line(error)}", err=True)
            ctx.exit(error.exit_code)
        except KeyboardInterrupt:
            ctx.exit(130)


@click.command(cls=_Command, context_settings={"show_default": True, "help_option_names": ["-h", "--help"]})
@click.argument("base", type=_PATH)
@click.argument("data", type=_PATH)
@click.option("--out", "-o", type=_PATH, required=True, help="The adapter's file.")
@click.option("--rank", type=click.IntRange(min=1), default=16, help="Of the updates.")
@click.option("--alpha", type=click.FloatRange(min=0, min_open=True), default=32.0, help="alpha / rank scales them.")
@click.option("--lr", type=click.FloatRange(min=0, min_open=True), default=4e-4, help="Learning rate at its highest.")
@click.option("--batch", type=click.IntRange(min=1), default=512, help="Tokens of a step.")
@click.option("--epochs", type=click.IntRange(min=1), default=1, help="Times that each example is seen.")
@click.option("--steps", type=click.IntRange(min=1), help="Of training, where fewer than the epochs have.")
@click.option("--max-length", type=click.IntRange(min=2), default=1024, help="Most tokens of an example.")
@click.option("--seed", type=int, default=0)
@click.option("--threads", type=click.IntRange(min=1), help="CPU threads of torch.  [default: its own choice]")
def main(
    base: Path,
    data: Path,
    out: Path,
    rank: int,
    alpha: float,
    lr: float,
    batch: int,
    epochs: int,
    steps: int | None,
    max_length: int,
    seed: int,
    threads: int | None,
) -> None:
    """Train a LoRA over BASE on the lines {"prompt": …, "answer": …} of DATA.

    BASE is a GGUF of the architecture llama or qwen2, of any quantisation. Stopped, the same command goes on where it
    was.
    """
    if threads:
        torch.set_num_threads(threads)
    model = read_base(base, max_length)
    examples = read_examples(data, base, model.shape.n_ctx)
    batches = Batches(examples, batch, epochs, seed)
    n_steps = min(steps or len(batches), len(batches))
    n_tokens, n_learnt = sum(map(len, examples)), sum(len(example.answer) for example in examples)
    click.echo(f"{len(examples)} examples, {n_tokens} tokens, {n_learnt} of them learnt; {n_steps} steps", err=True)
    torch.manual_seed(seed)
    model.add_lora(rank, alpha / rank)
    kind = repr((base.stat().st_size, base.name, rank, alpha, lr, n_steps, batch, epochs, seed, examples))
    checkpoint = out.with_name(f"{out.name}.{blake2b(kind.encode(), digest_size=4).hexdigest()}.pt")
    schedule = Schedule(n_steps, lr, warm_up=0.05, decay=0.95)
    train(model, batches, schedule, checkpoint, out.name, seed=seed, loss_of=model.sparse_loss)
    if join()[0] > 0:  # torchrun's other processes
        return
    about = f"LoRA over {base.name}, trained by models/expert of edge-dlf on {data.name}."
    write_lora(out, model.to("cpu"), out.stem, about, licence=None)
    checkpoint.unlink()
    click.echo(f"{out}: {out.stat().st_size / 1e6:.1f} MB, trained on {device()}", err=True)


if __name__ == "__main__":
    main()
