"""What looks across modules: per-module linear layers and a small pre-norm transformer over module tokens.

These see invariants only, so nothing here has a symmetry to keep.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention


class ModuleLinear(nn.Module):
    """y_m = x_m W_m + b_m with each module's own weights, (N, M, d_in) -> (N, M, d_out)."""

    def __init__(self, modules: int, d_in: int, d_out: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(modules, d_in, d_out) / max(d_in, 1) ** 0.5)
        self.bias = nn.Parameter(torch.zeros(modules, d_out))

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("nmi,mio->nmo", x, self.weight) + self.bias


class Block(nn.Module):
    """Attention and MLP, each behind a norm, (N, M, width) -> (N, M, width).

    `keep` (N, M) bool: tokens that are attended to, all without it; at least one each. `first`: how many tokens come
    out, from the front, all without it.
    A conditioned block takes the norms' shift and scale and the residuals' gates from a vector (N, width)
    (adaLN-Zero, arXiv 2212.09748); it starts as the identity.
    """

    def __init__(
        self, width: int, heads: int, dropout: float = 0.0, *, conditioned: bool = False, expansion: int = 2
    ) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"heads: found {heads}, wanted a divisor of the width {width}")
        self.heads = heads
        self.norm_1 = nn.LayerNorm(width, elementwise_affine=not conditioned)
        self.norm_2 = nn.LayerNorm(width, elementwise_affine=not conditioned)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(
            nn.Linear(width, expansion * width), nn.GELU(), nn.Linear(expansion * width, width)
        )
        self.dropout = nn.Dropout(dropout)
        self.modulation: nn.Linear | None = None
        if conditioned:
            self.modulation = nn.Linear(width, 6 * width)
            nn.init.zeros_(self.modulation.weight)
            nn.init.zeros_(self.modulation.bias)

    def forward(
        self,
        x: Tensor,
        condition: Tensor | None = None,
        keep: Tensor | None = None,
        first: int | None = None,
    ) -> Tensor:
        if self.modulation is None:
            x = x[:, :first] + self.dropout(self._attend(self.norm_1(x), keep, first))
            return x + self.dropout(self.mlp(self.norm_2(x)))
        if condition is None:
            raise ValueError("a conditioned block needs a condition (N, width)")
        parts = self.modulation(condition)[:, None].chunk(6, dim=-1)  # each (N, 1, width)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = parts
        attended = self._attend(self.norm_1(x) * (1 + scale_1) + shift_1, keep, first)
        x = x[:, :first] + gate_1 * self.dropout(attended)
        return x + gate_2 * self.dropout(self.mlp(self.norm_2(x) * (1 + scale_2) + shift_2))

    def _attend(self, x: Tensor, keep: Tensor | None, first: int | None) -> Tensor:
        N, M, w = x.shape
        q, k, v = self.qkv(x).view(N, M, 3, self.heads, w // self.heads).permute(2, 0, 3, 1, 4)
        mask = None if keep is None else keep[:, None, None]
        attended = scaled_dot_product_attention(q[:, :, :first], k, v, attn_mask=mask)
        return self.out(attended.transpose(1, 2).reshape(N, attended.shape[2], w))


class Summary(nn.Module):
    """Tokens (N, T, width) -> one vector (N, width): a learned CLS token, `depth` pre-norm blocks, a norm.

    `keep` (N, T) bool: tokens that are looked at, all without it; with none left the CLS token sees itself.
    """

    def __init__(self, width: int, depth: int = 2, heads: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.cls = nn.Parameter(0.5 * torch.randn(width))
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, keep: Tensor | None = None) -> Tensor:
        x = torch.cat([self.cls.expand(len(x), 1, -1), x], dim=1)
        if keep is not None:
            # Attention without a mask is faster, and in training there is seldom anything to leave out.
            keep = None if bool(keep.all()) else torch.cat([keep.new_ones(len(keep), 1), keep], dim=1)
        last = len(self.blocks) - 1
        for i, block in enumerate(self.blocks):
            x = block(x, keep=keep, first=1 if i == last else None)
        return self.norm(x[:, 0])


class ModuleNet(nn.Module):
    """Invariants of every module -> numbers for every module, (N, M, d_in) -> (N, M, d_out).

    Each module's own layer in (its bias is the module's embedding), `depth` blocks across modules, a norm,
    and with `d_out` each module's own layer out; without it the tokens (N, M, width) are the result.
    """

    def __init__(
        self,
        modules: int,
        d_in: int,
        d_out: int | None = None,
        *,
        width: int = 128,
        depth: int = 1,
        heads: int = 4,
        dropout: float = 0.0,
        conditioned: bool = False,
    ) -> None:
        super().__init__()
        self.embed = ModuleLinear(modules, d_in, width)
        nn.init.normal_(self.embed.bias, std=0.5)
        self.blocks = nn.ModuleList(
            Block(width, heads, dropout, conditioned=conditioned) for _ in range(depth)
        )
        self.norm = nn.LayerNorm(width)
        self.out = ModuleLinear(modules, width, d_out) if d_out is not None else None

    def forward(self, x: Tensor, condition: Tensor | None = None) -> Tensor:
        x = self.embed(x)
        if condition is not None:
            x = x + condition[:, None]
        for block in self.blocks:
            x = block(x, condition)
        x = self.norm(x)
        return x if self.out is None else self.out(x)
