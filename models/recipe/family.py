"""What ships: GGUF files and the family.toml that names them."""

from __future__ import annotations

import hashlib
import json
import shutil
from contextlib import closing
from pathlib import Path

from edge_dlf import FusedLlama
from edge_dlf.evidence.train.shape import N_CTX

from .default import write_default
from .evaluate import answers, questions
from .export import write_model
from .stages import ABOUT, SEED, Build
from .tasks import SEEN, TASKS, UNSEEN, answer_of

FAMILY = Path(__file__).parents[1] / "demo"
_N_TRIED = 60


def write_family(build: Build, folder: Path = FAMILY) -> None:
    """The GGUF files of large, base and experts, and their family.toml."""
    folder.mkdir(parents=True, exist_ok=True)
    for role in ("large", "base"):
        shutil.copyfile(build.path(f"{role}.gguf"), folder / f"{role}-q8_0.gguf")
    for task in SEEN:
        shutil.copyfile(build.path(f"{task}.gguf"), folder / f"{task}-lora-f16.gguf")
    toml = folder / "family.toml"
    toml.write_text(_toml(folder, []))
    toml.write_text(_toml(folder, _telling(toml)))
    write_default(folder)


def _telling(family: Path) -> list[str]:
    """For each task the first tuning question that the family gets right, and the large model alone and the task's
    expert alone get wrong."""
    found = []
    with closing(FusedLlama.from_family(family, n_ctx=N_CTX, n_threads=1)) as llm:
        for task in (*SEEN, *UNSEEN):
            alone = ("large", task) if task in SEEN else ("large", *SEEN)
            for problem, chat in questions(task, "tune", _N_TRIED, SEED + 4):
                said = {
                    method: answer_of(next(answers(llm, [chat], {"method": method}))) for method in (*alone, "dynamic")
                }
                right = {method for method, answer in said.items() if TASKS[task].is_right(answer, problem)}
                if right == {"dynamic"}:
                    found.append(chat[-1]["content"])
                    break
    return found


def _toml(folder: Path, examples: list[str]) -> str:
    parts = ["# Written by models/recipe.", 'name = "demo"', f"examples = {json.dumps(examples, indent=4)}"]
    for role in ("large", "base"):
        parts += [f"[{role}]", *_file(folder / f"{role}-q8_0.gguf")]
    for task in SEEN:
        parts += ["[[experts]]", f'name = "{task}"', *_file(folder / f"{task}-lora-f16.gguf")]
    parts += ["[defaults]", "temperature = 0.0", f"alpha = {1 / len(SEEN)}  # of static, for each expert"]
    return "\n".join(parts) + "\n"


def _file(path: Path) -> list[str]:
    return [f'path = "{path.name}"', f'sha256 = "{hashlib.sha256(path.read_bytes()).hexdigest()}"']


def write_ceiling(build: Build, name: str) -> Path:
    """GGUF of a fine-tuned large model, in the build folder: it is measured, not shipped."""
    path = build.path(f"{name}.gguf")
    if not path.exists():
        write_model(path, build.load(name), build.tokenizer(), name, ABOUT + "the large model, fine-tuned.")
    return path
