"""Memory that a model takes once loaded, by its header alone: weights layer by layer, KV cache, buffers.

What llama.cpp allocates is followed exactly for weights and KV caches, and by measured formulas for compute buffers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from ..engine.backend import N_BATCH, N_CHECKPOINTS, N_ROLLBACK, N_ROWS, PLAIN_TOKENS
from ..gguf.header import BLOCKS, Array, cache_type
from ..gguf.info import GGUFInfo

_NOT_QUANTIZED = (None, "f32", "f16", "bf16")
_LAYER = re.compile(r"blk\.(\d+)\.")
_CELLS = 256  # llama.cpp rounds contexts up to a multiple of it
_STATE_TENSOR = re.compile(r"blk\.(\d+)\.(?:ssm_|shortconv\.|time_mix_)")
_ROLLS_BACK = frozenset(
    {
        *("qwen35", "qwen35moe", "qwen4exp", "deepseek4", "nemotron_h", "nemotron_h_moe", "bailingmoe3"),
        *("lfm2", "lfm2moe", "kimi-k3", "glm5-next"),
    }
)
"""Architectures of which llama.cpp keeps the states of several tokens of a batch."""
_TOKEN_BYTES = 320  # of the vocabulary in llama.cpp, by token; 200 to 300 were measured
_REPACKED = frozenset({"Q4_0", "Q4_K", "Q2_K", "IQ4_NL", "MXFP4"})  # on x86; a few more on ARM


def rounded(n_cells: int) -> int:
    """KV cells that llama.cpp allocates for `n_cells`."""
    return -(-n_cells // _CELLS) * _CELLS


@dataclass(frozen=True)
class Footprint:
    """Bytes of one model and of its contexts.

    layers: weights of each layer.
    input: token embeddings, which stay on the host.
    output: the head; a copy of the embeddings if it has no weights of its own (is_tied).
    read: weights that decoding one token reads.
    widest: the largest weight of a layer.
    repacked: weights that a CPU build keeps a second copy of.
    vocabulary: llama.cpp's own token tables.
    kv: KV cache of one cell in each layer.
    state: recurrent state of one sequence.
    n_rollback: further states that llama.cpp keeps of a sequence, if it is the only one.
    n_embd, n_ff: widths of what is computed for one token.
    n_masks: attention masks over all cells.
    n_heads: attention heads; 0 if plain attention is not equivalent to flash attention.
    """

    layers: tuple[int, ...]
    input: int
    output: int
    is_tied: bool
    read: int
    widest: int
    repacked: int
    vocabulary: int
    kv: tuple[float, ...]
    state: int
    n_rollback: int
    n_vocab: int
    n_embd: int
    n_ff: int
    n_masks: int
    n_heads: int

    @property
    def weights(self) -> int:
        """All weights on a machine without a GPU."""
        return sum(self.layers) + self.input + (0 if self.is_tied else self.output)

    def without_weights(self) -> Footprint:
        """Return the footprint of contexts over a model that is in memory already."""
        no_layers = (0,) * len(self.layers)
        return replace(self, layers=no_layers, input=0, output=0, read=0, repacked=0, vocabulary=0)

    def cache(self, n_cells: int) -> int:
        """KV cache of one context."""
        return int(sum(self.kv) * rounded(n_cells))

    def states(self, n_seqs: int) -> int:
        """Recurrent states of `n_seqs` sequences in one context."""
        return self.state * (n_seqs if n_seqs > 1 else 1 + self.n_rollback)

    @property
    def checkpoints(self) -> int:
        """Checkpoints of one context, on the host: those that last, and one before a draft."""
        return (N_CHECKPOINTS + 1) * self.state

    def compute(self, n_cells: int, n_rows: int, n_copies: int = 1, n_ubatch: int | None = None) -> int:
        """Compute buffer of one context, with the rows of logits it returns. n_copies: of what goes into the graph.
        n_ubatch: tokens at a time with plain attention, None for flash attention."""
        n_tokens = min(n_ubatch or N_BATCH, rounded(n_cells))
        layer = 4 * n_tokens * (4 * self.n_embd + 3 * self.n_ff)
        head = 4 * n_tokens * 2 * self.n_embd + 4 * n_rows * self.n_vocab
        inputs = n_copies * (4 if n_ubatch else 2) * n_tokens * rounded(n_cells) * self.n_masks
        n_scores = n_tokens * rounded(n_cells) * self.n_heads if n_ubatch else 0
        # The CPU's own, which llama.cpp does not log: what a product reads, in the type of its weights or of V.
        work = max(4 * n_tokens * max(self.n_ff, self.n_embd), 2 * n_scores)
        return max(layer, head) + inputs + 4 * n_scores + work + 4 * n_rows * self.n_vocab

    def n_ubatch(self, n_ctx: int, n_seqs: int = 1) -> int | None:
        """Tokens for a CPU to evaluate at a time with plain attention, if each of `n_seqs` sequences has a cache of
        `n_ctx` positions. None for flash attention: if plain attention is not equivalent, would need more memory, or
        would split a step of all sequences.

        llama.cpp's flash attention on a CPU is fast for long batches, and evaluates short ones token by token.
        """
        sizes = [n for n in PLAIN_TOKENS if n >= n_seqs] if self.n_heads else []
        most = self.compute(n_ctx, N_ROWS)
        return next((n for n in sizes if self.compute(n_ctx, N_ROWS, n_ubatch=n) <= most), None)


def footprint(info: GGUFInfo, type_k: str | None = None, type_v: str | None = None) -> Footprint:
    """Footprint of the model in `info` with a KV cache of these types ("f16" where None).

    Raises InvalidParameterError for a type that no cache has.
    """
    n_layers = max(_number(info, "block_count") - _number(info, "nextn_predict_layers"), 1)
    layers, top = [0] * n_layers, {"input": 0, "output": 0}
    repacked = in_experts = widest = 0
    for name, tensor in info.tensors.items():
        match = _LAYER.match(name)
        if not match:
            top["input" if name.startswith(("token_embd", "per_layer_token_embd")) else "output"] += tensor.n_bytes
        elif int(match[1]) < n_layers:
            layers[int(match[1])] += tensor.n_bytes
            widest = max(widest, tensor.n_bytes)
            in_experts += tensor.n_bytes if "_exps." in name else 0
        repacked += tensor.n_bytes if tensor.type in _REPACKED and not name.startswith("token_embd") else 0
    is_tied = "output.weight" not in info.tensors
    tied_bytes = info.tensors["token_embd.weight"].n_bytes if is_tied and "token_embd.weight" in info.tensors else 0
    n_experts = _number(info, "expert_count")
    n_used = _number(info, "expert_used_count")
    idle = in_experts * (n_experts - n_used) // n_experts if n_experts else 0  # feed-forward experts of other tokens
    widths = _numbers(info, "feed_forward_length", n_layers), _numbers(info, "expert_feed_forward_length", n_layers)
    n_embd = _number(info, "embedding_length")
    return Footprint(
        layers=tuple(layers),
        input=top["input"],
        output=top["output"] + tied_bytes,
        is_tied=is_tied,
        read=sum(layers) + top["output"] + tied_bytes - idle,
        widest=widest,
        repacked=repacked,
        vocabulary=_TOKEN_BYTES * (info.n_vocab or 0),
        kv=_kv(info, n_layers, type_k, type_v),
        state=_state(info, n_layers),
        n_rollback=N_ROLLBACK if info.architecture in _ROLLS_BACK else 0,
        n_vocab=info.n_vocab or 0,
        n_embd=n_embd * (1 + n_used),
        n_ff=max(*widths[0], n_used * max(widths[1]), 2 * (_number(info, "ssm.inner_size") + _groups(info))),
        n_masks=2 if _number(info, "attention.sliding_window") else 1,
        n_heads=_plain_heads(info, n_layers, type_k, type_v),
    )


def _plain_heads(info: GGUFInfo, n_layers: int, type_k: str | None, type_v: str | None) -> int:
    """Attention heads; 0 if plain attention is not equivalent to flash attention.

    Without flash attention llama.cpp pads V to the width of the widest layer, copies V at each step if it is a part of
    K, and computes all cells of attention that selects cells by an indexer.
    """
    is_quantized = not {type_k, type_v} <= {*_NOT_QUANTIZED}
    no_cache = {0} if _state(info, n_layers) else set()  # of recurrent layers, for which nothing is padded
    is_padded = len({n_heads * v for n_heads, _, v in _kv_heads(info, n_layers)} - no_cache) > 1
    is_latent = _number(info, "attention.key_length_mla") > 0
    is_sparse = any(key.startswith(f"{info.architecture}.attention.indexer.") for key in info.metadata)
    return 0 if is_quantized or is_padded or is_latent or is_sparse else _number(info, "attention.head_count")


def _kv(info: GGUFInfo, n_layers: int, type_k: str | None, type_v: str | None) -> tuple[float, ...]:
    """Bytes that one cell has in each layer. Windowed layers are kept whole, so that text can be taken back."""
    k_bytes, v_bytes = (_cache_bytes(kind) for kind in (type_k, type_v))
    has_no_values = _number(info, "attention.key_length_mla") > 0
    every = _number(info, "full_attention_interval")
    n_own = n_layers - _number(info, "attention.shared_kv_layers")
    if info.architecture == "gemma3n":
        n_own = min(n_layers, 20)
    cells = []
    for layer, (n_heads, k, v) in enumerate(_kv_heads(info, n_layers)):
        is_recurrent = every > 0 and (layer + 1) % every != 0
        is_own = layer < n_own and not is_recurrent
        cells.append(n_heads * (k * k_bytes + (0 if has_no_values else v * v_bytes)) if is_own else 0.0)
    return tuple(cells)


def _kv_heads(info: GGUFInfo, n_layers: int) -> list[tuple[int, int, int]]:
    """Heads of K and V in each layer, and the widths of one's K and V."""
    n_heads = _number(info, "attention.head_count")
    default = _number(info, "embedding_length") // n_heads if n_heads else 0
    kv_heads = _numbers(info, "attention.head_count_kv", n_layers, n_heads)
    widths = []
    for layer, is_windowed in enumerate(_window(info, n_layers)):
        suffix = "_swa" if is_windowed else ""
        k, v = (
            _number(info, f"attention.{kind}_length{suffix}", _number(info, f"attention.{kind}_length", default))
            for kind in ("key", "value")
        )
        widths.append((kv_heads[layer], k, v))
    return widths


def _window(info: GGUFInfo, n_layers: int) -> tuple[int, ...]:
    """Whether each layer attends to a window only, where the header says so layer by layer."""
    pattern = info.metadata.get(f"{info.architecture}.attention.sliding_window_pattern")
    if isinstance(pattern, Array) and len(pattern.values) >= n_layers:
        return tuple(int(value) for value in pattern.values)
    return (0,) * n_layers


def _state(info: GGUFInfo, n_layers: int) -> int:
    """Bytes that the recurrent layers keep of one sequence."""
    matches = map(_STATE_TENSOR.match, info.tensors)
    n_recurrent = len({match[1] for match in matches if match and int(match[1]) < n_layers})
    n_embd, n_heads = _number(info, "embedding_length"), _number(info, "attention.head_count")
    inner, size = _number(info, "ssm.inner_size"), _number(info, "ssm.state_size")
    n_conv = max(_number(info, "ssm.conv_kernel") - 1, 0)
    values = n_conv * (inner + 2 * _groups(info)) + inner * size
    if head := _number(info, "wkv.head_size"):
        values = n_embd * (head + _number(info, "token_shift_count", 2))
    elif length := _number(info, "shortconv.l_cache"):
        values = n_embd * (length - 1)
    elif head := _number(info, "kda.head_dim"):
        values = n_heads * head * (3 * (n_conv or 3) + head)
    return 4 * n_recurrent * values


def _groups(info: GGUFInfo) -> int:
    """Width of what the heads of a recurrent layer share in groups."""
    return _number(info, "ssm.group_count") * _number(info, "ssm.state_size")


def _cache_bytes(kind: str | None) -> float:
    """Bytes of one value in a KV cache of this type."""
    _, n_values, n_bytes = BLOCKS[cache_type(kind)]
    return n_bytes / n_values


def _number(info: GGUFInfo, key: str, default: int = 0) -> int:
    """Value of a key of the architecture; the largest if there is one for each layer."""
    return max(_numbers(info, key, 1, default))


def _numbers(info: GGUFInfo, key: str, n_layers: int, default: int = 0) -> Sequence[int]:
    """Values of a key of the architecture, one for each of `n_layers` layers."""
    value = info.metadata.get(f"{info.architecture}.{key}")
    if isinstance(value, Array) and len(value.values) >= n_layers:
        return [int(number) for number in value.values]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return [int(value) if is_number else default] * n_layers  # type: ignore[arg-type]
