"""The velocity field of the generator: O(r)-equivariant, conditioned, the same weights for every rank."""

from __future__ import annotations

from dataclasses import dataclass
from math import log

import torch
from torch import Tensor, nn

from lolgen.errors import ShapeError
from lolgen.lora import Spec
from lolgen.nn.orthogonal import Gram, upper
from lolgen.nn.pretrained import Pretrained
from lolgen.nn.tokens import ModuleNet


@dataclass(frozen=True)
class VelocityFieldConfig:
    d_u: int = 32
    d_v: int = 32
    condition: int = 0
    """C, the length of the condition vector."""
    p: int = 16
    """A module's Gram invariants are p x p."""
    rank: int = 8
    """Rank of the two products A B^T and C E^T."""
    width: int = 128
    depth: int = 2
    heads: int = 4
    dropout: float = 0.0

    @property
    def D(self) -> int:
        return self.d_u + self.d_v


class VelocityField(Pretrained):
    """v(X, t, c) = (diag(g) + A B^T) X + C polar(E^T X) per module, X (N, M, D, r) a balanced latent [U; V].

    g (D), A, B, C and E (D, rank) of a module are functions of the invariants of all modules (Gram matrices
    P X (P X)^T and row norms, per column), of t, c and the rank, through a transformer with one token per
    module. With one orthogonal Q per module v(X Q) = v(X) Q; zero columns stay zero. Starts at v = 0.

    The polar term is what paths of aligned noise ask for: noise X on its way to Y meets it in the frame
    Y polar(Y^T X), where A B^T alone would have to learn the inverse root of a Gram matrix.

    `normalise` brings latents to entries of mean square 1 by `energy`, the training set's mean square norm of
    each row (set by `fit`); fields and noise live in that space, `denormalise` leads back. It serves every
    rank, as a row's norm, unlike its entries, does not depend on how many columns it is spread over.
    """

    Config = VelocityFieldConfig
    config: VelocityFieldConfig

    energy: Tensor

    def __init__(self, spec: Spec, config: VelocityFieldConfig | None = None) -> None:
        super().__init__(spec, config or VelocityFieldConfig())
        c, M = self.config, len(spec)
        self.gram = Gram(spec, c.D, c.p)
        self.time = nn.Sequential(nn.Linear(c.width, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
        self.condition = (
            nn.Sequential(nn.Linear(c.condition, c.width), nn.SiLU(), nn.Linear(c.width, c.width))
            if c.condition
            else None
        )
        self.activation = nn.SiLU()
        self.rank = nn.Parameter(torch.zeros(c.width))  # times log2 of the mean rank
        self.net = ModuleNet(
            M, c.p * (c.p + 1) // 2 + 1 + c.D, c.D * (1 + 4 * c.rank),
            width=c.width, depth=c.depth, heads=c.heads, dropout=c.dropout, conditioned=True,
        )  # fmt: skip
        assert self.net.out is not None
        with torch.no_grad():
            self.net.out.weight[..., : c.D * (1 + 2 * c.rank)] = 0  # g, A and C
            self.net.out.weight[..., c.D * (1 + 2 * c.rank) :] /= c.D**0.5
        self.register_buffer("energy", torch.ones(M, c.D))

    @torch.no_grad()
    def fit(self, X: Tensor) -> None:
        """Take the training set's balanced latents (N, M, D, r), of any ranks padded with zeros."""
        energy = X.double().square().sum(-1).mean(0)  # (M, D)
        # Rows that never move (past a module's own size) keep their scale rather than divide by zero.
        floor = energy.mean() * 1e-12
        self.energy.copy_(torch.where(energy > floor, energy, torch.ones_like(energy)))

    def normalise(self, X: Tensor, ranks: Tensor) -> Tensor:
        """Latents (N, M, D, r) of true ranks (N, M) -> entries of mean square 1 within the rank."""
        return X * self._factor(ranks)

    def denormalise(self, X: Tensor, ranks: Tensor) -> Tensor:
        return X / self._factor(ranks)

    def _factor(self, ranks: Tensor) -> Tensor:
        return (ranks[..., None] / self.energy).sqrt()[..., None]  # (N, M, D, 1)

    def forward(self, X: Tensor, t: Tensor, c: Tensor | None = None, ranks: Tensor | None = None) -> Tensor:
        """X (N, M, D, r), t (N,) in [0, 1], c (N, C), true ranks (N, M) -> velocities (N, M, D, r).

        Without `ranks` all r columns count. ShapeError when c is missing or of another length.
        """
        config = self.config
        if ranks is None:
            ranks = torch.full(X.shape[:2], X.shape[-1], device=X.device)
        out = self.net(self._invariants(X, ranks), self._condition(X, t, c, ranks))
        g, factors = out.split([config.D, 4 * config.D * config.rank], dim=-1)
        A, C, B, E = factors.unflatten(-1, (4, config.D, config.rank)).unbind(2)  # (N, M, D, rank) each
        # Normalised data have rows of square norm r, and so have the rows of this.
        frame = polar(E.mT @ X) * ranks[..., None, None].to(X).sqrt()
        return g[..., None] * X + A @ (B.mT @ X) + C @ frame

    def _invariants(self, X: Tensor, ranks: Tensor) -> Tensor:
        """(N, M, p (p + 1) / 2 + 1 + D): Gram over its mean diagonal, the log of that, log row norms."""
        columns = ranks[..., None].to(X)  # (N, M, 1)
        G = self.gram(X)
        level = G.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None] / columns  # (N, M, 1)
        # Entries are about 1 where the field is trained; a module near zero is not blown up to that.
        shape = upper(G) / columns / (level + 1e-2)
        rows = X.square().sum(-1) / columns
        return torch.cat([shape, torch.log1p(level), torch.log1p(rows)], dim=-1)

    def _condition(self, X: Tensor, t: Tensor, c: Tensor | None, ranks: Tensor) -> Tensor:
        wanted = (len(X), self.config.condition)
        found = (len(X), 0) if c is None else tuple(c.shape)
        if found != wanted:
            raise ShapeError(f"condition: found {found}, wanted {wanted}")
        total = self.time(waves(t, self.config.width).to(X))
        if self.condition is not None:
            total = total + self.condition(c)
        mean = ranks.to(X).mean(1, keepdim=True).log2()  # (N, 1)
        return self.activation(total + mean * self.rank)


def polar(Z: Tensor, steps: int = 5) -> Tensor:
    """Nearly the polar factor of Z (..., k, r), by Newton-Schulz steps: smooth, also where Z is singular.

    Singular values are brought near 1, but those far below the largest stay small. polar(Z Q) = polar(Z) Q for
    orthogonal Q, and zero columns stay zero: each step multiplies from the left.
    """
    Z = Z / (Z.square().sum((-2, -1), keepdim=True) + 1e-4).sqrt()
    for _ in range(steps):
        Z = 1.5 * Z - 0.5 * (Z @ Z.mT) @ Z
    return Z


def waves(t: Tensor, width: int) -> Tensor:
    """cos and sin of t (N,) in [0, 1] at frequencies from 1 to 1000, (N, width)."""
    half = width // 2
    frequency = torch.exp(torch.linspace(0, log(1000), half, dtype=t.dtype, device=t.device))
    angle = t[:, None] * frequency
    return torch.nn.functional.pad(torch.cat([angle.cos(), angle.sin()], dim=-1), (0, width - 2 * half))
