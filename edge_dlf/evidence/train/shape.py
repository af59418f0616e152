"""What distinguishes the models that can be trained: their architecture, and what a GGUF's header says of each."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from ...errors import ModelFileError
from ...gguf.header import Array, Scalar
from ...gguf.info import GGUFInfo

N_CTX = 512


@dataclass(frozen=True)
class Traits:
    """How an architecture computes.

    is_paired: the two numbers of a head that a position turns stand side by side in llama.cpp, not half a head apart.
    is_fused: one matrix makes queries, keys and values, and one makes the feed-forward part's gate and its input.
    is_gemma: embeddings are scaled by √D, and the gate is GELU in place of SiLU.
    norms: whether a layer normalises before attention and feed-forward part, behind them, or both.
    query_norm: whether queries and keys are normalised, each head by itself or all heads as one.
    period: of so many layers all but the last see a window of the text, where the file names one; 0 if none does.
    """

    is_paired: bool = False
    is_fused: bool = False
    is_gemma: bool = False
    norms: Literal["before", "behind", "both"] = "before"
    query_norm: Literal["head", "whole"] | None = None
    period: int = 0


TRAITS: Mapping[str, Traits] = {
    "llama": Traits(is_paired=True),
    "qwen2": Traits(),
    "qwen3": Traits(query_norm="head"),
    "gemma": Traits(is_gemma=True),
    "gemma2": Traits(is_gemma=True, norms="both", period=2),
    "gemma3": Traits(is_gemma=True, norms="both", query_norm="head", period=6),
    "phi3": Traits(is_fused=True),
    "granite": Traits(is_paired=True),
    "olmo2": Traits(norms="behind", query_norm="whole", period=4),
    "lfm2": Traits(query_norm="head"),
    "ernie4_5": Traits(is_paired=True),
    "internlm2": Traits(is_paired=True),
}
"""By llama.cpp's name of the architecture."""


@dataclass(frozen=True)
class Shape:
    """What distinguishes one model from another.

    arch: one of `TRAITS`.
    n_head_kv: as n_head where None. n_head_embd: width of a head; n_embd / n_head where None. n_rot: how many numbers
    of a head positions turn; all where None.
    rope_factor: what positions are divided by. rope_scale: what turned numbers are multiplied by. local_rope_base,
    local_rope_factor: those of layers that see a window; as of others where None.
    has_bias: of queries, keys and values. is_tied: whether the embedding is the output's matrix too.
    window: positions that some layers look back over; 0 if all see the whole text.
    convolved: layers of LFM2 that mix n_conv neighbouring positions, and have no attention.
    attention_scale: of products of queries and keys; 1 / √width of a head where None. attention_cap, logit_cap: c of
    c · tanh(x / c), which bounds those products, and the logits; 0 for none.
    embedding_scale, residual_scale: of embeddings, and of what each part of a layer adds. logit_scale: divides logits.
    """

    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_ff: int
    n_head_kv: int | None = None
    n_head_embd: int | None = None
    n_rot: int | None = None
    arch: str = "llama"
    n_ctx: int = N_CTX
    rope_base: float = 10_000.0
    rope_factor: float = 1.0
    rope_scale: float = 1.0
    local_rope_base: float | None = None
    local_rope_factor: float | None = None
    norm_eps: float = 1e-5
    has_bias: bool = False
    is_tied: bool = True
    window: int = 0
    convolved: tuple[int, ...] = ()
    n_conv: int = 0
    attention_scale: float | None = None
    attention_cap: float = 0.0
    logit_cap: float = 0.0
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    logit_scale: float = 1.0

    @property
    def traits(self) -> Traits:
        return TRAITS[self.arch]

    @property
    def head_width(self) -> int:
        return self.n_head_embd or self.n_embd // self.n_head

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees a window of the text."""
        period = self.traits.period
        return self.window > 0 and period > 0 and (layer + 1) % period > 0


def read_shape(info: GGUFInfo, n_ctx: int) -> Shape:
    """What a model is by its header, for texts of up to `n_ctx` tokens. Raises ModelFileError."""
    arch, path, keys = info.architecture, info.path, _Keys(info)
    if arch not in TRAITS or info.is_adapter:
        what = "an adapter" if info.is_adapter else arch
        *others, last = TRAITS
        raise ModelFileError(path, f"experts can be trained over {', '.join(others)} and {last}, not over {what}")
    embeddings = info.tensors.get("token_embd.weight")
    if embeddings is None or len(embeddings.shape) != 2:
        raise ModelFileError(path, "has no matrix token_embd.weight")
    n_embd, n_head = keys.whole("embedding_length"), keys.whole("attention.head_count")
    width = keys.whole("attention.key_length", n_embd / n_head)
    n_rot = keys.whole("rope.dimension_count", width)
    n_head_kv, convolved = _attending(keys, n_head)
    # Without a type, llama.cpp takes a factor for a linear one.
    scaling, factor = keys.get("rope.scaling.type", "linear"), keys.scale("rope.scaling.factor")
    shape = Shape(
        n_vocab=embeddings.shape[1],
        n_embd=n_embd,
        n_layer=keys.whole("block_count"),
        n_head=n_head,
        n_ff=keys.whole("feed_forward_length"),
        n_head_kv=n_head_kv,
        n_head_embd=width,
        n_rot=n_rot,
        arch=arch,
        # Beyond the original context llama.cpp divides frequencies by others.
        n_ctx=min(n_ctx, keys.whole("context_length"), keys.whole("rope.scaling.original_context_length", n_ctx)),
        rope_base=keys.number("rope.freq_base", 10_000.0),
        rope_factor=1.0 if scaling == "none" else factor,
        rope_scale=keys.scale("rope.scaling.attn_factor"),
        norm_eps=keys.number("attention.layer_norm_rms_epsilon", least=0.0),
        has_bias=any(f"blk.0.{name}.bias" in info.tensors for name in ("attn_q", "attn_qkv")),
        is_tied="output.weight" not in info.tensors,
        window=keys.whole("attention.sliding_window", 0, least=0.0),
        convolved=convolved,
        n_conv=keys.whole("shortconv.l_cache") if convolved else 0,
    )
    shape = replace(shape, **_own(shape, keys))
    is_turned = arch != "granite" or keys.get("rope.scaling.finetuned", True)
    if scaling not in ("none", "linear") or not is_turned or n_rot % 2 or n_rot > width:
        raise ModelFileError(path, "has rotary positions of a kind that experts cannot be trained over")
    windows = keys.get("attention.sliding_window_pattern", shape.traits.period)
    if shape.window and shape.traits.period and windows != shape.traits.period:
        local = [shape.is_local(layer) for layer in range(shape.n_layer)]
        if not isinstance(windows, Array) or list(windows.values) != local:
            raise ModelFileError(path, "has layers that see a window in an order that experts cannot be trained over")
    return shape


def _attending(keys: _Keys, n_head: int) -> tuple[int, tuple[int, ...]]:
    """The heads of keys and values, and the layers that have none. Raises ModelFileError."""
    each = keys.get("attention.head_count_kv")
    if not isinstance(each, Array):
        return keys.whole("attention.head_count_kv", n_head), ()
    numbers = {int(number) for number in each.values if number}
    if len(numbers) != 1:
        raise ModelFileError(keys.path, "has layers of different heads, over which no expert can be trained")
    return numbers.pop(), tuple(layer for layer, number in enumerate(each.values) if not number)


def _own(shape: Shape, keys: _Keys) -> dict[str, Any]:
    """What models of this architecture alone have, with llama.cpp's defaults."""
    if shape.arch == "granite":
        scales = {name: keys.scale(name) for name in ("embedding_scale", "residual_scale", "logit_scale")}
        return {**scales, "attention_scale": keys.number("attention.scale", 0.0, least=0.0) or None}
    if shape.arch == "olmo2":
        return {"local_rope_factor": 1.0}
    if shape.arch == "gemma2":
        return {
            "window": keys.whole("attention.sliding_window", 4096, least=0.0),
            "local_rope_base": keys.number("rope.freq_base_swa", shape.rope_base),
            "attention_scale": _gemma_scale(shape, n_layer=46),
            "attention_cap": keys.number("attn_logit_softcapping", 50.0, least=0.0),
            "logit_cap": keys.number("final_logit_softcapping", 30.0, least=0.0),
        }
    if shape.arch == "gemma3":
        return {
            "local_rope_base": keys.number("rope.freq_base_swa", 10_000.0),
            "local_rope_factor": 1.0,
            "attention_scale": _gemma_scale(shape, n_layer=62),
            "logit_cap": keys.number("final_logit_softcapping", 0.0, least=0.0),
        }
    return {}


def _gemma_scale(shape: Shape, n_layer: int) -> float | None:
    """The largest model, known by its number of layers, scales by another width than that of its heads."""
    return (shape.n_embd // shape.n_head) ** -0.5 if shape.n_layer == n_layer else None


class _Keys:
    """What a header says under the name of its architecture."""

    def __init__(self, info: GGUFInfo) -> None:
        self._info = info
        self.path = info.path

    def get(self, key: str, default: Scalar | None = None) -> Scalar | Array | None:
        return self._info.metadata.get(f"{self._info.architecture}.{key}", default)

    def number(self, key: str, default: float | None = None, least: float = 1.0) -> float:
        """One number, `least` or more. Raises ModelFileError."""
        value = self.get(key, default)
        if not isinstance(value, int | float) or not least <= value < math.inf:
            what = f"{self._info.architecture}.{key}"
            raise ModelFileError(self.path, f"does not say {what} in one number, {least:g} or more")
        return value

    def whole(self, key: str, default: float | None = None, least: float = 1.0) -> int:
        return int(self.number(key, default, least))

    def scale(self, key: str) -> float:
        """A factor, 1 where there is none or 0."""
        return self.number(key, 1.0, least=0.0) or 1.0
