"""Every kind of file that llama.cpp's own test of its reader (tests/test-gguf.cpp) has it refuse, refused here first.

Each stands beside a file that differs in nothing but that and is read.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_dlf import ModelFileError
from edge_dlf.gguf.header import read_header

U64_MAX = (1 << 64) - 1
UINT8, INT8, UINT32, INT32, N_TYPES = 0, 1, 4, 5, 13
F32, I8, I64, N_GGML_TYPES = 0, 24, 27, 43


def text(value: str, n_bytes: int | None = None) -> bytes:
    data = value.encode()
    return struct.pack("<Q", len(data) if n_bytes is None else n_bytes) + data


def pair(key: str, value: int = 7, kind: int = UINT32, n_bytes: int | None = None) -> bytes:
    return text(key, n_bytes) + struct.pack("<II", kind, value)


def tensor(
    name: str, shape: tuple[int, ...] = (8,), kind: int = F32, offset: int = 0, n_dims: int | None = None
) -> bytes:
    packed = struct.pack(f"<{len(shape)}q", *shape)
    return text(name) + struct.pack("<I", n_dims or len(shape)) + packed + struct.pack("<IQ", kind, offset)


def gguf(
    *,
    magic: bytes = b"GGUF",
    version: int = 3,
    n_tensors: int | None = None,
    n_pairs: int | None = None,
    pairs: tuple[bytes, ...] = (),
    tensors: tuple[bytes, ...] = (),
    n_data: int = 64,
    alignment: int = 32,
) -> bytes:
    counts = (len(tensors) if n_tensors is None else n_tensors, len(pairs) if n_pairs is None else n_pairs)
    header = magic + struct.pack("<IQQ", version, *counts) + b"".join(pairs) + b"".join(tensors)
    return header + bytes(-len(header) % alignment) + bytes(n_data)


def aligned(alignment: int, kind: int = UINT32) -> bytes:
    return pair("general.alignment", alignment, kind)


TWO = (tensor("a"), tensor("b", offset=32))
CLOSE = (tensor("a", (7,)), tensor("b", (7,), offset=28))
HUGE = 0x7FFFFFFFFFFFFFC0
KINDS: dict[str, Callable[[], bytes]] = {
    "HEADER_BAD_MAGIC": lambda: gguf(magic=b"FUGG"),
    "HEADER_BAD_VERSION_0": lambda: gguf(version=0),
    "HEADER_BAD_VERSION_1": lambda: gguf(version=1),
    "HEADER_BAD_VERSION_FUTURE": lambda: gguf(version=4),
    "HEADER_BAD_N_TENSORS": lambda: gguf(n_tensors=U64_MAX),
    "HEADER_BAD_N_KV": lambda: gguf(n_pairs=U64_MAX),
    "KV_BAD_KEY_SIZE": lambda: gguf(pairs=(pair("a", n_bytes=U64_MAX),)),
    "KV_EMPTY_KEY": lambda: gguf(pairs=(pair(""),)),
    "KV_BAD_TYPE": lambda: gguf(pairs=(pair("a", kind=N_TYPES),)),
    "KV_DUPLICATE_KEY": lambda: gguf(pairs=(pair("a"), pair("a"))),
    "KV_BAD_ALIGN": lambda: gguf(pairs=(aligned(13),)),
    "KV_WRONG_TYPE_ALIGN": lambda: gguf(pairs=(aligned(32, INT32),)),
    "TENSORS_BAD_NAME_SIZE": lambda: gguf(tensors=(tensor("a" * 64),)),
    "TENSORS_BAD_N_DIMS": lambda: gguf(tensors=(tensor("a", (8, 1, 1, 1, 1)),)),
    "TENSORS_BAD_SHAPE": lambda: gguf(tensors=(tensor("a", (-1,)),)),
    "TENSORS_NE_TOO_BIG": lambda: gguf(tensors=(tensor("a", (4 * (2**31 - 1),) * 2),)),
    "TENSORS_NBYTES_TOO_BIG": lambda: gguf(tensors=(tensor("a", (1_533_924_416,) * 2, I64),)),
    "TENSORS_NBYTES_PAD_WRAP": lambda: gguf(tensors=(tensor("a", (4, 2**30 - 1, 2**30 + 1)),)),
    "TENSORS_BAD_TYPE": lambda: gguf(tensors=(tensor("a", kind=N_GGML_TYPES),)),
    "TENSORS_BAD_OFFSET": lambda: gguf(tensors=(tensor("a", offset=U64_MAX),)),
    "TENSORS_DUPLICATE_NAME": lambda: gguf(tensors=(tensor("a"), tensor("a", offset=32))),
    "TENSORS_BAD_ALIGN": lambda: gguf(pairs=(aligned(13),), tensors=TWO),
    "TENSORS_INCONSISTENT_ALIGN": lambda: gguf(tensors=CLOSE),
    "DATA_NOT_ENOUGH_DATA": lambda: gguf(tensors=TWO, n_data=63),
    "DATA_BAD_ALIGN": lambda: gguf(pairs=(aligned(13),), tensors=CLOSE, alignment=1),
    "DATA_INCONSISTENT_ALIGN": lambda: gguf(tensors=CLOSE, alignment=1),
    "DATA_MEM_SIZE_OVERFLOW": lambda: gguf(tensors=(tensor("a", (HUGE,), I8), tensor("b", (HUGE,), I8, HUGE))),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_llama_cpp_refuses_is_refused_first(kind: str, tmp_path: Path) -> None:
    path = tmp_path / f"{kind}.gguf"
    path.write_bytes(KINDS[kind]())
    with pytest.raises(ModelFileError) as caught:
        read_header(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        gguf(),
        gguf(pairs=(pair("a"), pair("b", kind=INT32))),
        gguf(pairs=(aligned(32),), tensors=TWO),
        gguf(tensors=(tensor("a" * 63, (8, 1, 1, 1)), tensor("b", (8,), F32, 32))),
        gguf(pairs=(aligned(64),), tensors=(tensor("a"), tensor("b", offset=64)), n_data=96, alignment=64),
    ],
)
def test_the_files_beside_them_are_read(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "good.gguf"
    path.write_bytes(content)
    assert read_header(path).file_bytes == len(content)
