"""Plots of tables of the documents. Numbers are read from the Markdown, so that each stands in one place.

`python docs/pictures.py` draws them, by matplotlib; a test compares the numbers in the plots with those of the tables.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PICTURES = ROOT / "docs" / "pictures"
PERFORMANCE, MODELS = ROOT / "docs" / "performance.md", ROOT / "models" / "README.md"

INK, DIM = "#1f2328", "#59636e"
IN_THE_DARK = {INK: "#f0f6fc", DIM: "#9198a1"}
BLUE, GREY, ORANGE, PURPLE, GREEN = "#3d7fd9", "#8c959f", "#dd7730", "#a06bc9", "#2da44e"
FONT = "system-ui, -apple-system, 'Segoe UI', Helvetica, Arial, sans-serif"
THICK, GAP = 0.28, 0.25
SHIFT = {"textcoords": "offset points"}
_NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
_INTERVAL = re.compile(r"\((\d+)–(\d+)\)")


@dataclass(frozen=True)
class Plot:
    """Bars of one table.

    name: of the picture. page, after: the first table after this text is shown. unit: of the bars.
    series: the column of each kind of bar, with its name in the legend and its colour.
    is_stacked: the bars of a row stand in one line, and `total` is the column of their sum.
    is_turned: the table has a row for each kind of bar. label: name of a row, from its cells.
    """

    name: str
    page: Path
    after: str
    unit: str
    series: Sequence[tuple[str, str, str]]
    is_stacked: bool = False
    total: str = ""
    is_turned: bool = False
    label: str = "{}"

    def rows(self) -> list[Row]:
        head, *lines = table(self.page.read_text("utf-8"), self.after)
        if self.is_turned:
            head, *lines = (list(cells) for cells in zip(head, *lines, strict=True))
        return [Row(self.label.format(*cells), dict(zip(head, cells, strict=True))) for cells in lines]

    def numbers(self) -> dict[str, str]:
        """Each number that the plot shows, as the table has it, by its place in the plot."""
        columns = [column for column, _, _ in self.series] + [self.total] * self.is_stacked
        return {
            place(r, c): number
            for r, row in enumerate(self.rows())
            for c, column in enumerate(columns)
            if (number := row.number(column))
        }


@dataclass(frozen=True)
class Row:
    label: str
    cells: dict[str, str] = field(repr=False)

    def number(self, column: str) -> str | None:
        found = _NUMBER.search(self.cells[column])
        return found and found[0]

    def value(self, column: str) -> float:
        return float((self.number(column) or "0").replace(",", ""))

    def interval(self, column: str) -> tuple[float, float] | None:
        found = _INTERVAL.search(self.cells[column])
        return found and (float(found[1]), float(found[2]))


def place(row: int, column: int) -> str:
    """Name of a number's element in the picture."""
    return f"number-{row}-{column}"


def table(text: str, after: str) -> list[list[str]]:
    """The cells of the first table after these words, without the line below its head; letters are plain."""
    rest = text[text.index(after) :]
    found = re.search(r"(?:^\|.*\n)+", rest, re.MULTILINE)
    assert found, f"no table after {after}"
    head, _, *lines = found[0].replace("*", "").replace("`", "").splitlines()
    return [[cell.strip() for cell in line.strip().strip("|").split("|")] for line in (head, *lines)]


PLOTS = (
    Plot(
        "drafting",
        PERFORMANCE,
        "### What does drafting gain?",
        "tokens a second",
        (
            ("large alone", "the large model alone", BLUE),
            ("fused, plain", "fused, without drafts", GREY),
            ("fused, drafted", "fused, drafted", GREEN),
        ),
    ),
    Plot(
        "members",
        PERFORMANCE,
        "### What does it save when `tune` leaves members out?",
        "milliseconds a token",
        (
            ("large", "large", BLUE),
            ("base", "base", GREY),
            ("gsm8k", "expert for maths", ORANGE),
            ("banking", "expert for banking", PURPLE),
        ),
        is_stacked=True,
        total="fused",
    ),
    Plot(
        "batch",
        PERFORMANCE,
        "### How much faster is a batch?",
        "rows an hour",
        (("one at a time, rows an hour", "one row at a time", GREY), ("rows an hour", "16 rows at once", GREEN)),
        label="{0} rows of {1} tokens at most",
    ),
    Plot(
        "demo",
        MODELS,
        "**One expert at a time**",
        "right answers, per cent",
        (
            ("large alone", "the large model alone", BLUE),
            ("expert alone", "the expert alone", ORANGE),
            ("dynamic", "fused by dynamic", GREEN),
            ("large, fine-tuned", "the large model itself, fine-tuned", GREY),
        ),
        is_turned=True,
    ),
)


def path_of(plot: Plot) -> Path:
    return PICTURES / f"plot-{plot.name}.svg"


def draw_plots() -> None:
    """Draw every plot anew."""
    for plot in PLOTS:
        path_of(plot).write_text(drawn(plot), "utf-8")


def drawn(plot: Plot) -> str:
    """The picture of a plot, as SVG."""
    import matplotlib
    from matplotlib.figure import Figure

    look = {"svg.fonttype": "none", "svg.hashsalt": plot.name, "font.size": 11}
    look |= dict.fromkeys(("text.color", "ytick.color", "axes.labelcolor"), INK)
    rows, n_bars = plot.rows(), 1 if plot.is_stacked else len(plot.series)
    with matplotlib.rc_context(look):
        figure = Figure(figsize=(8.2, 0.7 + len(rows) * (n_bars * THICK + GAP)))
        axes = figure.subplots()
        for r, row in enumerate(rows):
            _draw_row(axes, plot, r, row)
        axes.set_yticks([_y(n_bars, r, (n_bars - 1) / 2) for r in range(len(rows))], [row.label for row in rows])
        axes.tick_params(left=False, bottom=False, labelbottom=False)
        axes.invert_yaxis()
        axes.set_frame_on(False)
        axes.set_xlabel(plot.unit, loc="left", color=DIM)
        axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2, frameon=False, borderaxespad=0)
        file = StringIO()
        figure.savefig(file, format="svg", bbox_inches="tight", transparent=True, metadata={"Date": None})
    return _for_light_and_dark(file.getvalue())


def _y(n_bars: int, row: int, bar: float) -> float:
    return row * (n_bars * THICK + GAP) + bar * THICK


def _draw_row(axes: Any, plot: Plot, r: int, row: Row) -> None:
    left, n_bars = 0.0, 1 if plot.is_stacked else len(plot.series)
    for c, (column, name, colour) in enumerate(plot.series):
        y, value = _y(n_bars, r, 0 if plot.is_stacked else c), row.value(column)
        axes.barh(y, value, THICK * 0.9, left, color=colour, label=None if r else name)
        end = left + value
        if interval := row.interval(column):
            axes.plot(interval, (y, y), color=INK, linewidth=1)
            end = max(end, interval[1])
        if number := row.number(column):
            at, how = ((left + end) / 2, {"ha": "center", "color": "white"}) if plot.is_stacked else (end, {})
            axes.annotate(
                number, (at, y), (0 if plot.is_stacked else 4, 0), gid=place(r, c), va="center", **SHIFT | how
            )
        left += value if plot.is_stacked else 0
    if plot.is_stacked:
        total = row.number(plot.total)
        axes.annotate(total, (left, y), (4, 0), gid=place(r, len(plot.series)), va="center", weight="bold", **SHIFT)


def _for_light_and_dark(svg: str) -> str:
    """The picture without a file's head, in the page's own letters, and with colours for both kinds of page."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r"'DejaVu Sans'[^;\"]*", FONT, svg)
    names = {INK: "ink", DIM: "dim"}
    for colour, name in names.items():
        svg = svg.replace(colour, f"var(--{name})")
    light, dark = ("; ".join(f"--{names[c]}: {of[c]}" for c in names) for of in ({c: c for c in names}, IN_THE_DARK))
    style = f"<style>svg {{ {light} }} @media (prefers-color-scheme: dark) {{ svg {{ {dark} }} }}</style>"
    return svg.replace("<defs>", f"{style}\n <defs>", 1)
