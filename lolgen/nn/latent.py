"""`Latent`: what the encoder gives, one small factor pair per module, all modules stacked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lolgen import gl
from lolgen.errors import ShapeError
from lolgen.lora import Spec


@dataclass(eq=False)
class Latent:
    """N latents of M modules, in the spec's order.

    `U` (N, M, d_u, r), `V` (N, M, d_v, r): a gauge acts on them as on the LoRA's own factors. `ranks` (N, M)
    long: the true ranks; columns at or past them are zero. Raises ShapeError when the three do not fit.
    """

    U: Tensor
    V: Tensor
    ranks: Tensor

    def __post_init__(self) -> None:
        u, v = tuple(self.U.shape), tuple(self.V.shape)
        if len(u) != 4 or len(v) != 4 or (u[0], u[1], u[3]) != (v[0], v[1], v[3]):
            raise ShapeError(f"latent: found U {u}, V {v}, wanted U (N, M, d_u, r), V (N, M, d_v, r)")
        if tuple(self.ranks.shape) != u[:2]:
            raise ShapeError(f"ranks of a latent: found {tuple(self.ranks.shape)}, wanted {u[:2]}")

    @classmethod
    def split(cls, X: Tensor, d_u: int, ranks: Tensor) -> Latent:
        """The latent whose `joined` is X (N, M, d_u + d_v, r)."""
        return cls(X[:, :, :d_u], X[:, :, d_u:], ranks)

    @classmethod
    def of_products(cls, products: Tensor) -> Latent:
        """The latent whose U V^T is `products` (N, M, d, d), at rank d: not truncated, in no gauge to speak of."""
        d = products.shape[-1]
        eye = torch.eye(d, dtype=products.dtype, device=products.device).expand_as(products)
        return cls(products, eye, torch.full(products.shape[:2], d, device=products.device))

    def joined(self) -> Tensor:
        """X = [U; V], (N, M, d_u + d_v, r). Only O(r) acts on it, X -> X Q, so balance first."""
        return torch.cat([self.U, self.V], dim=2)

    def balanced(self) -> Latent:
        """The same U V^T with U^T U = V^T V in every module (`gl.balance`)."""
        return Latent(*gl.balance(self.U, self.V), self.ranks).masked()

    def canonical(self) -> Latent:
        """The same U V^T in canonical form (`gl.canonical`)."""
        return Latent(*gl.canonical(self.U, self.V), self.ranks).masked()

    def spectra(self) -> Tensor:
        """Singular values of U V^T, (N, M, r)."""
        return gl.spectrum(self.U, self.V)

    def mask(self) -> Tensor:
        """(N, M, r) bool: which columns are within the module's rank."""
        return torch.arange(self.rank, device=self.ranks.device) < self.ranks[..., None]

    def masked(self) -> Latent:
        """The latent with every column at or past the module's rank set to zero."""
        outside = ~self.mask()[:, :, None]  # (N, M, 1, r)
        return Latent(self.U.masked_fill(outside, 0), self.V.masked_fill(outside, 0), self.ranks)

    def pairs(self, spec: Spec) -> list[tuple[Tensor, Tensor]]:
        """One pair (N, modules of it, d, r) per group of the spec, as `lolgen.testing` compares them."""
        return [(self.U[:, list(index)], self.V[:, list(index)]) for _, index in spec.groups]

    @property
    def rank(self) -> int:
        """r, the rank that every module is padded to."""
        return self.U.shape[-1]

    @property
    def d(self) -> tuple[int, int]:
        """(d_u, d_v)."""
        return self.U.shape[2], self.V.shape[2]

    def __len__(self) -> int:
        return len(self.U)

    def __getitem__(self, key: slice | Sequence[int] | Tensor) -> Latent:
        """LoRAs by slice, positions or booleans."""
        return Latent(self.U[key], self.V[key], self.ranks[key])

    def to(self, *args: Any, **kwargs: Any) -> Latent:
        """As `Tensor.to` (a dtype, a device); the ranks stay long."""
        U = self.U.to(*args, **kwargs)
        return Latent(U, self.V.to(*args, **kwargs), self.ranks.to(U.device))
