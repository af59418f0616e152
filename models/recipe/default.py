"""The shipped family's own method: what `edge-dlf tune` finds for its four tasks at once.

python -m models.recipe.default        writes it into demo/family.toml; after the experts were made anew
"""

from __future__ import annotations

from pathlib import Path

from edge_dlf import FusedLlama
from edge_dlf.evidence.tune import tune
from edge_dlf.families.defaults import write_settings

from .evaluate import questions
from .tasks import SEEN, reply

N_EXAMPLES = 100
_SEED = 7


def write_default(folder: Path) -> None:
    """Put the method into the family.toml of `folder`, found from tuning questions of all tasks together."""
    rows = [
        {"messages": [*chat, {"role": "assistant", "content": reply(problem)}]}
        for task in SEEN
        for problem, chat in questions(task, "tune", N_EXAMPLES, _SEED)
    ]
    file = folder / "family.toml"
    write_settings(file, {None: {"method": None, "weights": None}})  # so that every member is loaded
    with FusedLlama.from_family(file, n_ctx=512, n_threads=1, n_parallel="auto") as llm:
        result = tune(llm, rows, n_threads=1)
    write_settings(file, {None: result.settings})
    print(result.verdict, result.settings)


if __name__ == "__main__":
    write_default(Path(__file__).parents[1] / "demo")
