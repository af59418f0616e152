"""The tables of models/README.md: what is run, and how it is shown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_dlf import FusedLlama
from edge_dlf.families.spec import FamilySpec
from edge_dlf.params import FUSION

from .evaluate import Results, Score, evaluate, evaluate_newcomer
from .family import FAMILY, write_ceiling
from .stages import SEED, Build
from .tasks import SEEN, UNSEEN

N_PROMPTS = 500
N_SHOTS = 5
N_PARALLEL = 32
SCALES = (0.25, 0.5, 1.0)
N_TUNE = 200
NEWCOMER = "newcomer"
_ALL = (*SEEN, *UNSEEN)


@dataclass(frozen=True)
class Setup:
    """Models to load together, and what to run on them: method's label -> its settings, and the tasks."""

    name: str
    large: Path
    experts: Mapping[str, Any]
    methods: Mapping[str, Mapping[str, Any]]
    tasks: tuple[str, ...]
    n_shots: int = 0
    casual: bool = False


def run_tables(build: Build) -> None:
    """Run every cell that is not there yet."""
    results = Results(build.path("results.jsonl"))
    scale = _arithmetic_scale(results)
    for setup in _setups(build, scale):
        cells = [(label, task) for task in setup.tasks for label in setup.methods]
        missing = [cell for cell in cells if not results.get(_key(setup.name, *cell))]
        if not missing:
            continue
        with closing(_load(setup.large, setup.experts)) as llm:
            for label, task in missing:
                settings = setup.methods[label]
                if task == NEWCOMER:
                    score = evaluate_newcomer(llm, settings)
                else:
                    how = {"n_shots": setup.n_shots, "casual": setup.casual}
                    score = evaluate(llm, task, settings, split="test", n=N_PROMPTS, seed=SEED + 5, **how)
                results.add(_key(setup.name, label, task), score)


def _key(*parts: str) -> str:
    return "/".join(parts)


def _load(large: Path, experts: Mapping[str, Any]) -> FusedLlama:
    # One thread: such small models gain nothing from more.
    return FusedLlama(large, FAMILY / "base-q8_0.gguf", experts, n_ctx=512, n_threads=1, n_parallel=N_PARALLEL)


def _lora(task: str) -> Path:
    return FAMILY / f"{task}-lora-f16.gguf"


def _setups(build: Build, scale: float) -> Iterator[Setup]:
    large = FAMILY / "large-q8_0.gguf"
    everyone = {task: _lora(task) for task in SEEN}
    summed = {"sum": [(_lora(task), scale) for task in SEEN]}
    for task in SEEN:
        expert = {task: _lora(task)}
        methods = {
            "large": {"method": "large"},
            "base": {"method": "base"},
            "expert": {"method": task},
            "static": {"method": "static", "alpha": 1.0},
            "blend": {"method": "blend"},
            "dynamic": {"method": "dynamic"},
        }
        yield Setup("single", large, expert, methods, (task,))
        tuned = write_ceiling(build, f"ceiling.{task}")
        yield Setup("single", tuned, expert, {"tuned": {"method": "large"}}, (task,))
    own = FamilySpec.load(FAMILY).defaults
    multi = {
        "static": {"method": "static", "alpha": 1 / len(SEEN)},
        "blend": {"method": "blend"},
        "dynamic": {"method": "dynamic"},
        "default": {name: value for name, value in own.items() if name in FUSION},
    }
    yield Setup("multi", large, everyone, multi, _ALL)
    yield Setup("multi", large, everyone, {"large": {"method": "large"}}, UNSEEN)
    tuned = write_ceiling(build, "ceiling.all")
    yield Setup("multi", tuned, everyone, {"tuned": {"method": "large"}}, _ALL)
    as_typed = {"large": {"method": "large"}, "default": multi["default"]}
    yield Setup("casual", large, everyone, as_typed, (*SEEN, NEWCOMER), casual=True)
    arithmetic = {"alone": {"method": "sum"}, "dynamic": {"method": "dynamic"}}
    yield Setup("arithmetic", large, summed, arithmetic, _ALL)
    for task in SEEN:
        shots = {"large": {"method": "large"}, "dynamic": {"method": "dynamic"}}
        yield Setup("shots", large, {task: _lora(task)}, shots, (task,), N_SHOTS)


def _arithmetic_scale(results: Results) -> float:
    """Scale of the summed adapters at which they alone do best on the tuning problems of the seen tasks."""
    totals = {}
    for scale in SCALES:
        scores = {task: results.get(_key("tuning", str(scale), task)) for task in SEEN}
        if missing := [task for task, score in scores.items() if not score]:
            summed = {"sum": [(_lora(task), scale) for task in SEEN]}
            with closing(_load(FAMILY / "large-q8_0.gguf", summed)) as llm:
                for task in missing:
                    score = evaluate(llm, task, {"method": "sum"}, split="tune", n=N_TUNE, seed=SEED + 4)
                    results.add(_key("tuning", str(scale), task), score)
                    scores[task] = score
        totals[scale] = sum(score.accuracy for score in scores.values() if score)
    return max(totals, key=lambda scale: totals[scale])


def render(build: Build) -> str:
    """The tables in Markdown; a cell that has not been run is a dash, and a row of such cells is left out."""
    results = Results(build.path("results.jsonl"))

    def score(*parts: str) -> Score | None:
        return results.get(_key(*parts))

    def mean(table: str, label: str, tasks: tuple[str, ...]) -> float | None:
        scores = [score(table, label, task) for task in tasks]
        return sum(s.accuracy for s in scores if s) / len(tasks) if all(scores) else None

    def row(title: str, table: str, label: str, tasks: tuple[str, ...], average: tuple[str, ...] = SEEN) -> list[str]:
        cells = [_cell(score(table, label, task)) for task in tasks]
        return [title, *cells, _percent(mean(table, label, average))]

    def gap(table: str, method: str, tuned: tuple[str, str]) -> str:
        low, high = mean("single", "large", SEEN), mean(*tuned, SEEN)
        value = mean(table, method, SEEN)
        return "–" if low is None or high is None or value is None else f"{(value - low) / (high - low):.1%}"

    def multi_large(task: str) -> Score | None:
        return score("single" if task in SEEN else "multi", "large", task)

    singles = [
        row(title, "single", label, SEEN)
        for title, label in (
            ("large alone", "large"), ("base alone", "base"), ("expert alone", "expert"),
            ("static, α = 1", "static"), ("blend", "blend"), ("**dynamic**", "dynamic"), ("large, fine-tuned", "tuned"),
        )
    ]  # fmt: skip
    large_row = ["large alone", *(_cell(multi_large(task)) for task in _ALL), _percent(mean("single", "large", SEEN))]
    multis = [large_row] + [
        row(title, table, label, _ALL)
        for title, table, label in (
            (f"static, α = 1/{len(SEEN)} each", "multi", "static"), ("blend", "multi", "blend"),
            ("**dynamic**", "multi", "dynamic"), ("tuned, the family's own method", "multi", "default"),
            ("large, fine-tuned on all", "multi", "tuned"),
            ("adapters summed, alone", "arithmetic", "alone"), ("adapters summed, dynamic", "arithmetic", "dynamic"),
        )
    ]  # fmt: skip
    shots = [
        row(f"large alone, {N_SHOTS} examples", "shots", "large", SEEN),
        row(f"dynamic, {N_SHOTS} examples", "shots", "dynamic", SEEN),
    ]
    typed = [
        [*row(title, "casual", label, SEEN)[:-1], _cell(score("casual", label, NEWCOMER))]
        for title, label in (("large alone", "large"), ("tuned, the family's own method", "default"))
    ]
    single_tuned, multi_tuned = ("single", "tuned"), ("multi", "tuned")
    summed = gap("arithmetic", "dynamic", multi_tuned)
    unseen = ", ".join(f"{task}*" for task in UNSEEN)
    return "\n\n".join(
        [
            f"Accuracy in per cent with its 95% interval, {N_PROMPTS} prompts for each cell, greedy.",
            "**One expert at a time**",
            _table(["", *SEEN, "mean"], singles),
            f"Gap closed: dynamic {gap('single', 'dynamic', single_tuned)}, "
            f"static {gap('single', 'static', single_tuned)}.",
            f"**All four experts at once** (mean over the four seen tasks; no expert was trained on {unseen}; "
            "sorting met extremes in other words)",
            _table(["", *(task if task in SEEN else f"{task}*" for task in _ALL), "mean"], multis),
            f"Gap closed: dynamic {gap('multi', 'dynamic', multi_tuned)}, "
            f"static {gap('multi', 'static', multi_tuned)}"
            + (f", dynamic with the summed adapters {summed}." if summed != "–" else "."),
            "**As people type** (wordings of `recipe/casual.py`; questions of `recipe/newcomer.txt`)",
            _table(["", *SEEN, NEWCOMER], typed),
            "**Examples in the prompt**",
            _table(["", *SEEN, "mean"], shots),
        ]
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _cell(score: Score | None) -> str:
    if score is None:
        return "–"
    low, high = score.interval()
    return f"{100 * score.accuracy:.1f} ({100 * low:.0f}–{100 * high:.0f})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *(row for row in rows if set(row[1:]) != {"–"})]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
