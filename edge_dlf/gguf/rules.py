"""Headers that are well formed and absurd: what llama.cpp aborts or hangs on in place of returning an error.

Each rule stands for an assertion, a division or a loop of llama.cpp, found by flipping bits of real headers. What
llama.cpp refuses by itself (missing keys, wrong types, tensors of other shapes) is left to it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping

from .header import Array, Scalar, Tensor, Vocabulary, show

Metadata = Mapping[str, Scalar | Array]

_MAX_LAYERS = 512
_MAX_EXPERTS = 1024
_MAX_WIDTH = 1 << 20  # beyond any model; products of two widths stay far below 2**64
_WIDTHS = (
    "embedding_length",
    "embedding_length_out",
    "feed_forward_length",
    "expert_feed_forward_length",
    "expert_shared_feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.key_length_swa",
    "attention.value_length_swa",
    "rope.dimension_count",
    "rope.dimension_count_swa",
)
_EPSILONS = (
    "attention.layer_norm_rms_epsilon",
    "attention.layer_norm_epsilon",
    "attention.group_norm_epsilon",
)
_HIGHEST = {**dict.fromkeys(_WIDTHS, _MAX_WIDTH), **dict.fromkeys(_EPSILONS, sys.float_info.max)}
"""Key of a number that is 0 or more -> the highest that it may be."""
TRIED = frozenset({"gemma3", "llama", "mamba", "qwen2", "qwen3"})
"""Architectures whose damaged headers were tried by the thousands against llama.cpp itself."""
_NO_LANGUAGE_MODELS = frozenset((
    "bert", "clip", "controlvector", "dflash", "eagle3", "eurobert", "gemma-embedding", "imatrix", "jina-bert-v2",
    "jina-bert-v3", "modern-bert", "neo-bert", "nomic-bert", "nomic-bert-moe", "t5", "t5encoder", "wavtokenizer-dec",
))  # fmt: skip
_FULL_ROTARY = frozenset((
    "apertus", "arcee", "arctic", "baichuan", "chameleon", "cohere2moe", "dbrx", "deci", "deepseek", "dots1",
    "dream", "ernie4_5", "ernie4_5-moe", "exaone", "exaone-moe", "exaone4", "falcon", "granite", "granitemoe",
    "grok", "hunyuan-moe", "internlm2", "llada", "llada-moe", "llama", "llama4", "mistral3", "olmo", "olmo2",
    "olmoe", "orion", "plamo", "qwen2", "qwen2moe", "qwen2vl", "qwen3", "qwen3moe", "qwen3vl", "qwen3vlmoe",
    "seed_oss", "smallthinker", "smollm3", "starcoder2", "xverse",
))  # fmt: skip
_NO_TEXT_TOKENIZERS = frozenset({"bert", "no_vocab", "none", "t5", "test"})
NO_WEIGHTS = frozenset({"Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"})
"""Types that no matrix can have: llama.cpp multiplies by none of them."""
_ROPE_SCALINGS = ("none", "linear", "yarn", "longrope")


def why_refused(
    architecture: str, metadata: Metadata, vocabulary: Vocabulary, tensors: Mapping[str, Tensor]
) -> str | None:
    """Why a model with this header must not reach llama.cpp, or None."""
    kind = metadata.get("general.type")
    if kind in ("imatrix", "mmproj") or architecture in _NO_LANGUAGE_MODELS:
        return f"holds no language model (general.type {show(str(kind))}, architecture {show(architecture)})"
    if not tensors:
        return "has no weights, only a vocabulary"
    for name, tensor in tensors.items():
        plain = name.endswith((".bias", "norm.weight")) or "conv1d" in name
        is_table = "tid2eid" in name  # token id -> expert id
        if (plain and tensor.type != "F32") or (tensor.type in NO_WEIGHTS and not is_table):
            return f"damaged: llama.cpp cannot use the type {tensor.type} for {show(name)}"

    def get(key: str) -> Scalar | Array | None:
        return metadata.get(f"{architecture}.{key}")

    reason = _tokenizer(metadata, vocabulary)
    for rule in (_ranges, _layers, _heads, _rotary, _experts, _attention):
        reason = reason or rule(architecture, get)
    return f"damaged: {reason}" if reason else None


Get = Callable[[str], Scalar | Array | None]


def _numbers(value: Scalar | Array | None) -> tuple[bool | int | float, ...]:
    """The number, or the numbers layer by layer, that a key gives."""
    if isinstance(value, Array):
        return value.values
    return () if value is None or isinstance(value, str) else (value,)


def _tokenizer(metadata: Metadata, vocabulary: Vocabulary) -> str | None:
    kind = metadata.get("tokenizer.ggml.model")
    if not len(vocabulary.tokens) or kind in _NO_TEXT_TOKENIZERS:
        return f"its tokenizer, of the kind {show(str(kind))}, has no vocabulary for text"
    if kind == "llama":
        for byte in range(256):
            names = (b"<0x%02X>" % byte, bytes([byte]))
            if not any(len(name).to_bytes(8, "little") + name in vocabulary.tokens.data for name in names):
                return f"its vocabulary has no token for the byte 0x{byte:02X}"
    return None


def _ranges(_: str, get: Get) -> str | None:
    for key, highest in _HIGHEST.items():
        for number in _numbers(get(key)):
            if not 0 <= number <= highest:
                return f"its {key} is {number}"
    return None


def _layers(_: str, get: Get) -> str | None:
    layers, ahead = get("block_count"), get("nextn_predict_layers")
    if not isinstance(layers, int) or not 1 <= layers <= _MAX_LAYERS:
        return f"its block_count is {layers}"
    if isinstance(ahead, int) and not 0 <= ahead < layers:
        return f"its nextn_predict_layers is {ahead}, of {layers} layers"
    return None


def _heads(_: str, get: Get) -> str | None:
    width, heads, kv_heads = (
        _numbers(get(key)) for key in ("embedding_length", "attention.head_count", "attention.head_count_kv")
    )
    if not width or width[0] < 1:
        return "its embedding_length is missing or 0"
    for layer in range(max(len(heads), len(kv_heads)) if heads and kv_heads else 0):
        n_heads, n_kv = heads[min(layer, len(heads) - 1)], kv_heads[min(layer, len(kv_heads) - 1)]
        if n_kv and n_heads % n_kv:
            return f"its {n_heads} attention heads cannot share {n_kv} key heads"
    return None


def _rotary(architecture: str, get: Get) -> str | None:
    width, heads = _numbers(get("embedding_length")), _numbers(get("attention.head_count"))
    if heads and heads[0]:
        for suffix in ("", "_swa"):
            sizes = (get(f"attention.key_length{suffix}"), get("attention.key_length"), width[0] // heads[0])
            head = next(size for size in sizes if isinstance(size, int | float))
            for rotary in _numbers(get(f"rope.dimension_count{suffix}")):
                if not 0 < rotary <= head or rotary % 2 or (architecture in _FULL_ROTARY and rotary != head):
                    return f"its rope.dimension_count{suffix} is {rotary}, its heads have {head}"
    scaling = get("rope.scaling.type")
    if scaling is not None and scaling not in _ROPE_SCALINGS:
        return f"its rope.scaling.type is {show(str(scaling))}"
    return None


def _experts(_: str, get: Get) -> str | None:
    count, used, groups, groups_used = (
        _numbers(get(key))
        for key in ("expert_count", "expert_used_count", "expert_group_count", "expert_group_used_count")
    )
    n_experts, n_used = max(count, default=0), max(used, default=0)
    n_groups, n_groups_used = max(groups, default=0), max(groups_used, default=0)
    if n_experts > _MAX_EXPERTS or n_used > n_experts or (n_experts and not n_used):
        return f"it has {n_experts} experts and uses {n_used} of them"
    if n_groups and (n_groups >= n_experts or n_experts % n_groups):
        return f"it has {n_groups} groups of {n_experts} experts"
    if n_groups > 1 and not 0 < n_groups_used < n_groups:
        return f"it uses {n_groups_used} of {n_groups} groups of experts"
    return None


def _attention(_: str, get: Get) -> str | None:
    if get("attention.causal") is False:
        return "its attention is not causal, so it cannot continue a text"
    return None
