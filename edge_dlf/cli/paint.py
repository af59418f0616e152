"""Colours of tokens by their α: a hue for each expert, the stronger the larger its α."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from rich.color import Color, ColorSystem, blend_rgb
from rich.color_triplet import ColorTriplet
from rich.console import COLOR_SYSTEMS, Console
from rich.style import Style

from ..system.page import COLOURS
from .screen import may_style

_GREY = ColorTriplet(150, 150, 150)


class AlphaPaint:
    """Colours for `experts`, from the terminal's own colour at α = 0 to the full hue at alpha_max."""

    def __init__(self, experts: Sequence[str], alpha_max: float, system: ColorSystem) -> None:
        self._hues = {name: ColorTriplet(*COLOURS[t % len(COLOURS)]) for t, name in enumerate(experts)}
        self._alpha_max = alpha_max
        self._system = system

    def brush(self, alpha: float, expert: str | None) -> Callable[[str], str] | None:
        """A function that colours the text of a token; None where no expert took part."""
        if expert is None or alpha <= 0:
            return None
        mixed = blend_rgb(_GREY, self._hues[expert], min(alpha / self._alpha_max, 1.0))
        style = Style(color=Color.from_triplet(mixed))
        return lambda text: style.render(text, color_system=self._system)

    def legend(self) -> str:
        """One line that shows the scale for each expert."""
        scales = []
        for name in self._hues:
            steps = (self._alpha_max * quarter / 4 for quarter in range(5))
            numbers = [(brush(f"{a:g}") if (brush := self.brush(a, name)) else f"{a:g}") for a in steps]
            scales.append(f"{name} {' '.join(numbers)}")
        return "α: " + " · ".join(scales)


def color_system() -> ColorSystem | None:
    """Colours that stdout can show; None where it shows none."""
    return COLOR_SYSTEMS.get(Console(file=sys.stdout).color_system or "") if may_style(sys.stdout) else None
