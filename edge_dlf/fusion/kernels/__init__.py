"""Every compiled kernel: arrays in, arrays out, no policy."""

from .cache import cache_folder
from .careful import careful_curve
from .memory import read
from .pick import DRAW, PICKED, draw_token, pick_rows
from .row import GROUP
from .search import ALL, CHUNK, FOUND, NOISE, SURE, VALUE, choose, describe, search_rows
from .sums import BLOCK
from .team import Team
from .vector import HAS_INF, HAS_NAN, NONE_FINITE, address

__all__ = [
    "ALL",
    "BLOCK",
    "CHUNK",
    "DRAW",
    "FOUND",
    "GROUP",
    "HAS_INF",
    "HAS_NAN",
    "NOISE",
    "NONE_FINITE",
    "PICKED",
    "SURE",
    "VALUE",
    "Team",
    "address",
    "cache_folder",
    "careful_curve",
    "choose",
    "describe",
    "draw_token",
    "pick_rows",
    "read",
    "search_rows",
]
