"""Tokens coloured by their α: one hue an expert, the stronger the larger its weight."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from rich.color import Color, ColorSystem
from rich.console import Console
from rich.style import Style

from .screen import may_style

_HUES = ((255, 95, 0), (0, 160, 255), (80, 200, 0), (215, 80, 255), (240, 180, 0), (0, 205, 175))
_GREY = (150, 150, 150)
_SYSTEMS = {"standard": ColorSystem.STANDARD, "256": ColorSystem.EIGHT_BIT, "truecolor": ColorSystem.TRUECOLOR}


class AlphaPaint:
    """Colours for `experts`, with α from 0 (the terminal's own colour) to alpha_max (the full hue)."""

    def __init__(self, experts: Sequence[str], alpha_max: float, system: ColorSystem) -> None:
        self._hues = {name: _HUES[t % len(_HUES)] for t, name in enumerate(experts)}
        self._alpha_max = alpha_max
        self._system = system

    def brush(self, alpha: float, expert: str | None) -> Callable[[str], str] | None:
        """What colours the text of a token; None where no expert took part."""
        if expert is None or alpha <= 0:
            return None
        part = min(alpha / self._alpha_max, 1.0)
        hue = self._hues[expert]
        red, green, blue = (grey + part * (full - grey) for grey, full in zip(_GREY, hue, strict=True))
        style = Style(color=Color.from_rgb(red, green, blue))
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
    if not may_style(sys.stdout):
        return None
    return _SYSTEMS.get(Console(file=sys.stdout).color_system or "")
