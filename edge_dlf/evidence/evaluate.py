"""Several ways to answer, measured on tasks of lm-evaluation-harness by one family, and set side by side.

Every answer is kept as soon as it is there, in a file of its variant's own, keyed by the family and all that answers
depend on: a run that was stopped goes on where it was, and one that is done is only read.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any, TypeAlias

import datasets
import lm_eval
from datasets.exceptions import DatasetGenerationError
from lm_eval.api.model import CachingLM
from lm_eval.api.task import ConfigurableTask
from lm_eval.defaults import DEFAULT_OTHER_SEED
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from ..api import FusedLlama
from ..errors import EdgeDLFError, InvalidParameterError, require, shown
from ..families.manifest import Manifest
from ..system.durable import file_error, replacing, require_own
from ..system.file_locks import locked
from ..system.jsonl import finite
from .harness import HarnessModel
from .stats import Estimate, interval, paired

TASKS = Path(__file__).with_name("tasks")
"""The paper's tasks, by the names of their files."""

_FORMAT = "edge-dlf eval 1"
_LOCAL = frozenset({"json", "csv", "parquet", "text", "arrow", "xml"})
"""Kinds of data that `datasets` reads from files on this machine."""

Column: TypeAlias = tuple[str, str]
"""A task, and a metric of it, with the name of its filter where it has several."""
Values: TypeAlias = Mapping[str, float]
"""Example -> what the metric is there."""


@dataclass(frozen=True)
class Variant:
    """One way to answer. settings: of FusionParams. n_fewshot: examples in the prompt; None for what holds for all."""

    name: str
    settings: Mapping[str, Any]
    n_fewshot: int | None = None


@dataclass(frozen=True)
class Plan:
    """What is measured, and how. data: task -> its examples, and those for few-shot prompts, as JSON lines."""

    tasks: Sequence[str]
    data: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    limit: int | None = None
    n_fewshot: int | None = None
    is_chat: bool = False
    system: str | None = None


def table(column: Column, values: Mapping[str, Mapping[Column, Values]]) -> dict[str, Any]:
    """Return means, paired differences and the values of single examples of one column.

    values: variant -> column -> what is measured.
    """
    own = {name: columns[column] for name, columns in values.items() if column in columns}
    return {
        "task": column[0],
        "metric": column[1],
        "n": {name: len(examples) for name, examples in own.items()},
        "means": {name: interval([*examples.values()])._asdict() for name, examples in own.items()},
        "differences": {
            name: {other: difference(own[name], own[other])._asdict() for other in own if other != name} for name in own
        },
        "values": own,
    }


def difference(one: Values, two: Values) -> Estimate:
    """Estimate how far the first is above the second, on the examples that both have."""
    common = [name for name in one if name in two]
    return paired([one[name] for name in common], [two[name] for name in common])


def markdown(tables: Iterable[Mapping[str, Any]]) -> str:
    """Return a table of each column: each variant's mean, and how far it is from each other one's. Differences whose
    interval leaves out 0 are bold."""
    parts = []
    for table in tables:
        metric, counts = table["metric"], table["n"]
        heads = ["method", f"{metric} (n = {max(counts.values()):,})", *(f"− {name}" for name in counts)]
        lines = [f"### {table['task']}: {metric}", "", _row(heads), _row(["---"] * len(heads))]
        for name, mean in table["means"].items():
            signed = {other: _signed(Estimate(**found)) for other, found in table["differences"][name].items()}
            lines.append(_row([name, _percent(Estimate(**mean)), *(signed.get(other, "") for other in counts)]))
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def run(
    plan: Plan,
    variants: Iterable[Variant],
    load: Callable[[], FusedLlama],
    manifest: Callable[[Mapping[str, Any]], Manifest],
    folder: Path,
    begin: Callable[[str], None],
) -> str:
    """Measure each variant in turn and write `results.json` and `results.md` into `folder` after each. Returns the
    text of the latter.

    load: the family, called when the first answer is needed that is not there yet. manifest: of the family and the
    settings of a variant. begin: is told the name of each variant.

    Raises InvalidParameterError for an unknown task, EdgeDLFError where another run writes into the folder.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    logging.getLogger("sqlitedict").setLevel(logging.CRITICAL)  # it logs tracebacks of what it raises too
    datasets.disable_progress_bars()
    tasks = list(dict.fromkeys(plan.tasks))
    manager = _manager(tasks)
    specs = [_spec(manager, task, plan.data.get(task, ())) for task in tasks]
    _require_distinct(tasks, specs)
    if unknown := sorted(set(plan.data) - set(plan.tasks)):
        raise InvalidParameterError(f"there is data for {unknown[0]!r}, which is none of the tasks")
    _make_folder(folder)
    values: dict[str, Mapping[Column, Values]] = {}
    text = ""
    with locked([folder / "results.json"]):
        for variant in variants:
            begin(variant.name)
            cache = folder / f"answers-{_digest(manifest(variant.settings))}.db"
            values[variant.name] = _values(_measure(plan, variant, load, cache, specs, manager))
            tables = [table(column, values) for column in dict.fromkeys(chain.from_iterable(values.values()))]
            text = markdown(tables)
            results = {"format": _FORMAT, "tables": tables}
            _write(folder / "results.json", json.dumps(finite(results), ensure_ascii=False, indent=1))
            _write(folder / "results.md", text)
    return text


def _measure(
    plan: Plan,
    variant: Variant,
    load: Callable[[], FusedLlama],
    cache: Path,
    specs: Sequence[str | dict[str, Any]],
    manager: TaskManager,
) -> Mapping[str, Any]:
    """What the harness finds. Raises EdgeDLFError, also for what the harness cannot load or do."""
    n_fewshot = plan.n_fewshot if variant.n_fewshot is None else variant.n_fewshot
    require(cache.is_file() or not cache.exists(), f"{cache}: answers are kept there, and it is no file")
    require_own(cache, lambda content: content.startswith(b"SQLite format 3\0"), "file of answers of eval")
    try:
        # What `lm_eval.simple_evaluate` does, without its survey of the machine, which takes seconds.
        loaded = manager.load(list(specs))
        for task in loaded["tasks"].values():
            if n_fewshot is not None or task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=n_fewshot or 0)
            task.set_fewshot_seed(seed=DEFAULT_OTHER_SEED)
        found: Mapping[str, Any] = lm_eval.evaluate(
            lm=CachingLM(HarnessModel(load, **variant.settings), str(cache)),
            task_dict=loaded,
            limit=plan.limit,
            system_instruction=plan.system,
            apply_chat_template=plan.is_chat,
            fewshot_as_multiturn=True,
            bootstrap_iters=0,
        )
    except EdgeDLFError:
        raise
    except sqlite3.Error as error:
        raise EdgeDLFError(f"{cache}: {error}; answers that were kept before stay") from error
    except Exception as error:
        reason = _empty_choice(error) or _reason(error)
        raise EdgeDLFError(f"the harness failed on {', '.join(plan.tasks)}: {reason}") from error
    return found


def _empty_choice(error: Exception) -> str | None:
    """The first example with an empty choice of the task at which the harness failed, for it does not say so itself."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        task = frame.f_locals.get("self")
        if isinstance(task, ConfigurableTask) and task.OUTPUT_TYPE == "multiple_choice":
            with suppress(Exception):  # of its template, which may be what the harness failed on
                for number, doc in enumerate(task.eval_docs):
                    if "" in map(str, task.doc_to_choice(doc)):
                        return f"example {number} of {task.config.task} has an empty choice: {doc!r:.200}"
    return None


def _reason(error: BaseException | None) -> str:
    """What an error says, or its cause where it says nothing of its own."""
    while error and error.__cause__ and (isinstance(error, DatasetGenerationError) or not str(error).strip()):
        error = error.__cause__
    text = str(error).strip()
    return text if " " in text else f"{type(error).__name__} {text}".strip()  # a KeyError says the key alone


def _make_folder(folder: Path) -> None:
    """Make the folder of the results, before anything is measured. Raises InvalidParameterError or EdgeDLFError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise InvalidParameterError(f"{folder}: is a file; results need a folder") from None
    except OSError as error:
        raise file_error(folder, error) from error
    require_own(folder / "results.json", lambda content: _FORMAT.encode() in content[:80], "results of eval")
    require_own(folder / "results.md", lambda content: content.startswith(b"### "), "results of eval")


def _manager(tasks: Sequence[str]) -> TaskManager:
    """Knows the paper's tasks, and those of the harness if any other is asked for: they take seconds to index."""
    own = TaskManager(include_path=[str(TASKS)], include_defaults=False)
    if all(_is_file(task) or task in own.task_index for task in tasks):
        return own
    return TaskManager(include_path=[str(TASKS)])


def _is_file(task: str) -> bool:
    return task.endswith((".yaml", ".yml"))


def _spec(manager: TaskManager, task: str, data: Sequence[Path]) -> str | dict[str, Any]:
    """What the harness loads a task by: its name or file, or its definition with other data or with local files."""
    is_file = _is_file(task)
    require(not is_file or Path(task).is_file(), f"{task}: no such file")
    if not is_file and task not in manager.task_index:
        raise InvalidParameterError(f"there is no task {task!r}; `lm_eval ls tasks` lists those of the harness")
    if not data:
        return _with_own_files(task) if is_file else task
    path = Path(task) if is_file else manager.task_index[task].yaml_path
    if path is None:
        raise InvalidParameterError(f"the task {task!r} is not defined by a file, so that it takes no other data")
    for file in data:
        require(file.is_file(), f"{file}: no such file")
    splits = dict(zip(("test", "train"), map(str, data), strict=False))
    few = "train" if "train" in splits else None
    return {
        **_definition(path),
        "dataset_path": "json",
        "dataset_name": None,
        "dataset_kwargs": _read_anew(splits),
        "test_split": "test",
        "validation_split": None,
        "training_split": few,
        "fewshot_split": few,
    }


def _definition(path: str | Path) -> dict[str, Any]:
    """The task that a file of YAML defines. Raises InvalidParameterError."""
    try:
        return {**load_yaml(path)}
    except Exception as error:  # whatever YAML raises, and functions that the file names
        raise InvalidParameterError(f"{path}: is no task ({_reason(error)})") from error


def _with_own_files(task: str) -> str | dict[str, Any]:
    """The definition in a file, where its data are local files; else the file's name."""
    definition = _definition(task)
    kind, kwargs = definition.get("dataset_path"), definition.get("dataset_kwargs") or {}
    require(isinstance(kwargs, Mapping), f"{task}: dataset_kwargs must be a mapping, not {shown(kwargs)}")
    if not isinstance(kind, str) or kind not in _LOCAL or "data_files" not in kwargs:
        return task
    return {**definition, "dataset_kwargs": {**kwargs, **_read_anew(kwargs["data_files"])}}


def _read_anew(files: Any) -> dict[str, Any]:
    """Arguments by which `datasets` reads local files as they are: it takes those of the same time for the same.

    Raises InvalidParameterError for a file that holds nothing.
    """
    named = list(files.values()) if isinstance(files, Mapping) else [files]
    for file in chain.from_iterable(each if isinstance(each, list) else [each] for each in named):
        require(isinstance(file, str), f"data_files must name files, not {shown(file)}")
        if Path(file).is_file() and not Path(file).stat().st_size:
            raise InvalidParameterError(f"{file}: is empty")
    return {"data_files": files, "download_mode": "force_redownload"}


def _require_distinct(tasks: Sequence[str], specs: Sequence[str | dict[str, Any]]) -> None:
    """Raise InvalidParameterError where two tasks have one name: the harness would keep the last of them."""
    seen: dict[str, str] = {}
    for task, spec in zip(tasks, specs, strict=True):
        definition = _definition(task) if spec == task and _is_file(task) else spec
        named = definition.get("task", definition.get("group")) if isinstance(definition, dict) else task
        name = named if isinstance(named, str) else task
        if name in seen:
            raise InvalidParameterError(f"{seen[name]} and {task} are both named {name!r}; rename one of them")
        seen[name] = task


def _values(found: Mapping[str, Any]) -> Mapping[Column, Values]:
    """Of each metric of each task, what it is on each example; the subtasks of a group stand together."""
    groups = found.get("group_subtasks", {})
    inner = {task for members in groups.values() for task in members}
    columns: dict[Column, dict[str, float]] = {}
    for name in [*groups, *found["samples"]]:
        if name in inner:
            continue
        for task in _leaves(name, groups):
            samples = found["samples"].get(task, [])
            several = len({sample["filter"] for sample in samples}) > 1
            for sample in samples:
                for metric in sample["metrics"]:
                    value = sample[metric]
                    if isinstance(value, int | float):
                        label = f"{metric}, {sample['filter']}" if several else metric
                        columns.setdefault((name, label), {})[f"{task}:{sample['doc_id']}"] = float(value)
    return columns


def _leaves(name: str, groups: Mapping[str, Sequence[str]]) -> list[str]:
    if not groups.get(name):
        return [name]
    return [leaf for member in groups[name] for leaf in _leaves(member, groups)]


def _digest(manifest: Manifest) -> str:
    """Of the files' contents and the parameters, wherever the files lie."""
    text = json.dumps([manifest.contents(), manifest.parameters], sort_keys=True)
    return blake2b(text.encode(), digest_size=8).hexdigest()


def _write(path: Path, text: str) -> None:
    with replacing(path) as file:
        file.write(text.encode("utf-8", "replace"))


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(x: Estimate) -> str:
    return f"{100 * x.mean:.1f} [{100 * x.low:.1f}, {100 * x.high:.1f}]"


def _signed(x: Estimate) -> str:
    text = f"{100 * x.mean:+.1f} [{100 * x.low:+.1f}, {100 * x.high:+.1f}]"
    return f"**{text}**" if x.excludes_zero else text
