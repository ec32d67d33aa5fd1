"""O(r)-equivariant twins of the layers, for balanced latents X = [U; V] (N, M, D, r).

In the balanced gauge the group that is left is O(r), one orthogonal Q per module with X -> X Q. It is smaller
than GL(r), so more is allowed: left maps may mix U's rows with V's, and X X^T is invariant.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lolgen.errors import ShapeError
from lolgen.lora import Spec
from lolgen.nn.layers import left, normalised
from lolgen.nn.tokens import ModuleNet


class OLinear(nn.Module):
    """W_m X with each module's own W, (N, M, d_in, r) -> (N, M, d_out, r)."""

    def __init__(self, spec: Spec, d_in: int, d_out: int) -> None:
        super().__init__()
        self.spec = spec
        self.weight = nn.Parameter(torch.randn(len(spec), d_out, d_in) / d_in**0.5)

    def forward(self, X: Tensor) -> Tensor:
        M, _, d = self.weight.shape
        if X.ndim != 4 or X.shape[1:3] != (M, d):
            raise ShapeError(f"balanced latent: found {tuple(X.shape)}, wanted (N, {M}, {d}, r)")
        return left(self.weight, X)


class Gram(nn.Module):
    """P X (P X)^T of every module, (N, M, p, p): invariant under O(r)."""

    def __init__(self, spec: Spec, d_in: int, p: int) -> None:
        super().__init__()
        self.spec = spec
        self.maps = OLinear(spec, d_in, p)

    def forward(self, X: Tensor) -> Tensor:
        Y = self.maps(X)
        return Y @ Y.mT


def upper(G: Tensor) -> Tensor:
    """The entries of symmetric G (..., p, p) on and above the diagonal, (..., p (p + 1) / 2)."""
    i, j = torch.triu_indices(G.shape[-1], G.shape[-1], device=G.device)
    return G[..., i, j]


class OMix(nn.Module):
    """X -> X + A B^T X, with A and B learned functions of the Gram invariants of all modules; see `GLMix`."""

    def __init__(
        self,
        spec: Spec,
        d: int,
        *,
        p: int = 8,
        rank: int = 8,
        width: int = 64,
        depth: int = 1,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.spec, self.d, self.rank = spec, d, rank
        self.gram = Gram(spec, d, p)
        self.net = ModuleNet(
            len(spec), p * p + 1, 2 * rank * d, width=width, depth=depth, heads=heads, dropout=dropout
        )
        assert self.net.out is not None
        with torch.no_grad():
            self.net.out.weight[..., : rank * d] = 0
            self.net.out.weight[..., rank * d :] /= d**0.5

    def forward(self, X: Tensor) -> Tensor:
        A, B = self.net(normalised(self.gram(X))).unflatten(-1, (2, self.d, self.rank)).unbind(2)
        return X + A @ (B.mT @ X)
