"""A tiny spec of every kind of module, and LoRAs on it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lolgen import gl
from lolgen.lora import Batch, ModuleSpec, Spec
from lolgen.testing import random_lora

SPEC = Spec(
    (
        ModuleSpec("q", 7, 6),
        ModuleSpec("conv", 5, 2, (3, 3), "conv"),
        ModuleSpec("v", 7, 6),
        ModuleSpec("embed", 6, 11, kind="embedding"),
    )
)
# One module more, the same shapes in another order, one shape changed.
LONGER = Spec((*SPEC.modules, ModuleSpec("k", 7, 6)))
OTHER_SHAPE = Spec((SPEC[0], ModuleSpec("conv", 5, 2, (3, 1), "conv"), *SPEC.modules[2:]))

RANKS: dict[str, list[int | Sequence[int]]] = {
    "rank 1": [1, 1],
    "rank 3": [3, 3, 3],
    "rank above sizes": [9, 9],
    "mixed": [2, 1, (1, 4, 2, 3), 4],
}


def batch(
    ranks: Sequence[int | Sequence[int]] = (3, 3, 3),
    *,
    zero: Sequence[str] = (),
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> Batch:
    g = torch.Generator().manual_seed(seed)
    loras = [random_lora(SPEC, r, zero=zero, generator=g, dtype=torch.float64) for r in ranks]
    return Batch.stack(loras, dtype=dtype)


def awaken(module: nn.Module, seed: int = 0, size: float = 0.3) -> nn.Module:
    """Noise on every parameter: layers that start at zero would pass any test of symmetry."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p += size * torch.randn(p.shape, generator=g, dtype=torch.float64).to(p)
    return module.eval()


def rotations(N: int, M: int, r: int, ranks: Tensor | None = None, *, seed: int = 0) -> Tensor:
    """Random orthogonal matrices (N, M, r, r) in float64, the identity at or past the ranks."""
    g = torch.Generator().manual_seed(seed)
    ranks = torch.full((N, M), r) if ranks is None else ranks
    Q = torch.eye(r, dtype=torch.float64).repeat(N, M, 1, 1)
    for n in range(N):
        for m in range(M):
            k = int(ranks[n, m])
            Q[n, m, :k, :k] = gl.random_gauge(rank=k, condition=1, generator=g, dtype=torch.float64)
    return Q
