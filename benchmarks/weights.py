"""Fusion with weights that nobody fitted, and with weights fitted to few examples, on the tasks of the shipped family.

    python benchmarks/weights.py fixed [--split tune|test] [--n 200]      answers right without examples, by method
    python benchmarks/weights.py curve [--task TASK] [--n 200]            answers right by the number of examples
    python benchmarks/weights.py curve --family FAMILY --examples EXAMPLES.jsonl [--raw]     loss on the other examples

Answers are greedy and generated; every method gets the same questions. Needs reasoning-gym, which draws the questions:
pip install '.[recipe]'. Takes some minutes on one thread.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from edge_dlf import FusedLlama
from edge_dlf.evidence.answer_rows import evaluate
from edge_dlf.evidence.examples import Example, read_rows, tokenized
from edge_dlf.evidence.stats import paired
from edge_dlf.evidence.tune import tune_tasks
from edge_dlf.fusion import fit
from edge_dlf.system.paths import shipped_dir
from models.recipe.evaluate import answers, questions
from models.recipe.tasks import SEEN, TASKS, answer_of, reply

FAMILY = shipped_dir() / "demo"
SEEDS = {"tune": 7, "test": 11}
COUNTS = (5, 10, 20, 50, 100, 200)
N_DRAWS = 3
ORDER = ("own", "another task's", "all four")


def family(experts: Sequence[str]) -> FusedLlama:
    """The shipped large model and base with some of the experts."""
    files = {task: FAMILY / f"{task}-lora-f16.gguf" for task in experts}
    return FusedLlama(
        FAMILY / "large-q8_0.gguf", FAMILY / "base-q8_0.gguf", files, n_ctx=512, n_threads=1, n_parallel=32
    )


def right(llm: FusedLlama, task: str, split: Any, n: int, settings: Mapping[str, Any]) -> list[float]:
    """Whether each of n answers is right, 1 or 0."""
    problems, chats = zip(*questions(task, split, n, SEEDS[split]), strict=True)
    said = answers(llm, chats, settings)
    return [float(TASKS[task].is_right(answer_of(text), p)) for text, p in zip(said, problems, strict=True)]


def blends(experts: Sequence[str]) -> Iterator[tuple[str, dict[str, Any]]]:
    """The methods that need no examples. What several experts have together is shared evenly."""
    yield "large", {"method": "large"}
    if len(experts) == 1:
        yield "expert", {"method": experts[0]}
    yield "static", {"method": "static", "alpha": 1 / len(experts)}
    yield "dynamic", {"method": "dynamic"}
    yield "blend", {"method": "blend"}
    weights = {"large": 0.5, "base": -0.3, **{name: 0.8 / len(experts) for name in experts}}
    yield "0.5, −0.3, 0.8", {"method": "weighted", "weights": weights}


def fixed(split: str, n: int) -> None:
    found: dict[tuple[str, str, str], list[float]] = {}  # (which experts, method, task) -> right answers
    for experts in (*((task,) for task in SEEN), SEEN):
        with family(experts) as llm:
            for name, settings in blends(experts):
                for task in SEEN:
                    which = "all four" if len(experts) > 1 else "own" if experts == (task,) else "another task's"
                    found.setdefault((which, name, task), []).extend(right(llm, task, split, n, settings))
                print(".", end="", file=sys.stderr, flush=True)
    print(f"\n{split} split, {n} questions a task\n")
    print(f"| experts | method | {' | '.join(SEEN)} | mean | − dynamic |\n|{'---|' * (4 + len(SEEN))}")
    for which, name in sorted({key[:2]: None for key in found}, key=lambda pair: ORDER.index(pair[0])):
        rows = [found[which, name, task] for task in SEEN]
        both = [[hit for task in SEEN for hit in found[which, each, task]] for each in (name, "dynamic")]
        cells = [f"{100 * sum(row) / len(row):.1f}" for row in rows]
        gain = paired(*both)
        cells += [
            f"{100 * sum(both[0]) / len(both[0]):.1f}",
            f"{100 * gain.mean:+.1f} [{100 * gain.low:+.1f}, {100 * gain.high:+.1f}]",
        ]
        print(f"| {which} | {name} | {' | '.join(cells)} |")


def curve(task: str, n: int) -> None:
    """Answers right with what `tune` recommends, by the number of its examples; mean and range of several draws."""
    with family(SEEN) as llm, TemporaryDirectory() as folder:
        drawn = examples(llm, task, N_DRAWS * max(COUNTS))
        shares: dict[int, list[float]] = {count: [] for count in COUNTS}
        for draw in range(N_DRAWS):
            own = drawn[draw * max(COUNTS) : (draw + 1) * max(COUNTS)]
            found = tune_tasks(llm, {str(count): own[:count] for count in COUNTS}, n_threads=1, folder=Path(folder))
            for count in COUNTS:
                settings = {name: value for name, value in found[str(count)].settings.items() if value is not None}
                shares[count].append(100 * sum(right(llm, task, "test", n, settings)) / n)
        plain = [f"{100 * sum(right(llm, task, 'test', n, {'method': m})) / n:.1f}" for m in ("dynamic", "large", task)]
    print(f"| {task} | {' | '.join([*map(spread, shares.values()), *plain])} |", flush=True)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """The mean, and the lowest and the highest."""
    mean, low, high = (f"{x:.{digits}f}" for x in (sum(values) / len(values), min(values), max(values)))
    return mean if low == high else f"{mean} ({low} to {high})"


def curve_of(name: str, path: Path, raw: bool) -> None:
    """Nats a token on the other examples of a file, by the number of examples that `tune` gets."""
    with FusedLlama.from_family(name, n_threads=1, n_parallel="auto") as llm:
        everything = tokenized(llm, read_rows(path), raw=raw, system=None)
        numbers = np.arange(len(everything))
        orders = [np.random.default_rng(draw).permutation(numbers) for draw in range(N_DRAWS)]
        counts = [count for count in COUNTS if count <= len(everything) // 2]
        chosen = {f"{count} {draw}": order[:count] for count in counts for draw, order in enumerate(orders)}
        tasks = {key: [everything[k] for k in own] for key, own in chosen.items()}
        results = tune_tasks(llm, {"": everything, **tasks}, n_threads=1)
        found = evaluate(llm, everything, 1)
    plain = {outcome.name: outcome.losses for outcome in results[""].outcomes if not outcome.prior}

    def loss(key: str) -> tuple[float, float]:
        """Of what is recommended, and of dynamic, on the examples that were not chosen."""
        rest = np.setdiff1d(numbers, chosen[key])
        best, rows = results[key].recommended, found.take(rest.tolist()).rows
        if best.prior:
            own = rows.take(members=[rows.names.index(member) for member in best.members])
            total = fit.losses(own, list(best.settings["weights"].values())).values.sum()
        else:
            total = plain[best.name][rest].sum()
        return total / len(rows), plain["dynamic"][rest].sum() / len(rows)

    print("| examples | tuned, nats a token | below dynamic |\n|---|---|---|")
    for count in counts:
        pairs = [loss(f"{count} {draw}") for draw in range(N_DRAWS)]
        print(f"| {count} | {spread([a for a, _ in pairs], 3)} | {spread([b - a for a, b in pairs], 3)} |")


def examples(llm: FusedLlama, task: str, n: int) -> list[Example]:
    """Examples of the tuning split, as tokens."""
    rows = [
        ("", {"messages": [*chat, {"role": "assistant", "content": reply(problem)}]})
        for problem, chat in questions(task, "tune", n, SEEDS["tune"])
    ]
    return tokenized(llm, rows, raw=False, system=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("fixed", "curve"))
    parser.add_argument("--split", choices=tuple(SEEDS), default="test")
    parser.add_argument("--n", type=int, default=200, help="questions of each task [200]")
    parser.add_argument("--task", choices=SEEN, help="the only task of the curve [each]")
    parser.add_argument("--family", help="the family of a curve over the examples of a file")
    parser.add_argument("--examples", type=Path)
    parser.add_argument("--raw", action="store_true")
    given = parser.parse_args()
    if given.what == "fixed":
        fixed(given.split, given.n)
    elif given.examples:
        curve_of(given.family, given.examples, given.raw)
    else:
        heads = ["task", *map(str, COUNTS), "dynamic", "large", "expert"]
        print(f"| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
        for task in [given.task] if given.task else SEEN:
            curve(task, given.n)


if __name__ == "__main__":
    main()
