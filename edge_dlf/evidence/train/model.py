"""Transformers in torch that are trained here and run in llama.cpp: Llama, Qwen2, Qwen3 and Gemma 3."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

N_CTX = 512
_LOCAL_ROPE_BASE = 10_000.0
_LOCAL_LAYERS = 5
"""Layers of Gemma 3 that see a window of the text, before each that sees all of it."""


@dataclass(frozen=True)
class Shape:
    """What distinguishes one model from another.

    arch: llama.cpp's name, "llama", "qwen2", "qwen3" or "gemma3".
    n_head_kv: as n_head where None. n_head_embd: width of a head; n_embd / n_head where None.
    has_bias: of queries, keys and values. is_tied: whether the embedding is the output's matrix too.
    window: positions that most layers of Gemma 3 look back over.
    """

    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_ff: int
    n_head_kv: int | None = None
    n_head_embd: int | None = None
    arch: str = "llama"
    n_ctx: int = N_CTX
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    has_bias: bool = False
    is_tied: bool = True
    window: int = 0

    @property
    def n_rot(self) -> int:
        """Width of a head."""
        return self.n_head_embd or self.n_embd // self.n_head

    @property
    def has_head_norm(self) -> bool:
        """Whether each head's queries and keys are normalised."""
        return self.arch in ("qwen3", "gemma3")

    @property
    def is_gemma(self) -> bool:
        return self.arch == "gemma3"

    def is_local(self, layer: int) -> bool:
        """Whether a layer sees a window of the text."""
        return self.is_gemma and (layer + 1) % (_LOCAL_LAYERS + 1) > 0


class Linear(nn.Linear):
    """With `add_lora`, plus a low-rank update of its frozen weight."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool = False) -> None:
        super().__init__(n_in, n_out, bias=bias)
        nn.init.normal_(self.weight, std=n_in**-0.5)
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None
        self.lora_scale = 1.0
        self.is_plain = False

    def add_lora(self, rank: int, scale: float) -> None:
        self.weight.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features) * self.in_features**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank))
        self.lora_scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.lora_a is None or self.lora_b is None or self.is_plain:
            return y
        low = functional.linear(x, self.lora_a)
        return y + functional.linear(low if self.lora_scale == 1.0 else self.lora_scale * low, self.lora_b)


class Norm(nn.Module):
    def __init__(self, n_embd: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(n_embd))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class Block(nn.Module):
    def __init__(self, shape: Shape, layer: int) -> None:
        super().__init__()
        d, eps = shape.n_embd, shape.norm_eps
        self.n_head, self.n_head_kv = shape.n_head, shape.n_head_kv or shape.n_head
        self.window = shape.window if shape.is_local(layer) else 0
        self.is_local, self.is_gemma = shape.is_local(layer), shape.is_gemma
        n_q, n_kv = self.n_head * shape.n_rot, self.n_head_kv * shape.n_rot
        self.attn_norm, self.ffn_norm = Norm(d, eps), Norm(d, eps)
        self.attn_q, self.attn_k, self.attn_v = (Linear(d, n, bias=shape.has_bias) for n in (n_q, n_kv, n_kv))
        self.attn_output = Linear(n_q, d)
        self.attn_q_norm, self.attn_k_norm = (Norm(shape.n_rot, eps) if shape.has_head_norm else None for _ in "qk")
        self.post_attention_norm, self.post_ffw_norm = (Norm(d, eps) if self.is_gemma else None for _ in range(2))
        self.ffn_gate, self.ffn_up, self.ffn_down = Linear(d, shape.n_ff), Linear(d, shape.n_ff), Linear(shape.n_ff, d)
        for last in (self.attn_output, self.ffn_down):
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        batch, n, _ = x.shape
        h = self.attn_norm(x)
        q, k, v = (
            p(h).view(batch, n, n_head, -1).transpose(1, 2)
            for p, n_head in ((self.attn_q, self.n_head), (self.attn_k, self.n_head_kv), (self.attn_v, self.n_head_kv))
        )
        q, k = _normed(self.attn_q_norm, q), _normed(self.attn_k_norm, k)
        q, k = _rotate(q, cos[:n], sin[:n]), _rotate(k, cos[:n], sin[:n])
        if self.n_head != self.n_head_kv:
            k, v = (part.repeat_interleave(self.n_head // self.n_head_kv, 1) for part in (k, v))
        # On a CPU faster than the fused attention, which also splits badly over busy cores.
        weights = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        unseen = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        if self.window:
            unseen |= torch.ones_like(unseen).tril(-self.window)
        mixed = weights.masked_fill(unseen, -torch.inf).softmax(-1).to(v.dtype) @ v
        mixed = self.attn_output(mixed.transpose(1, 2).reshape(batch, n, -1))
        x = x + _normed(self.post_attention_norm, mixed)
        h = self.ffn_norm(x)
        gate = self.ffn_gate(h)
        gate = functional.gelu(gate, approximate="tanh") if self.is_gemma else functional.silu(gate)
        return x + _normed(self.post_ffw_norm, self.ffn_down(gate * self.ffn_up(h)))


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    return x if norm is None else norm(x)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, first half against second half of each head; llama.cpp's "llama" has the pairs side by side."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Llama(nn.Module):
    """tokens (B, N) -> logits (B, N, V).

    angles: cosines and sines of the rotary positions; `local_` those of layers that see a window.
    """

    cos: Tensor
    sin: Tensor
    local_cos: Tensor
    local_sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.n_vocab, shape.n_embd)
        nn.init.normal_(self.token_embd.weight, std=0.02)
        self.blk = nn.ModuleList(Block(shape, layer) for layer in range(shape.n_layer))
        self.output_norm = Norm(shape.n_embd, shape.norm_eps)
        self.output = None if shape.is_tied else nn.Linear(shape.n_embd, shape.n_vocab, bias=False)
        self.set_angles()

    def set_angles(self, factors: Tensor | None = None) -> None:
        """Compute the cosines and sines of the rotary positions; factors divide their frequencies."""
        half = self.shape.n_rot // 2
        for prefix, rope_base in (("", self.shape.rope_base), ("local_", _LOCAL_ROPE_BASE)):
            frequencies = rope_base ** (-torch.arange(half).float() / half)
            frequencies = frequencies if factors is None else frequencies / factors
            turns = torch.outer(torch.arange(self.shape.n_ctx).float(), frequencies)
            self.register_buffer(f"{prefix}cos", turns.cos(), persistent=False)
            self.register_buffer(f"{prefix}sin", turns.sin(), persistent=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the output's matrix is applied to, (B, N, D)."""
        x = self.token_embd(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.shape.is_gemma:
            x = x * self.shape.n_embd**0.5
        angles = {True: (self.local_cos, self.local_sin), False: (self.cos, self.sin)}
        for block in self.blk:
            cos, sin = angles[block.is_local]
            x = block(x, cos.to(x.dtype), sin.to(x.dtype))
        return self.output_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, (self.output or self.token_embd).weight)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.logits(self.hidden(tokens))
        return logits

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the targets that are not negative."""
        logits = self(tokens).float()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def add_lora(self, rank: int, scale: float = 1.0) -> None:
        """Freeze all weights and train low-rank updates of every matrix but embedding and output."""
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Linear):
                module.add_lora(rank, scale)

    @contextmanager
    def without_lora(self) -> Iterator[None]:
        """Compute what the frozen weights alone say, without gradients."""
        linears = [module for module in self.modules() if isinstance(module, Linear)]
        for linear in linears:
            linear.is_plain = True
        try:
            with torch.no_grad():
                yield
        finally:
            for linear in linears:
                linear.is_plain = False
