"""Arrays of strings in a GGUF header, vectorised: where each string begins, and which strings repeat."""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt

U64 = struct.Struct("<Q")
_LOW_BYTES = np.array([(1 << 8 * n) - 1 for n in range(9)], np.uint64)  # by how many
_MIX = np.array([0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0xD6E8FEB86659FD93], np.uint64)


@dataclass(frozen=True)
class Texts:
    """An array of strings as it stands in a file, each after its length in 8 bytes.

    starts: where the length of each begins, and the end of the last; (n + 1,) int64.
    """

    data: bytes
    starts: npt.NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.starts) - 1

    def since(self, first: int) -> Iterator[bytes]:
        """The strings from number `first` on."""
        starts: list[int] = self.starts[first:].tolist()
        return (self.data[start + 8 : end] for start, end in pairwise(starts))

    def also_at(self, buffer: bytes, pos: int, n: int) -> npt.NDArray[np.int64]:
        """`starts` of the strings that an array of `n` at `pos` shares with this one: the longest possible prefix, or
        nothing."""
        starts = self.starts[: n + 1]
        return starts if buffer.startswith(self.data[: int(starts[-1])], pos) else self.starts[:1]


NO_TEXTS = Texts(b"", np.zeros(1, np.int64))


def plain_starts(window: bytes, n: int) -> npt.NDArray[np.int64] | None:
    """Offsets in `window` of up to `n` strings, found by the zero bytes that end each length.

    None if a string is empty, long, or holds a NUL.
    """
    data = np.frombuffer(window, np.uint8)
    zero = data == 0
    starts = np.flatnonzero(zero[:-1] > zero[1:]) - 7
    starts = starts[starts >= 0]
    lengths = _words(data)[starts].astype(np.int64)
    is_length = (lengths > 0) & (lengths < 1 << 16)
    if not is_length.all():
        starts, lengths = starts[is_length], lengths[is_length]
    starts, lengths = starts[:n], lengths[:n]
    if not len(starts) or starts[0] != 0 or np.any(np.diff(starts) != lengths[:-1] + 8):
        return None
    return starts


def _words(data: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint64]:
    """The 8 bytes from every position on, as little-endian integers, without a copy."""
    words: npt.NDArray[np.uint64] = np.ndarray(len(data) - 7, "<u8", data, strides=(1,))
    return words


def repeated(texts: Texts) -> tuple[int, int] | None:
    """Two numbers of the same string, read as C reads it; empty strings are named by their number."""
    seen: dict[bytes, int] = {}
    for number in _suspects(texts):
        start, end = texts.starts[number : number + 2].tolist()
        text = texts.data[start + 8 : end].split(b"\0", 1)[0] or b"[EMPTY_%d]" % number
        if seen.setdefault(text, number) != number:
            return seen[text], number
    return None


def _suspects(texts: Texts) -> Sequence[int]:
    """Numbers of the few strings that may repeat another one; of all if a string is empty or holds a NUL."""
    data = np.frombuffer(texts.data + bytes(16), np.uint8)
    words, starts = _words(data), texts.starts[:-1]
    lengths = np.diff(texts.starts) - 8
    n_zeros, n_zeros_in_lengths = (block.size - np.count_nonzero(block) for block in (data, lengths.view(np.uint8)))
    if lengths.min() == 0 or n_zeros != n_zeros_in_lengths + 16:
        return range(len(texts))
    keys = words[starts + 8] & _LOW_BYTES[np.minimum(lengths, 8)]
    keys *= _MIX[0]
    keys ^= lengths.view(np.uint64)
    for least, offset, mix in ((9, lengths, _MIX[2]), (17, np.maximum(lengths // 2, 8), _MIX[1])):
        long = np.flatnonzero(lengths >= least)
        keys[long] ^= words[(starts + offset)[long]] * mix
    ordered = np.sort(keys)
    shared = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(shared):
        return ()
    begins_so = np.zeros(1 << 16, np.bool_)
    begins_so[shared >> 48] = True
    few = np.flatnonzero(begins_so[keys >> 48])
    suspects: list[int] = few[np.isin(keys[few], shared)].tolist()
    return suspects
