"""A GGUF base as a model in torch, its weights dequantized."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from ...errors import ModelFileError
from ...gguf.info import read_info
from .adapter import halved, n_paired_heads
from .model import Llama
from .shape import Shape, read_shape

_ROPE_FREQS, _ROPE_SHORT = "rope_freqs.weight", "rope_factors_short.weight"
_UNREAD = {_ROPE_FREQS, _ROPE_SHORT, "rope_factors_long.weight"}
_PART = 1 << 21
"""Weights that are dequantized at once."""


def base_shape(path: Path, n_ctx: int) -> Shape:
    """What the model in `path` is, for texts of up to `n_ctx` tokens, from its header.

    Raises ModelFileError for a file that is no model, or one that no expert can be trained over.
    """
    info = read_info(path)
    if len(info.shards) > 1:
        raise ModelFileError(path, "is one of several files; the base of an expert must be in one")
    shape = read_shape(info, n_ctx)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Llama(shape).state_dict().items()}
    for name, tensor in info.tensors.items():
        if not _is_readable(tensor.type):
            raise ModelFileError(path, f"its tensor {name} is {tensor.type}, over which no expert can be trained")
        rows = tensor.shape[::-1]
        if name not in _UNREAD and expected.get(_name(name)) != rows:
            what = " × ".join(map(str, rows)) if _name(name) in expected else "unknown"
            raise ModelFileError(path, f"its tensor {name} is {what} here; an expert over it cannot be trained")
    if missing := sorted(expected.keys() - set(map(_name, info.tensors))):
        raise ModelFileError(path, f"has no tensor {missing[0]}")
    return shape


def read_base(path: Path, n_ctx: int, dtype: torch.dtype) -> Llama:
    """The model in `path` with its matrices in `dtype`, frozen. Raises as `base_shape`."""
    shape = base_shape(path, n_ctx)
    file = gguf.GGUFReader(path)
    with torch.device("meta"):
        model = Llama(shape)
    read = (tensor for tensor in file.tensors if tensor.name not in _UNREAD)
    weights = {_name(tensor.name): _dequantized(tensor, shape, dtype) for tensor in read}
    model.load_state_dict(weights, assign=True)
    model.set_angles(_rope_divisors(file))
    model.requires_grad_(False)
    return model


def _name(tensor: str) -> str:
    """Name of a tensor in torch: LFM2 calls its last norm another."""
    return "output_norm.weight" if tensor == "token_embd_norm.weight" else tensor


def _dequantized(tensor: gguf.ReaderTensor, shape: Shape, dtype: torch.dtype) -> Tensor:
    """A tensor of the file, a matrix in `dtype`; in parts, so that no copy of the whole is made on the way."""
    rows = tuple(int(n) for n in reversed(tensor.shape))
    weight = torch.empty(rows, dtype=dtype if len(rows) > 1 else torch.float32)
    n_head = n_paired_heads(tensor.name.rpartition(".")[0], shape)
    n_rows = rows[0] // n_head if n_head else max(1, _PART // rows[-1])
    for start in range(0, rows[0], n_rows):
        part = gguf.quants.dequantize(tensor.data[start : start + n_rows], tensor.tensor_type)
        values = np.array(halved(part, 1) if n_head else part, np.float32)
        weight[start : start + n_rows] = torch.from_numpy(values)
    return weight


@cache
def _is_readable(kind: str) -> bool:
    """Whether tensors of this type can be dequantized."""
    try:
        quantization = gguf.GGMLQuantizationType[kind]
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[quantization][1]), np.uint8), quantization)
    except (KeyError, NotImplementedError):
        return False
    return True


def _rope_divisors(file: gguf.GGUFReader) -> Tensor | None:
    """What Llama 3.1 and later, and Phi 3, divide their frequencies by."""
    found = (torch.from_numpy(np.array(t.data)) for t in file.tensors if t.name in (_ROPE_FREQS, _ROPE_SHORT))
    return next(found, None)
