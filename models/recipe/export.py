"""Torch weights → GGUF in Q8_0."""

from __future__ import annotations

import json
from pathlib import Path

import gguf
from tokenizers import Tokenizer

from edge_dlf.evidence.train.adapter import n_paired_heads, paired
from edge_dlf.evidence.train.model import Llama

from .corpus import TEMPLATE
from .tokens import BEGIN, CONTROL, END, PRE

_LICENCE = "MIT"


def write_model(path: Path, model: Llama, tokenizer: Tokenizer, name: str, about: str) -> None:
    """The model with its tokenizer and chat template."""
    shape = model.shape
    writer = gguf.GGUFWriter(path, shape.arch)
    writer.add_name(name)
    writer.add_description(about)
    writer.add_license(_LICENCE)
    writer.add_context_length(shape.n_ctx)
    writer.add_embedding_length(shape.n_embd)
    writer.add_block_count(shape.n_layer)
    writer.add_feed_forward_length(shape.n_ff)
    writer.add_head_count(shape.n_head)
    writer.add_head_count_kv(shape.n_head)
    writer.add_layer_norm_rms_eps(shape.norm_eps)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_vocab_size(shape.n_vocab)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0)
    _add_tokenizer(writer, tokenizer)
    for key, tensor in model.state_dict().items():
        values = tensor.float().cpu().numpy()
        if (n_head := n_paired_heads(key.rpartition(".")[0], shape)) is not None:
            values = paired(values, n_head)
        if values.ndim == 1:
            writer.add_tensor(key, values)
        else:
            quantized = gguf.quants.quantize(values, gguf.GGMLQuantizationType.Q8_0)
            writer.add_tensor(key, quantized, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    _write(writer)


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


def _write(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
