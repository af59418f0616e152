"""The header of a GGUF file: metadata, and the name, type, shape and offset of every tensor.

Every count, length and offset is first held against the file's size. The file is read with ordinary reads, never
mapped: a file that shrinks under a mapping kills its reader.
"""

from __future__ import annotations

import hashlib
import math
import os
import re
import stat
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import numpy as np
import numpy.typing as npt

from ..errors import InvalidParameterError, ModelFileError
from .texts import NO_TEXTS, Texts, plain_starts, repeated

Scalar = bool | int | float | str

_MIB = 1 << 20
_FIRST_READ_BYTES = 8 * _MIB
_MAX_HEADER_BYTES = 32 * _MIB  # the largest vocabularies take half of it
_MAX_TEXT_BYTES = 4 * _MIB  # of all string values together; the longest chat templates have 0.1 MiB
_MAX_KEYS = 1 << 16
_MAX_KEY_BYTES = 1 << 12
_MAX_TENSORS = 1 << 16
_MAX_VOCAB = 1 << 19
_MAX_TEXTS = 1 << 21
_MAX_NAME_BYTES = 63  # GGML_MAX_NAME less its NUL
_MAX_DIMS = 4
_MAX_LAYERS = 512  # arrays up to this length keep their values: hyperparameters given layer by layer
_MAX_KEPT_VALUES = 1 << 16
_UINT32, _INT32, _FLOAT32, _STRING, _ARRAY = 4, 5, 6, 8, 9
_SCALARS = {
    kind: struct.Struct(f"<{code}")
    for kind, code in zip((0, 1, 2, 3, 4, 5, 6, 7, 10, 11, 12), "BbHhIif?Qqd", strict=True)
}
"""Type of a value of the metadata that is no text and no array -> its layout."""
_U32, _U64 = _SCALARS[4], _SCALARS[10]
_TYPES = {"general.alignment": _UINT32, "adapter.lora.alpha": _FLOAT32}
"""Keys whose value llama.cpp reads without a look at its type, which ends the process."""
_TOKENS = "tokenizer.ggml.tokens"
_TOKENIZER_LISTS = (_TOKENS, "tokenizer.ggml.merges")
BLOCKS = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22),
    7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34), 9: ("Q8_1", 32, 36), 10: ("Q2_K", 256, 84),
    11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176), 14: ("Q6_K", 256, 210),
    15: ("Q8_K", 256, 292), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 24: ("I8", 1, 1), 25: ("I16", 1, 2), 26: ("I32", 1, 4), 27: ("I64", 1, 8),
    28: ("F64", 1, 8), 29: ("IQ1_M", 256, 56), 30: ("BF16", 1, 2), 34: ("TQ1_0", 256, 54),
    35: ("TQ2_0", 256, 66), 39: ("MXFP4", 32, 17), 40: ("NVFP4", 64, 36), 41: ("Q1_0", 128, 18),
    42: ("Q2_0", 64, 18),
}  # fmt: skip
"""ggml type -> name, elements a block, bytes a block."""
_CONVERT = "convert it to GGUF with llama.cpp's scripts, an adapter with convert_lora_to_gguf.py"
_OTHER_FORMATS = (
    (b"version https://git-lfs", "a Git LFS pointer in place of the file", "fetch the file itself: git lfs pull"),
    (b"PK\3\4", "a PyTorch or zip archive", _CONVERT),
    (b"........{", "a safetensors file", _CONVERT),
    (b"(lmgg|fmgg|tjgg|algg|ggml|ggmf|ggjt|ggla)", "in a format from before GGUF", _CONVERT),
    (
        rb"\s*<(!|\?|[hH])",
        "a web page in place of the file",
        "download the file again, and give a token if it needs one",
    ),
)
"""Pattern of the beginning of files that are no GGUF, what they are, and what to do about it."""
CACHE_TYPES = {BLOCKS[number][0].lower(): number for number in (0, 1, 30, 8, 7, 6, 3, 2, 20)}
"""Type of a KV cache -> ggml's number of it."""


def cache_type(name: str | None) -> int:
    """ggml's number of a type of KV cache, f16 where None. Raises InvalidParameterError."""
    if name is not None and name not in CACHE_TYPES:
        raise InvalidParameterError(f"a KV cache can be of {', '.join(CACHE_TYPES)}, not {name!r}")
    return CACHE_TYPES[name or "f16"]


@dataclass(frozen=True)
class Array:
    """An array of the metadata: its GGUF element type, its length, and its values where it is short and numeric."""

    type: int
    length: int
    values: tuple[bool | int | float, ...] = ()


@dataclass(frozen=True)
class Tensor:
    """A tensor's type, shape (row length first, as llama.cpp has it) and size."""

    type: str
    shape: tuple[int, ...]
    n_bytes: int


@dataclass(frozen=True)
class Vocabulary:
    """The token list of one file.

    lists: arrays of strings by their key, the tokens among them. types: of every token, (n_vocab,) int32; 1, a normal
    token, throughout where the file gives none.
    """

    lists: Mapping[str, Texts]
    types: npt.NDArray[np.int32]

    @property
    def tokens(self) -> Texts:
        """Text of every token, by id."""
        return self.lists.get(_TOKENS, NO_TEXTS)


@dataclass(frozen=True)
class Header:
    """The header of one file. n_bytes: of the header, up to where the weights begin."""

    metadata: Mapping[str, Scalar | Array]
    vocabulary: Vocabulary
    tensors: Mapping[str, Tensor]
    n_bytes: int
    file_bytes: int


def show(text: bytes | str) -> str:
    """`text` from a file, quoted, on one line and cut to a length that fits a message."""
    if isinstance(text, bytes):
        text = text[:256].decode("utf-8", "replace")
    return repr(text if len(text) <= 60 else text[:57] + "...")


class _Cursor:
    """A cursor over the first bytes of a file; every read is checked against the file's length first."""

    def __init__(self, path: Path, file: BinaryIO, file_bytes: int, like: Mapping[str, Texts]) -> None:
        self.path = path
        self.file_bytes = file_bytes
        self.buffer = b""
        self.pos = 0
        self.like = like
        self.lists: dict[str, Texts] = {}
        self.token_types: npt.NDArray[np.int32] = np.zeros(0, np.int32)
        self.kept_values = 0
        self._file = file

    def fail(self, reason: str) -> NoReturn:
        raise ModelFileError(self.path, reason)

    def need(self, n_bytes: int, what: str) -> None:
        """Have `n_bytes` from the cursor on in the buffer."""
        end = self.pos + n_bytes
        if end <= len(self.buffer):
            return
        if end > self.file_bytes:
            self.fail(f"truncated or damaged: {what} would end at byte {end:,}, the file at {self.file_bytes:,}")
        if end > _MAX_HEADER_BYTES:
            self.fail(f"damaged: its header is longer than {_MAX_HEADER_BYTES // _MIB} MiB")
        wanted = min(max(end, min(2 * len(self.buffer), _MAX_HEADER_BYTES), _FIRST_READ_BYTES), self.file_bytes)
        try:
            self.buffer += self._file.read(wanted - len(self.buffer))
        except OSError as error:
            self.fail(f"cannot be read: {error.strerror}")
        if end > len(self.buffer):
            self.fail("changed while it was read")

    def number(self, layout: struct.Struct, what: str) -> Any:
        self.need(layout.size, what)
        (value,) = layout.unpack_from(self.buffer, self.pos)
        self.pos += layout.size
        return value

    def text(self, what: str, limit: int) -> bytes:
        """A length, of `limit` at most, and as many bytes."""
        n_bytes = self.number(_U64, what)
        if n_bytes > limit:
            self.fail(f"damaged: {what} has {n_bytes:,} bytes")
        self.need(n_bytes, what)
        self.pos += n_bytes
        return self.buffer[self.pos - n_bytes : self.pos]

    def texts(self, n: int, what: str, like: Texts) -> Texts:
        """An array of `n` strings, `like` one that it may be the same as."""
        self.need(8 * n, what)
        begin = pos = self.pos
        if len(like) == n and self.buffer.startswith(like.data, pos):
            self.pos += len(like.data)
            return like
        starts, unpack = plain_starts(self.buffer[pos : pos + _FIRST_READ_BYTES], n), _U64.unpack_from
        pos += starts[-1]
        for _ in range(n + 1 - len(starts)):
            if pos + 8 > len(self.buffer):
                self.pos = min(pos, self.file_bytes)
                self.need(8, what)
            pos += 8 + unpack(self.buffer, pos)[0]
            if pos > self.file_bytes:
                break
            starts.append(pos - begin)
        self.pos = min(pos, self.file_bytes + 1)
        self.need(0, what)
        return Texts(self.buffer[begin : self.pos], starts)


def _read_value(header: _Cursor, key: str) -> Scalar | Array:
    what = f"the value of {show(key)}"
    kind = header.number(_U32, what)
    if kind != _TYPES.get(key, kind):
        reason = f"damaged: {what} has the type {kind}, not {_TYPES[key]}"
        raise ModelFileError(header.path, reason, "convert it to GGUF again, with llama.cpp's own scripts")
    if kind == _STRING:
        return header.text(what, _MAX_TEXT_BYTES).split(b"\0", 1)[0].decode("utf-8", "replace")
    if kind in _SCALARS:
        scalar: bool | int | float = header.number(_SCALARS[kind], what)
        return scalar
    if kind != _ARRAY:
        header.fail(f"damaged: {what} has the unknown type {kind}")
    kind, length = header.number(_U32, what), header.number(_U64, what)
    if kind == _STRING:
        if length > _MAX_TEXTS:
            header.fail(f"damaged: {what} is an array of {length:,} texts")
        if key == _TOKENS and length > _MAX_VOCAB:
            header.fail(f"its vocabulary has {length:,} entries; the most that can be used are {_MAX_VOCAB:,}")
        known = header.like.get(key, NO_TEXTS)
        texts = header.texts(length, what, known)
        if key in _TOKENIZER_LISTS:
            header.lists[key] = texts
        if key == _TOKENS and not known.data.startswith(texts.data) and (twice := repeated(texts)):
            first, number, text = twice
            header.fail(f"damaged: its tokens {first} and {number} are both {show(text)}")
        return Array(kind, length)
    if kind not in _SCALARS:
        header.fail(f"damaged: {what} is an array of the unknown type {kind}")
    n_bytes = length * _SCALARS[kind].size
    header.need(n_bytes, what)
    header.pos += n_bytes
    data = header.buffer[header.pos - n_bytes : header.pos]
    if key == "tokenizer.ggml.token_type" and kind == _INT32:
        header.token_types = np.frombuffer(data, "<i4")
    header.kept_values += length if length <= _MAX_LAYERS else 0
    if length > _MAX_LAYERS or header.kept_values > _MAX_KEPT_VALUES:
        return Array(kind, length)
    return Array(kind, length, tuple(value for (value,) in _SCALARS[kind].iter_unpack(data)))


def _read_metadata(header: _Cursor, n_keys: int) -> dict[str, Scalar | Array]:
    metadata: dict[str, Scalar | Array] = {}
    text_bytes = 0
    for number in range(n_keys):
        raw = header.text(f"key {number}", _MAX_KEY_BYTES)
        key = raw.decode("utf-8", "backslashreplace")
        if not raw or b"\0" in raw:
            header.fail(f"damaged: key {number} is {show(raw)}")
        if key in metadata:
            header.fail(f"damaged: the key {show(key)} comes twice")
        value = metadata[key] = _read_value(header, key)
        text_bytes += len(raw) + (len(value) if isinstance(value, str) else 0)
        if text_bytes > _MAX_TEXT_BYTES:
            header.fail(f"damaged: its metadata has more than {_MAX_TEXT_BYTES // _MIB} MiB of text")
    return metadata


def _read_tensors(header: _Cursor, n_tensors: int, alignment: int) -> dict[str, Tensor]:
    """The tensors, each where the one before it ends, all inside the file."""
    tensors: dict[str, Tensor] = {}
    expected = 0
    for number in range(n_tensors):
        raw = header.text(f"the name of tensor {number}", _MAX_NAME_BYTES)
        name = raw.decode("utf-8", "backslashreplace")
        what = f"tensor {show(name)}"
        if not raw or b"\0" in raw:
            header.fail(f"damaged: tensor {number} has the name {show(raw)}")
        if name in tensors:
            header.fail(f"damaged: {what} comes twice")
        n_dims = header.number(_U32, what)
        if not 1 <= n_dims <= _MAX_DIMS:
            header.fail(f"damaged: {what} has {n_dims} dimensions")
        shape = tuple(header.number(_U64, what) for _ in range(n_dims))
        kind, offset = header.number(_U32, what), header.number(_U64, what)
        if kind not in BLOCKS:
            header.fail(f"{what} has the type {kind}, which this version of llama.cpp does not know")
        kind_name, block, block_bytes = BLOCKS[kind]
        if shape[0] % block or min(shape) < 1:
            header.fail(f"damaged: {what} has the shape {shape}, impossible for {kind_name}")
        n_bytes = math.prod(shape) // block * block_bytes
        if n_bytes > header.file_bytes and offset == expected:
            header.fail(
                f"truncated or damaged: {what} alone needs {n_bytes:,} bytes, the file has {header.file_bytes:,}"
            )
        if offset != expected:
            header.fail(f"damaged: {what} is said to begin at byte {offset:,} of the weights, not at {expected:,}")
        tensors[name] = Tensor(kind_name, shape, n_bytes)
        expected += -(-n_bytes // alignment) * alignment
        end = offset + n_bytes
    end = -(-header.pos // alignment) * alignment + end if tensors else header.pos
    if end > header.file_bytes:
        header.fail(f"truncated: {end - header.file_bytes:,} of {end:,} bytes are missing at its end")
    return tensors


def _open(path: Path) -> BinaryIO:
    """Open a regular file; anything else fails, and does not wait for a writer as a FIFO would."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise ModelFileError(path, (error.strerror or str(error)).lower()) from error
    except ValueError as error:
        raise ModelFileError(path, str(error)) from error
    if stat.S_ISREG(os.fstat(descriptor).st_mode):
        return os.fdopen(descriptor, "rb", buffering=0)
    is_folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
    os.close(descriptor)
    raise ModelFileError(path, "is a folder" if is_folder else "is not a regular file")


def _fail_as_no_gguf(path: Path, beginning: bytes) -> NoReturn:
    for pattern, what, advice in _OTHER_FORMATS:
        if re.match(pattern, beginning, re.DOTALL):
            raise ModelFileError(path, f"is not a GGUF file: it is {what}", advice)
    raise ModelFileError(path, f"is not a GGUF file: it begins with {show(beginning[:4])}")


def read_header(path: Path, like: Mapping[str, Texts] | None = None) -> Header:
    """Read the header of the file at `path`; raises ModelFileError where it is damaged or truncated.

    like: the lists of a vocabulary that is likely the same; what equals them byte for byte is not parsed again.
    """
    with _open(path) as file:
        header = _Cursor(path, file, os.fstat(file.fileno()).st_size, like or {})
        if not header.file_bytes:
            header.fail("is empty")
        header.need(min(4, header.file_bytes), "the file")
        magic = header.buffer[:4]
        if magic not in (b"GGUF", b"FUGG"):
            _fail_as_no_gguf(path, header.buffer[:64])
        header.pos = 4
        version = header.number(_U32, "the version")
        if magic == b"FUGG" or version & 0xFFFF == 0:
            header.fail("is a big-endian GGUF; only little-endian ones can be used")
        if version not in (2, 3):
            header.fail(f"is a GGUF of version {version}; only versions 2 and 3 can be used")
        n_tensors, n_keys = header.number(_U64, "the header"), header.number(_U64, "the header")
        if n_tensors > _MAX_TENSORS or n_keys > _MAX_KEYS:
            header.fail(f"damaged: it claims {n_tensors:,} tensors and {n_keys:,} keys")
        metadata = _read_metadata(header, n_keys)
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment % 8 or alignment & (alignment - 1) or not 8 <= alignment <= _MIB:
            header.fail(f"damaged: its alignment is {alignment}")
        tokens = metadata.get(_TOKENS)
        n_vocab = tokens.length if isinstance(tokens, Array) else 0
        types = header.token_types if "tokenizer.ggml.token_type" in metadata else np.ones(n_vocab, np.int32)
        if len(types) < n_vocab:
            header.fail(f"damaged: it has {n_vocab:,} tokens and {len(types):,} token types")
        vocabulary = Vocabulary(header.lists, types[:n_vocab])
        tensors = _read_tensors(header, n_tensors, alignment)
        n_bytes = -(-header.pos // alignment) * alignment if tensors else header.pos
        return Header(metadata, vocabulary, tensors, n_bytes, header.file_bytes)


def header_hash(path: Path) -> str:
    """SHA-256 of the header of the file at `path`, in hexadecimal: it names a model without reading its weights.

    Raises ModelFileError as `read_header`.
    """
    n_bytes = read_header(path).n_bytes
    try:
        with _open(path) as file:
            return hashlib.sha256(file.read(n_bytes)).hexdigest()
    except OSError as error:
        raise ModelFileError(path, f"cannot be read: {error.strerror}") from error
