"""Every compiled kernel: arrays in, arrays out, no policy."""

from .careful import careful_curve
from .row import GROUP, draw, fuse_row, gather, log_sum, measure_groups
from .search import BLOCK, CHUNK, NOISE, choose, search_rows
from .team import Team
from .vector import HAS_INF, HAS_NAN, HAS_NEG_INF, NONE_FINITE

__all__ = [
    "BLOCK",
    "CHUNK",
    "GROUP",
    "HAS_INF",
    "HAS_NAN",
    "HAS_NEG_INF",
    "NOISE",
    "NONE_FINITE",
    "Team",
    "careful_curve",
    "choose",
    "draw",
    "fuse_row",
    "gather",
    "log_sum",
    "measure_groups",
    "search_rows",
]
