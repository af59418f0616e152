"""A GGUF base as a model in torch, its weights dequantized."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from ...errors import ModelFileError
from ...gguf.info import GGUFInfo, read_info
from .adapter import halved, n_paired_heads
from .model import Llama, Shape

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")
_UNREAD = {"rope_freqs.weight"}
_PART = 1 << 21
"""Weights that are dequantized at once."""


def base_shape(path: Path, n_ctx: int) -> Shape:
    """What the model in `path` is, for texts of up to `n_ctx` tokens, from its header.

    Raises ModelFileError for a file that is no model, or one that no expert can be trained over.
    """
    info = read_info(path)
    if len(info.shards) > 1:
        raise ModelFileError(path, "is one of several files; the base of an expert must be in one")
    shape = _shape(info, n_ctx)
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Llama(shape).state_dict().items()}
    for name, tensor in info.tensors.items():
        if not _is_readable(tensor.type):
            raise ModelFileError(path, f"its tensor {name} is {tensor.type}, over which no expert can be trained")
        rows = tensor.shape[::-1]
        if name not in _UNREAD and expected.get(name) != rows:
            what = " × ".join(map(str, rows)) if name in expected else "unknown"
            raise ModelFileError(path, f"its tensor {name} is {what} here; an expert over it cannot be trained")
    if missing := sorted(expected.keys() - info.tensors.keys()):
        raise ModelFileError(path, f"has no tensor {missing[0]}")
    return shape


def read_base(path: Path, n_ctx: int, dtype: torch.dtype) -> Llama:
    """The model in `path` with its matrices in `dtype`, frozen. Raises as `base_shape`."""
    shape = base_shape(path, n_ctx)
    file = gguf.GGUFReader(path)
    with torch.device("meta"):
        model = Llama(shape)
    weights = {tensor.name: _dequantized(tensor, shape, dtype) for tensor in file.tensors if tensor.name not in _UNREAD}
    model.load_state_dict(weights, assign=True)
    model.set_angles(_rope_factors(file))
    model.requires_grad_(False)
    return model


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


def _shape(info: GGUFInfo, n_ctx: int) -> Shape:
    keys, arch, path = info.metadata, info.architecture, info.path
    if arch not in ARCHITECTURES or info.is_adapter:
        what = "an adapter" if info.is_adapter else arch
        known = f"{', '.join(ARCHITECTURES[:-1])} and {ARCHITECTURES[-1]}"
        raise ModelFileError(path, f"experts can be trained over {known}, not over {what}")

    def number(key: str, default: float | None = None, least: float = 1.0) -> float:
        value = keys.get(f"{arch}.{key}", default)
        if not isinstance(value, int | float) or not least <= value < math.inf:
            raise ModelFileError(path, f"does not say {arch}.{key} in one number, {least:g} or more")
        return value

    embeddings = info.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise ModelFileError(path, "has no matrix token_embd.weight")
    n_embd, n_head = int(number("embedding_length")), int(number("attention.head_count"))
    shape = Shape(
        n_vocab=embeddings.shape[1],
        n_embd=n_embd,
        n_layer=int(number("block_count")),
        n_head=n_head,
        n_ff=int(number("feed_forward_length")),
        n_head_kv=int(number("attention.head_count_kv", n_head)),
        n_head_embd=int(number("attention.key_length", n_embd / n_head)),
        arch=arch,
        n_ctx=min(n_ctx, int(number("context_length"))),
        rope_base=number("rope.freq_base", 10_000.0),
        norm_eps=number("attention.layer_norm_rms_epsilon", least=0.0),
        has_bias="blk.0.attn_q.bias" in info.tensors,
        is_tied="output.weight" not in info.tensors,
        window=int(number("attention.sliding_window", 0, least=0.0)),
    )
    # Without a type, llama.cpp takes a factor for a linear one.
    scaling, factor = keys.get(f"{arch}.rope.scaling.type", "linear"), number("rope.scaling.factor", 1.0, least=0.0)
    is_scaled = scaling != "none" and not (scaling == "linear" and factor in (0.0, 1.0))
    if is_scaled or shape.n_rot % 2 or number("rope.dimension_count", shape.n_rot) != shape.n_rot:
        raise ModelFileError(path, "has rotary positions of a kind that experts cannot be trained over")
    return shape


def _rope_factors(file: gguf.GGUFReader) -> Tensor | None:
    """What Llama 3.1 and later divide their frequencies by."""
    return next((torch.from_numpy(np.array(t.data)) for t in file.tensors if t.name == "rope_freqs.weight"), None)
