"""A GGUF base as a model in torch, its weights dequantised."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import torch
from torch import Tensor

from edge_dlf.errors import ModelFileError
from edge_dlf.gguf.info import GGUFInfo, read_info

from ..recipe.export import halved, n_paired_heads
from ..recipe.model import Llama, Shape

ARCHITECTURES = ("llama", "qwen2")
_UNREAD = {"rope_freqs.weight"}


def read_base(path: Path, n_ctx: int, dtype: torch.dtype = torch.bfloat16) -> Llama:
    """The model in `path` for texts of up to `n_ctx` tokens, its matrices in `dtype`.

    Raises ModelFileError for a file that is no such model, or has what is not read here.
    """
    info = read_info(path)
    if len(info.shards) > 1:
        raise ModelFileError(path, "is one of several files; the base of an expert must be in one")
    file = gguf.GGUFReader(path)
    shape = _shape(info, n_ctx)
    with torch.device("meta"):
        model = Llama(shape)
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    weights: dict[str, Tensor] = {}
    for tensor in file.tensors:
        if tensor.name in _UNREAD:
            continue
        rows = tuple(int(n) for n in reversed(tensor.shape))
        if expected.get(tensor.name) != rows:
            what = f"{' × '.join(map(str, rows))}" if tensor.name in expected else "unknown"
            raise ModelFileError(path, f"its tensor {tensor.name} is {what} here; an expert over it cannot be trained")
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float32, copy=False).reshape(rows)
        if (n_head := n_paired_heads(tensor.name.rpartition(".")[0], shape)) is not None:
            values = halved(values, n_head)
        weight = torch.from_numpy(np.array(values))
        weights[tensor.name] = weight.to(dtype) if weight.ndim > 1 else weight
    if missing := sorted(expected.keys() - weights.keys()):
        raise ModelFileError(path, f"has no tensor {missing[0]}")
    model.load_state_dict(weights, assign=True)
    model.cos, model.sin = model.angles(_rope_factors(file))
    return model.requires_grad_(False)


def _shape(info: GGUFInfo, n_ctx: int) -> Shape:
    keys, arch, path = info.metadata, info.architecture, info.path
    if arch not in ARCHITECTURES or info.is_adapter:
        what = "an adapter" if info.is_adapter else arch
        raise ModelFileError(path, f"experts can be trained over {' and '.join(ARCHITECTURES)}, not over {what}")
    try:
        n_head = int(keys[f"{arch}.attention.head_count"])
        shape = Shape(
            n_vocab=info.tensors["token_embd.weight"].shape[1],
            n_embd=int(keys[f"{arch}.embedding_length"]),
            n_layer=int(keys[f"{arch}.block_count"]),
            n_head=n_head,
            n_ff=int(keys[f"{arch}.feed_forward_length"]),
            n_head_kv=int(keys.get(f"{arch}.attention.head_count_kv", n_head)),
            arch=arch,
            n_ctx=min(n_ctx, int(keys[f"{arch}.context_length"])),
            rope_base=float(keys.get(f"{arch}.rope.freq_base", 10_000.0)),
            norm_eps=float(keys[f"{arch}.attention.layer_norm_rms_epsilon"]),
            has_bias="blk.0.attn_q.bias" in info.tensors,
            is_tied="output.weight" not in info.tensors,
        )
    except KeyError as error:
        raise ModelFileError(path, f"does not say {error.args[0]}") from None
    n_rot = keys.get(f"{arch}.rope.dimension_count", shape.n_rot)
    if n_rot != shape.n_rot or keys.get(f"{arch}.rope.scaling.type", "none") != "none":
        raise ModelFileError(path, "has rotary positions of a kind that experts cannot be trained over")
    return shape


def _rope_factors(file: gguf.GGUFReader) -> Tensor | None:
    """What Llama 3.1 and later divide their frequencies by."""
    return next((torch.from_numpy(np.array(t.data)) for t in file.tensors if t.name == "rope_freqs.weight"), None)
