"""GL-equivariant layers: left linear maps, invariants, and the universal nonlinearity.

A gauge acts on the right of a factor pair, `(U, V) -> (U g^-1, V g^T)`, so every linear equivariant map acts
on the left (arXiv 2410.04207) and rank is never mixed: one set of weights serves every rank, and columns that
are zero stay zero.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lolgen.errors import ShapeError
from lolgen.lora import Batch, Group, Spec
from lolgen.nn.latent import Latent
from lolgen.nn.pretrained import require_spec
from lolgen.nn.tokens import ModuleNet

Sides = int | tuple[int, int]


def sides(d: Sides) -> tuple[int, int]:
    """(d_u, d_v) of a size for both sides or one for each."""
    return (d, d) if isinstance(d, int) else (d[0], d[1])


def left(weight: Tensor, U: Tensor) -> Tensor:
    """weight (M, d, m) on the left of U (N, M, m, r): (N, M, d, r), no copy of the weights per LoRA."""
    return torch.einsum("kdm,nkmr->nkdr", weight, U)


class GLLinear(nn.Module):
    """(Phi_m U, Psi_m V) with each module's own Phi and Psi.

    `d_in`, `d_out`: rows of the latents that come in and go out, one size or (d_u, d_v); None where a Batch
    comes in or goes out, whose rows are the spec's. So `GLLinear(spec, d_out=32)` maps Batch -> Latent,
    `GLLinear(spec, 32, 64)` Latent -> Latent and `GLLinear(spec, 32)` Latent -> Batch.

    `U`, `V`: per group of the spec (one group of all modules between latents) a weight (M, d_out, d_in).
    """

    def __init__(self, spec: Spec, d_in: Sides | None = None, d_out: Sides | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.d_in = None if d_in is None else sides(d_in)
        self.d_out = None if d_out is None else sides(d_out)
        everything = ((-1, -1), tuple(range(len(spec))))
        self.parts = spec.groups if d_in is None or d_out is None else (everything,)
        self.U, self.V = nn.ParameterList(), nn.ParameterList()
        for shape, index in self.parts:
            rows_in, rows_out = self.d_in or shape, self.d_out or shape
            for weights, m, n in zip((self.U, self.V), rows_in, rows_out, strict=True):
                weights.append(nn.Parameter(torch.randn(len(index), n, m) / m**0.5))
        order = [m for _, index in self.parts for m in index]
        self.register_buffer("order", torch.tensor(order, dtype=torch.long).argsort(), persistent=False)

    order: Tensor

    @torch.no_grad()
    def assign(self, U: Sequence[Tensor], V: Sequence[Tensor]) -> None:
        """Take these weights, one per group and side, instead of random ones."""
        for weights, values in ((self.U, U), (self.V, V)):
            for weight, value in zip(weights, values, strict=True):
                if weight.shape != value.shape:
                    raise ShapeError(
                        f"weights of a GLLinear: found {tuple(value.shape)}, wanted {tuple(weight.shape)}"
                    )
                weight.copy_(value)

    def forward(self, x: Batch | Latent) -> Batch | Latent:
        """SpecError for a batch on another spec, ShapeError for a latent of other sizes."""
        moved = [
            (left(P, U), left(Q, V)) for P, Q, (U, V) in zip(self.U, self.V, self._pairs(x), strict=True)
        ]
        if self.d_out is None:
            groups = [Group(index, *pair) for (_, index), pair in zip(self.parts, moved, strict=True)]
            return Batch(self.spec, groups, x.ranks)
        if len(moved) == 1:
            return Latent(*moved[0], x.ranks)
        U, V = (torch.cat(side, dim=1)[:, self.order] for side in zip(*moved, strict=True))
        return Latent(U, V, x.ranks)

    def _pairs(self, x: Batch | Latent) -> list[tuple[Tensor, Tensor]]:
        if self.d_in is None:
            if not isinstance(x, Batch):
                raise TypeError("this GLLinear maps a Batch: give d_in for one that maps latents")
            require_spec(self.spec, x.spec)
            return [(g.U, g.V) for g in x.groups]
        if not isinstance(x, Latent):
            raise TypeError("this GLLinear maps a Latent: leave d_in out for one that maps batches")
        _check(x, len(self.spec), self.d_in)
        return [(x.U, x.V)] if len(self.parts) == 1 else x.pairs(self.spec)


class Invariants(nn.Module):
    """Phi U (Psi V)^T of every module, (N, M, p, q): gauge-invariant, of any size, never the full delta W.

    Takes latents of `d_in` rows, or with `d_in=None` batches. On latents of at least p and q rows the maps
    start as the first rows of the identity.
    """

    def __init__(self, spec: Spec, d_in: Sides | None, p: int, q: int | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.size = (p, p if q is None else q)
        self.maps = GLLinear(spec, d_in, self.size)
        if d_in is not None:
            M = len(spec)
            for weights in (self.maps.U, self.maps.V):
                rows, d = weights[0].shape[1:]
                if rows <= d:
                    nn.init.zeros_(weights[0])
                    weights[0].data[:] = torch.eye(rows, d).expand(M, rows, d)

    def forward(self, x: Batch | Latent) -> Tensor:
        y = self.maps(x)
        return y.U @ y.V.mT


class GLMix(nn.Module):
    """The universal equivariant nonlinearity on latents, (U, V) -> (U + M U, V + N V).

    The matrices M = A B^T and N = C D^T (rank `rank` each) are learned functions of the invariants of all
    modules: `Invariants` of p x p, divided by their norm over the whole LoRA (its logarithm is one more
    feature, so no scale of LoRA is out of range), then a `ModuleNet`. A and C start at zero: the layer starts
    as the identity. `depth=0` leaves out the transformer; modules are then mixed through the norm alone.
    """

    def __init__(
        self,
        spec: Spec,
        d: Sides,
        *,
        p: int = 8,
        rank: int = 8,
        width: int = 64,
        depth: int = 1,
        heads: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.d, self.rank = sides(d), rank
        self.invariants = Invariants(spec, d, p)
        self.net = ModuleNet(
            len(spec),
            p * p + 1,
            2 * rank * sum(self.d),
            width=width,
            depth=depth,
            heads=heads,
            dropout=dropout,
        )
        assert self.net.out is not None
        du, dv = self.d
        with torch.no_grad():
            weight = self.net.out.weight  # (M, width, A | B | C | D)
            for start, size, d_ in ((0, du, du), (2 * rank * du, dv, dv)):
                weight[..., start : start + rank * size] = 0
                weight[..., start + rank * size : start + 2 * rank * size] /= d_**0.5

    def forward(self, x: Latent) -> Latent:
        _check(x, len(self.spec), self.d)
        A, B, C, D = self._matrices(normalised(self.invariants(x)))
        return Latent(x.U + A @ (B.mT @ x.U), x.V + C @ (D.mT @ x.V), x.ranks)

    def _matrices(self, features: Tensor) -> tuple[Tensor, ...]:
        (du, dv), k = self.d, self.rank
        out = self.net(features)
        parts = out.split([k * du, k * du, k * dv, k * dv], dim=-1)
        return tuple(p.unflatten(-1, (-1, k)) for p in parts)  # (N, M, d, k) each


def normalised(I: Tensor) -> Tensor:  # noqa: E741
    """(N, M, p, q) -> (N, M, p q + 1): invariants over their norm across all modules, and its logarithm.

    Each entry comes out with a mean square of 1. An all-zero LoRA gives zeros and a finite logarithm.
    """
    N, M, p, q = I.shape
    I = I.flatten(2)  # noqa: E741
    tiny = torch.finfo(I.dtype).tiny
    # Scaled by the largest entry first: squares of factors near 1e-20 would underflow.
    peak = I.detach().abs().amax((1, 2), keepdim=True).clamp(min=tiny**0.5)
    I = I / peak  # noqa: E741
    size = (I.square().mean((1, 2), keepdim=True) + 1e-12).sqrt()  # (N, 1, 1)
    logarithm = (peak * size).log().expand(N, M, 1) / 4
    return torch.cat([I / size, logarithm], dim=-1)


def _check(x: Latent, M: int, d: tuple[int, int]) -> None:
    if x.U.shape[1] != M or x.d != d:
        raise ShapeError(
            f"latent: found {x.U.shape[1]} modules of {x.d} rows, wanted {M} modules of {d} rows"
        )
