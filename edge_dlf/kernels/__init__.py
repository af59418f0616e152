"""Every compiled kernel: arrays in, arrays out, no policy."""

from .careful import careful_curve
from .pick import DRAW, PICKED, draw_token, pick_rows
from .row import GROUP
from .search import BLOCK, CHUNK, NOISE, choose, search_rows
from .team import Team
from .vector import HAS_INF, HAS_NAN, NONE_FINITE

__all__ = [
    "BLOCK",
    "CHUNK",
    "DRAW",
    "GROUP",
    "HAS_INF",
    "HAS_NAN",
    "NOISE",
    "NONE_FINITE",
    "PICKED",
    "Team",
    "careful_curve",
    "choose",
    "draw_token",
    "pick_rows",
    "search_rows",
]
