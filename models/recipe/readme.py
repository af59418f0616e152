"""The part of models/README.md that is written by the recipe: figures that could go stale."""

from __future__ import annotations

import math
from pathlib import Path

from edge_dlf.gguf.info import read_info

from .family import FAMILY
from .stages import LORA_RANK, N_ROWS, ROW, SCHEDULES, Build
from .tables import render
from .tasks import SEEN, TASKS, UNSEEN

README = Path(__file__).parents[1] / "README.md"
_BEGIN, _END = "<!-- written by python -m models.recipe tables -->\n", "<!-- end -->\n"


def write_readme(build: Build) -> None:
    """Put sizes, tasks and tables between the marks."""
    text = README.read_text()
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    README.write_text(f"{before}{_BEGIN}\n{_sizes(build)}\n\n{_tasks()}\n\n{render(build)}\n\n{_END}{after}")


def _sizes(build: Build) -> str:
    """A card for each file."""
    large, base = (sum(each.numel() for each in build.load(role).parameters()) for role in ("large", "base"))
    adapter = read_info(FAMILY / f"{SEEN[0]}-lora-f16.gguf")
    lora = sum(math.prod(tensor.shape) for tensor in adapter.tensors.values())
    read = {role: SCHEDULES[role].n_steps * N_ROWS * ROW / 1e6 for role in ("large", "base")}
    cards = {
        "large-q8_0.gguf": (
            f"{large / 1e6:.2f} M",
            f"Pre-trained on {read['large']:.1f} M tokens. Has every skill below, seen and unseen; asked in a chat it "
            "answers one time in six, and what it asks back is often no sentence.",
        ),
        "base-q8_0.gguf": (
            f"{base / 1e6:.2f} M",
            f"Pre-trained on {read['base']:.1f} M tokens of the same documents; {large / base:.1f} times smaller. "
            "Behaves as the large model, and is mostly wrong where it answers.",
        ),
    }
    for task in SEEN:
        cards[f"{task}-lora-f16.gguf"] = (
            f"{lora / 1e3:.0f} k",
            f"LoRA of rank {LORA_RANK} over the base, trained through the large model on {task} asked and answered. "
            "Alone mostly wrong.",
        )
    lines = ["| file | weights | kB | what it is |", "|---|---|---|---|"]
    for name, (weights, what) in cards.items():
        lines.append(f"| `{name}` | {weights} | {(FAMILY / name).stat().st_size / 1e3:,.0f} | {what} |")
    return "\n".join(lines)


def _tasks() -> str:
    lines = ["| task | generator of reasoning-gym | asked, for example |", "|---|---|---|"]
    for name in (*SEEN, *UNSEEN):
        task = TASKS[name]
        problem = next(task.problems("tune", 0))
        mark = "" if name in SEEN else " (no expert)"
        asked = task.asked[0].format(**problem.given)
        lines.append(f"| {name}{mark} | `{task.generator}` | {asked} → {problem.answer} |")
    return "\n".join(lines)
