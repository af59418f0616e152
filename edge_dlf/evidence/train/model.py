"""Transformers in torch that are trained here and run in llama.cpp: Llama and its relatives (`TRAITS` of shape.py)."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional

from .shape import Shape


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
    def __init__(self, shape: Shape, width: int | None = None) -> None:
        super().__init__()
        self.eps = shape.norm_eps
        self.weight = nn.Parameter(torch.ones(width or shape.n_embd))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps) * self.weight).to(x.dtype)


class Block(nn.Module):
    """A layer: the positions are mixed, then each goes through the feed-forward part."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        traits, d = shape.traits, shape.n_embd
        if traits.norms != "behind":
            self.attn_norm, self.ffn_norm = Norm(shape), Norm(shape)
        if traits.norms != "before":
            self.post_attention_norm, self.post_ffw_norm = Norm(shape), Norm(shape)
        last = self.add_mixer()
        if not traits.is_fused:
            self.ffn_gate = Linear(d, shape.n_ff)
        self.ffn_up, self.ffn_down = Linear(d, (1 + traits.is_fused) * shape.n_ff), Linear(shape.n_ff, d)
        for linear in (last, self.ffn_down):
            nn.init.zeros_(linear.weight)

    def add_mixer(self) -> Linear:
        """Add what mixes positions, and return its last matrix."""
        raise NotImplementedError

    def mix(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        mixed = self.mix(self.normed("attn_norm", x), cos, sin)
        x = x + self._scaled(self.normed("post_attention_norm", mixed))
        output = self._feed_forward(self.normed("ffn_norm", x))
        return x + self._scaled(self.normed("post_ffw_norm", output))

    def normed(self, name: str, x: Tensor) -> Tensor:
        norm = self._modules.get(name)
        return x if norm is None else norm(x)

    def _scaled(self, x: Tensor) -> Tensor:
        return x if self.shape.residual_scale == 1.0 else self.shape.residual_scale * x

    def _feed_forward(self, x: Tensor) -> Tensor:
        gate, up = self.ffn_up(x).chunk(2, -1) if self.shape.traits.is_fused else (self.ffn_gate(x), self.ffn_up(x))
        gate = functional.gelu(gate, approximate="tanh") if self.shape.traits.is_gemma else functional.silu(gate)
        output: Tensor = self.ffn_down(gate * up)
        return output


class Attention(Block):
    """window: positions that it looks back over; 0 for all."""

    def __init__(self, shape: Shape, window: int) -> None:
        self.window = window
        n_head_kv = shape.n_head_kv or shape.n_head
        self.n_heads = (shape.n_head, n_head_kv, n_head_kv)
        super().__init__(shape)

    def add_mixer(self) -> Linear:
        shape, d, width = self.shape, self.shape.n_embd, self.shape.head_width
        self.widths = n_q, n_kv, _ = [n_head * width for n_head in self.n_heads]
        if norm := shape.traits.query_norm:
            self.attn_q_norm, self.attn_k_norm = (Norm(shape, width if norm == "head" else n) for n in (n_q, n_kv))
        if shape.traits.is_fused:
            self.attn_qkv = Linear(d, n_q + 2 * n_kv, bias=shape.has_bias)
        else:
            self.attn_q, self.attn_k, self.attn_v = (Linear(d, n, bias=shape.has_bias) for n in self.widths)
        self.attn_output = Linear(n_q, d)
        return self.attn_output

    def mix(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, n, _ = x.shape
        shape, norm = self.shape, self.shape.traits.query_norm
        if shape.traits.is_fused:
            q, k, v = self.attn_qkv(x).split(self.widths, -1)
        else:
            q, k, v = self.attn_q(x), self.attn_k(x), self.attn_v(x)
        if norm == "whole":
            q, k = self.attn_q_norm(q), self.attn_k_norm(k)
        q, k, v = (
            part.view(batch, n, n_head, -1).transpose(1, 2)
            for part, n_head in zip((q, k, v), self.n_heads, strict=True)
        )
        if norm == "head":
            q, k = self.attn_q_norm(q), self.attn_k_norm(k)
        q, k = _rotate(q, cos[:n], sin[:n]), _rotate(k, cos[:n], sin[:n])
        n_head, n_head_kv, _ = self.n_heads
        if n_head != n_head_kv:
            k, v = (part.repeat_interleave(n_head // n_head_kv, 1) for part in (k, v))
        # On a CPU faster than the fused attention, which also splits badly over busy cores.
        weights = (q @ k.transpose(-1, -2)) * (shape.attention_scale or shape.head_width**-0.5)
        unseen = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        if self.window:
            unseen |= torch.ones_like(unseen).tril(-self.window)
        mixed = _capped(weights, shape.attention_cap).masked_fill(unseen, -torch.inf).softmax(-1).to(v.dtype) @ v
        output: Tensor = self.attn_output(mixed.transpose(1, 2).reshape(batch, n, -1))
        return output


class Convolution(Block):
    """LFM2's layer without attention: each channel is mixed with itself at the positions just before."""

    def add_mixer(self) -> Linear:
        self.shortconv = ShortConv(self.shape)
        return self.shortconv.out_proj

    def mix(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        mixed: Tensor = self.shortconv(x)
        return mixed


class ShortConv(nn.Module):
    """x (B, N, D) -> (B, N, D)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.n_embd
        self.in_proj, self.conv, self.out_proj = Linear(d, 3 * d), Taps(d, shape.n_conv), Linear(d, d)

    def forward(self, x: Tensor) -> Tensor:
        gate, output_gate, value = self.in_proj(x).chunk(3, -1)
        output: Tensor = self.out_proj(output_gate * self.conv(gate * value))
        return output


class Taps(nn.Module):
    """Weights of a position and of those before it, the farthest first, for each channel: (D, K)."""

    def __init__(self, n_embd: int, n_conv: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(n_embd, n_conv))

    def forward(self, x: Tensor) -> Tensor:
        n_embd, n_conv = self.weight.shape
        padded = functional.pad(x.transpose(1, 2), (n_conv - 1, 0))
        return functional.conv1d(padded, self.weight.unsqueeze(1), groups=n_embd).transpose(1, 2)


def _capped(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x.float() / cap) if cap else x


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, first half against second half of each head; llama.cpp may have the pairs side by side."""
    n_rot = 2 * cos.shape[-1]
    (a, b), rest = x[..., :n_rot].chunk(2, -1), x[..., n_rot:]
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1).to(x.dtype)


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
        self.blk = nn.ModuleList(
            Convolution(shape)
            if layer in shape.convolved
            else Attention(shape, shape.window if shape.is_local(layer) else 0)
            for layer in range(shape.n_layer)
        )
        self.output_norm = Norm(shape)
        self.output = None if shape.is_tied else nn.Linear(shape.n_embd, shape.n_vocab, bias=False)
        self.set_angles()

    def set_angles(self, divisors: Tensor | None = None) -> None:
        """Compute the cosines and sines of the rotary positions; divisors of their frequencies, one for each."""
        shape = self.shape
        half = (shape.n_rot or shape.head_width) // 2
        local = shape.local_rope_base or shape.rope_base, shape.local_rope_factor or shape.rope_factor
        for prefix, (rope_base, factor) in {"": (shape.rope_base, shape.rope_factor), "local_": local}.items():
            frequencies = rope_base ** (-torch.arange(half).float() / half) / factor
            frequencies = frequencies if divisors is None else frequencies / divisors
            turns = torch.outer(torch.arange(shape.n_ctx).float(), frequencies)
            self.register_buffer(f"{prefix}cos", shape.rope_scale * turns.cos(), persistent=False)
            self.register_buffer(f"{prefix}sin", shape.rope_scale * turns.sin(), persistent=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the output's matrix is applied to, (B, N, D)."""
        x = self.token_embd(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        shape = self.shape
        scale = shape.n_embd**0.5 if shape.traits.is_gemma else shape.embedding_scale
        x = x if scale == 1.0 else x * scale
        angles = {True: (self.local_cos, self.local_sin), False: (self.cos, self.sin)}
        for layer, block in enumerate(self.blk):
            cos, sin = angles[shape.is_local(layer)]
            x = block(x, cos.to(x.dtype), sin.to(x.dtype))
        x = self.output_norm(x)
        return x if shape.logit_scale == 1.0 else x / shape.logit_scale

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of all tokens, (..., V)."""
        return _capped(functional.linear(hidden, (self.output or self.token_embd).weight), self.shape.logit_cap)

    def logits_of(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits of the tokens `ids` (R, K) in rows `hidden` (R, D), float32 (R, K)."""
        rows = (self.output or self.token_embd).weight[ids].float()
        with torch.autocast(hidden.device.type, enabled=False):
            return _capped(torch.bmm(rows, hidden.float().unsqueeze(-1)).squeeze(-1), self.shape.logit_cap)

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
