"""Llama and Qwen2 in torch: what is trained here and runs in llama.cpp."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

N_CTX = 512


@dataclass(frozen=True)
class Shape:
    """arch: llama.cpp's name, "llama" or "qwen2", which say how a head's rows are ordered. n_head_kv: as n_head where
    None. has_bias: of queries, keys and values. is_tied: whether the embedding is the output's matrix too."""

    n_vocab: int
    n_embd: int
    n_layer: int
    n_head: int
    n_ff: int
    n_head_kv: int | None = None
    arch: str = "llama"
    n_ctx: int = N_CTX
    rope_base: float = 10_000.0
    norm_eps: float = 1e-5
    has_bias: bool = False
    is_tied: bool = True

    @property
    def n_rot(self) -> int:
        """Width of a head."""
        return self.n_embd // self.n_head


class Linear(nn.Linear):
    """With `add_lora`, plus a low-rank update of its frozen weight."""

    def __init__(self, n_in: int, n_out: int, *, bias: bool = False) -> None:
        super().__init__(n_in, n_out, bias=bias)
        nn.init.normal_(self.weight, std=n_in**-0.5)
        self.lora_a: nn.Parameter | None = None
        self.lora_b: nn.Parameter | None = None
        self.lora_scale = 1.0

    def add_lora(self, rank: int, scale: float) -> None:
        self.weight.requires_grad_(False)
        self.lora_a = nn.Parameter(torch.randn(rank, self.in_features) * self.in_features**-0.5)
        self.lora_b = nn.Parameter(torch.zeros(self.out_features, rank))
        self.lora_scale = scale

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        if self.lora_a is None or self.lora_b is None:
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
    def __init__(self, shape: Shape) -> None:
        super().__init__()
        d = shape.n_embd
        self.n_head, self.n_head_kv = shape.n_head, shape.n_head_kv or shape.n_head
        n_kv = self.n_head_kv * shape.n_rot
        self.attn_norm, self.ffn_norm = Norm(d, shape.norm_eps), Norm(d, shape.norm_eps)
        self.attn_q, self.attn_k, self.attn_v = (Linear(d, n, bias=shape.has_bias) for n in (d, n_kv, n_kv))
        self.attn_output = Linear(d, d)
        self.ffn_gate, self.ffn_up, self.ffn_down = Linear(d, shape.n_ff), Linear(d, shape.n_ff), Linear(shape.n_ff, d)
        for last in (self.attn_output, self.ffn_down):
            nn.init.zeros_(last.weight)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, N, D) -> (B, N, D)."""
        batch, n, d = x.shape
        h = self.attn_norm(x)
        q, k, v = (
            p(h).view(batch, n, n_head, -1).transpose(1, 2)
            for p, n_head in ((self.attn_q, self.n_head), (self.attn_k, self.n_head_kv), (self.attn_v, self.n_head_kv))
        )
        q, k = _rotate(q, cos[:n], sin[:n]), _rotate(k, cos[:n], sin[:n])
        if self.n_head != self.n_head_kv:
            k, v = (part.repeat_interleave(self.n_head // self.n_head_kv, 1) for part in (k, v))
        # On a CPU faster than the fused attention, which also splits badly over busy cores.
        weights = (q @ k.transpose(-1, -2)) * q.shape[-1] ** -0.5
        ahead = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
        mixed = weights.masked_fill(ahead, -torch.inf).softmax(-1).to(v.dtype) @ v
        x = x + self.attn_output(mixed.transpose(1, 2).reshape(batch, n, d))
        h = self.ffn_norm(x)
        return x + self.ffn_down(functional.silu(self.ffn_gate(h)) * self.ffn_up(h))


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions, first half against second half of each head; llama.cpp's "llama" has the pairs side by side."""
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class Llama(nn.Module):
    """tokens (B, N) -> logits (B, N, V)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.n_vocab, shape.n_embd)
        nn.init.normal_(self.token_embd.weight, std=0.02)
        self.blk = nn.ModuleList(Block(shape) for _ in range(shape.n_layer))
        self.output_norm = Norm(shape.n_embd, shape.norm_eps)
        self.output = None if shape.is_tied else nn.Linear(shape.n_embd, shape.n_vocab, bias=False)
        for name, table in zip(("cos", "sin"), self.angles(), strict=True):
            self.register_buffer(name, table, persistent=False)

    def angles(self, factors: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rotary positions, (n_ctx, n_rot / 2); factors divide the frequencies."""
        half = self.shape.n_rot // 2
        frequencies = self.shape.rope_base ** (-torch.arange(half).float() / half)
        turns = torch.outer(
            torch.arange(self.shape.n_ctx).float(), frequencies if factors is None else frequencies / factors
        )
        return turns.cos(), turns.sin()

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the output's matrix is applied to, (B, N, D)."""
        x = self.token_embd(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        for block in self.blk:
            x = block(x, cos, sin)
        return self.output_norm(x)

    def logits(self, hidden: Tensor) -> Tensor:
        return functional.linear(hidden, (self.output or self.token_embd).weight)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.logits(self.hidden(tokens))

    def loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """Mean cross-entropy in nats over the targets that are not negative."""
        logits = self(tokens).float()
        return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def sparse_loss(self, tokens: Tensor, targets: Tensor) -> Tensor:
        """As `loss`, with logits computed at the targets alone: for vocabularies that outweigh the rest."""
        is_target = targets >= 0
        logits = self.logits(self.hidden(tokens)[is_target]).float()
        return functional.cross_entropy(logits, targets[is_target])

    def add_lora(self, rank: int, scale: float = 1.0) -> None:
        """Freeze all weights and train low-rank updates of every matrix but embedding and output."""
        self.requires_grad_(False)
        for module in self.modules():
            if isinstance(module, Linear):
                module.add_lora(rank, scale)

    def n_weights(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
