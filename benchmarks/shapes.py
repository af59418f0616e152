"""GGUF files with the shapes of real models and random weights, written tensor by tensor: for speed, not for sense.

What is stored how follows llama.cpp's Q4_K_M. Blocks are random bytes with scales that keep every activation near the
size that it has in a trained model, so that logits are finite and spread by a few nats.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Quantization

sys.path.insert(0, str(Path(__file__).parents[1]))

from tests.tiny import add_tokenizer, bpe_vocabulary, spm_vocabulary, transformer_shapes

SPREAD = 2.5
"""Standard deviation of the logits, in nats."""
_BLOCKS = {
    # Bytes of a block, where its float16 scales stand, and the standard deviation of its values where they are 1.
    Quantization.Q4_K: (144, (0, 2), 258.3),
    Quantization.Q6_K: (210, (208,), 1367.0),
    Quantization.Q5_0: (22, (0,), 9.23),
    Quantization.Q8_0: (34, (0,), 73.9),
}
_TUNED = 10
"""One of so many rows of the last layer's last matrix is another one in a tuned model: logits part by half a nat."""
_MEAN_OF_MINIMA = 7.5
"""By how much the second scale of Q4_K must exceed the first for a mean of 0."""


@dataclass(frozen=True)
class Shape:
    """One model's. n_padding: tokens of the vocabulary that only lengthen it. is_tied: the head has no weights of its
    own in the trained model; files hold a copy nevertheless."""

    arch: str
    n_vocab: int
    n_layer: int
    n_embd: int
    n_ff: int
    n_head: int
    n_head_kv: int
    n_padding: int = 0
    is_tied: bool = False


SHAPES = {
    "llama2-13b": Shape("llama", 32_000, 40, 5120, 13_824, 40, 40),
    "llama2-7b": Shape("llama", 32_000, 32, 4096, 11_008, 32, 32),
    "llama-1.1b": Shape("llama", 32_000, 22, 2048, 5632, 32, 4),
    "qwen2.5-7b": Shape("qwen2", 152_064, 28, 3584, 18_944, 28, 4, n_padding=128),
    "qwen2.5-3b": Shape("qwen2", 151_936, 36, 2048, 11_008, 16, 2, is_tied=True),
    "qwen2.5-1.5b": Shape("qwen2", 151_936, 28, 1536, 8960, 12, 2, is_tied=True),
    "qwen2.5-0.5b": Shape("qwen2", 151_936, 24, 896, 4864, 14, 2, is_tied=True),
    "small-llama": Shape("llama", 32_000, 6, 512, 1536, 8, 8),
    "smaller-llama": Shape("llama", 32_000, 2, 256, 768, 8, 2),
    "small-qwen": Shape("qwen2", 152_064, 4, 512, 1536, 8, 4, n_padding=128),
    "smaller-qwen": Shape("qwen2", 151_936, 2, 128, 512, 4, 2, is_tied=True),
}


def model(folder: Path, name: str, seed: int, tuned: int | None = None) -> Path:
    """The file of the shape `name` in `folder`, written where it is not there. tuned: seed of a part of the last
    layer, where the model is to be a relative of the one without."""
    path = folder / f"{name}-{seed}{'' if tuned is None else f'-{tuned}'}.gguf"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        _write(part, SHAPES[name], seed, tuned)
        part.replace(path)
    return path


def _write(path: Path, shape: Shape, seed: int, tuned: int | None) -> None:
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_context_length(4096)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head_kv)
    writer.add_rope_dimension_count(shape.n_embd // shape.n_head)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(shape.n_vocab)
    tokens, types = bpe_vocabulary() if shape.arch == "qwen2" else spm_vocabulary()
    n_words = shape.n_vocab - len(tokens) - shape.n_padding
    tokens += [f"{'Ġ' if shape.arch == 'qwen2' else '▁'}w{n}" for n in range(n_words)]
    tokens += [f"[PAD{len(tokens) + n}]" for n in range(shape.n_padding)]
    types += [gguf.TokenType.NORMAL] * n_words + [gguf.TokenType.UNUSED] * shape.n_padding
    add_tokenizer(writer, "bpe" if shape.arch == "qwen2" else "spm", tokens, types, None)
    tensors = list(_tensors(shape))
    for name, (rows, kind) in tensors:
        dtype = np.dtype(np.float32 if kind == Quantization.F32 else np.uint8)
        stored = gguf.quant_shape_to_byte_shape(rows, kind) if dtype == np.uint8 else rows
        n_bytes = int(np.prod(stored)) * dtype.itemsize
        writer.add_tensor_info(name, stored, dtype, n_bytes, None if dtype == np.float32 else kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for number, (name, (rows, kind)) in enumerate(tensors):
        weights = _weights(name, rows, kind, (seed, number))
        if tuned is not None and name.startswith(f"blk.{shape.n_layer - 1}.ffn_down"):
            n_changed = len(weights) // _TUNED
            weights[:n_changed] = _weights(name, rows, kind, (tuned, number))[:n_changed]
        writer.write_tensor_data(weights)
    writer.close()


def _tensors(shape: Shape) -> Iterator[tuple[str, tuple[tuple[int, ...], Quantization]]]:
    """Name, shape and type of each tensor, as llama.cpp's Q4_K_M has them."""
    n_kv = shape.n_embd // shape.n_head * shape.n_head_kv
    vocabulary = (shape.n_vocab, shape.n_embd)
    yield "token_embd.weight", (vocabulary, _stored(vocabulary, Quantization.Q4_K))
    yield "output_norm.weight", ((shape.n_embd,), Quantization.F32)
    yield "output.weight", (vocabulary, Quantization.Q8_0 if shape.is_tied else _stored(vocabulary, Quantization.Q6_K))
    for layer in range(shape.n_layer):
        is_finer = (
            layer < shape.n_layer // 8 or layer >= 7 * shape.n_layer // 8 or (layer - shape.n_layer // 8) % 3 == 2
        )
        for name, rows in transformer_shapes(shape.arch, shape.n_embd, n_kv, shape.n_ff).items():
            kind = Quantization.Q6_K if is_finer and name.startswith(("attn_v.w", "ffn_down")) else Quantization.Q4_K
            yield f"blk.{layer}.{name}", (rows, _stored(rows, kind))


def _stored(rows: tuple[int, ...], kind: Quantization) -> Quantization:
    """The type that takes the place of `kind` where the rows do not fit it."""
    if len(rows) == 1:
        return Quantization.F32
    if rows[1] % 256:
        return Quantization.Q8_0 if kind == Quantization.Q6_K else Quantization.Q5_0
    return kind


def _weights(name: str, rows: tuple[int, ...], kind: Quantization, seed: tuple[int, int]) -> np.ndarray:
    if kind == Quantization.F32:
        return np.full(rows, 0.0 if name.endswith("bias") else 1.0, np.float32)
    n_bytes, scales, deviation = _BLOCKS[kind]
    rng = np.random.Generator(np.random.SFC64(seed))
    n_blocks = rows[0] * rows[1] * n_bytes // gguf.GGML_QUANT_SIZES[kind][1] // gguf.GGML_QUANT_SIZES[kind][0]
    blocks = np.frombuffer(bytearray(rng.bytes(n_blocks * n_bytes)), np.uint8).reshape(n_blocks, n_bytes)
    wanted = {"token_embd.weight": 1.0, "output.weight": SPREAD / rows[1] ** 0.5}.get(name, rows[1] ** -0.5)
    # Half of the blocks have negative scales: values whose mean is not 0 add up over the layers, and drown the text.
    signs = rng.integers(0, 2, n_blocks, np.uint8) << 7
    for number, place in enumerate(scales):
        scale = np.float16(wanted / deviation * (_MEAN_OF_MINIMA if number else 1.0))
        blocks[:, place : place + 2] = np.frombuffer(scale.tobytes(), np.uint8)
        blocks[:, place + 1] ^= signs
    return blocks.reshape(rows[0], -1)
