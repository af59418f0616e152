"""Torch weights → GGUF: whole models in Q8_0, LoRA adapters in F16."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
import numpy as np
from tokenizers import Tokenizer

from .corpus import TEMPLATE
from .model import Linear, Llama, Shape
from .tokens import BEGIN, CONTROL, END, PRE

_LICENCE = "MIT"


def write_model(path: Path, model: Llama, tokenizer: Tokenizer, name: str, about: str) -> None:
    """The model with its tokenizer and chat template."""
    shape = model.shape
    writer = gguf.GGUFWriter(path, shape.arch)
    _add_about(writer, name, about)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_dimension_count(shape.n_rot)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    _add_tokenizer(writer, tokenizer)
    for key, tensor in model.state_dict().items():
        values = tensor.float().cpu().numpy()
        if (n_head := n_paired_heads(key.rpartition(".")[0], shape)) is not None:
            values = _paired(values, n_head)
        if values.ndim == 1:
            writer.add_tensor(key, values)
        else:
            quantized = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(key, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    _write(writer)


def write_lora(path: Path, model: Llama, name: str, about: str, licence: str | None = _LICENCE) -> None:
    """The model's LoRA updates alone."""
    writer = gguf.GGUFWriter(path, model.shape.arch)
    _add_about(writer, name, about, licence)
    writer.add_type("adapter")
    writer.add_string("adapter.type", "lora")
    modules = {key: module for key, module in model.named_modules() if isinstance(module, Linear)}
    for key, module in modules.items():
        if module.lora_a is None or module.lora_b is None:
            continue
        a, b = (matrix.detach().float().cpu().numpy() for matrix in (module.lora_a, module.lora_b))
        if (n_head := n_paired_heads(key, model.shape)) is not None:
            b = _paired(b, n_head)
        writer.add_tensor(f"{key}.weight.lora_a", a.astype(np.float16))
        writer.add_tensor(f"{key}.weight.lora_b", b.astype(np.float16))
        alpha = module.lora_scale * len(a)
    writer.add_float32("adapter.lora.alpha", alpha)
    _write(writer)


def _add_about(writer: gguf.GGUFWriter, name: str, about: str, licence: str | None = _LICENCE) -> None:
    writer.add_name(name)
    writer.add_description(about)
    if licence is not None:
        writer.add_license(licence)


def _add_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    tokens = [tokenizer.id_to_token(token) for token in range(tokenizer.get_vocab_size())]
    types = [gguf.TokenType.CONTROL if token in CONTROL else gguf.TokenType.NORMAL for token in tokens]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(PRE)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_bos_token_id(tokens.index(BEGIN))
    writer.add_eos_token_id(tokens.index(END))
    writer.add_add_bos_token(True)
    writer.add_chat_template(TEMPLATE)


def n_paired_heads(key: str, shape: Shape) -> int | None:
    """Heads of a projection whose rows llama.cpp has in pairs where torch has halves; None of any other."""
    if shape.arch != "llama":
        return None
    return {"attn_q": shape.n_head, "attn_k": shape.n_head_kv or shape.n_head}.get(key.rpartition(".")[2])


def _paired(rows: np.ndarray, n_head: int) -> np.ndarray:
    """Rows of a query or key projection reordered from halves of a head to llama.cpp's pairs."""
    return rows.reshape(n_head, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def halved(rows: np.ndarray, n_head: int) -> np.ndarray:
    """As `_paired` reordered, back again; rows of a matrix or a bias."""
    return rows.reshape(n_head, -1, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
