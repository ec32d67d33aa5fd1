"""Straight paths from noise x_0 to data x_1, both balanced latents (N, M, D, r), and the noise itself.

O(r) acts on the right, one Q per module. It is compact and leaves Gaussian noise as it is, so noise may be
put in any frame: of all frames, `align` takes the one in which it is nearest to the data.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PathSample:
    """A point on the path: `x_t` and its velocity `dx_t` (N, M, D, r), at `t` (N,)."""

    x_t: Tensor
    dx_t: Tensor
    t: Tensor


def linear_path(x_0: Tensor, x_1: Tensor, t: Tensor) -> PathSample:
    """x_t = (1 - t) x_0 + t x_1, dx_t = x_1 - x_0 (arXiv 2210.02747, 2209.03003); t (N,) in [0, 1].

    Shapes (N, ...), any number of dimensions.
    """
    s = t.to(x_1).reshape(-1, *[1] * (x_1.ndim - 1))
    return PathSample((1 - s) * x_0 + s * x_1, x_1 - x_0, t)


def gaussian(
    N: int,
    M: int,
    D: int,
    r: int,
    *,
    ranks: Tensor | None = None,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Unit Gaussian noise (N, M, D, r), zero in columns at or past `ranks` (N, M).

    The generator is of the CPU: the draw is the same on every device.
    """
    x = torch.randn(N, M, D, r, generator=generator, dtype=dtype).to(device)
    return x if ranks is None else x * column_mask(ranks, r)[:, :, None]


def column_mask(ranks: Tensor, r: int) -> Tensor:
    """(N, M, r) bool: columns below the module's rank, for ranks (N, M)."""
    return torch.arange(r, device=ranks.device) < ranks[..., None]


@torch.no_grad()
def align(x_0: Tensor, x_1: Tensor, ranks: Tensor | None = None) -> Tensor:
    """x_0 Q with the orthogonal Q of each module that brings it nearest to x_1 (orthogonal Procrustes).

    Paths get shorter and straighter. Its orbit under O(r), all that an equivariant field sees of it, is that
    of unrotated noise. `ranks` (N, M): columns at or past them are left out. One batched SVD of r x r.
    """
    C = x_0.mT @ x_1  # (N, M, r, r)
    if ranks is not None:
        inside = column_mask(ranks, C.shape[-1])
        # The identity in the padded block keeps a rank-deficient module from rotating into it.
        C = C * (inside[..., None] & inside[..., None, :]) + torch.diag_embed((~inside).to(C))
    X, _, Yh = torch.linalg.svd(C)
    return x_0 @ (X @ Yh)
