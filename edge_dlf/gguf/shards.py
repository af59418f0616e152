"""Names of the files of a model that is split into several, as llama.cpp's gguf-split gives them."""

from __future__ import annotations

import re

_SHARD = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
_MAX_SHARDS = 1000


def shard_names(name: str) -> tuple[str, ...]:
    """Names of every file of the model that the file `name` belongs to, in order; just `name` if it is whole."""
    match = _SHARD.fullmatch(name)
    count = int(match["count"]) if match else 1
    if match is None or not 1 < count <= _MAX_SHARDS:
        return (name,)
    return tuple(f"{match['stem']}-{number:05d}-of-{match['count']}.gguf" for number in range(1, count + 1))
