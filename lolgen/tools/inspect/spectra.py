"""Singular values of every module of a LoRA, fast: from the Gram matrices of its factors.

The squares of the singular values of U V^T are the eigenvalues of L^T (U^T U) L with V^T V = L L^T, all r x r.
The Gram matrices are taken in float32, what follows in float64. Rounding costs about eps |U|^2 |V|^2 of the
energy |delta W|^2, so with `loss = eps |U|^2 |V|^2 / |delta W|^2` at most `TOLERANCE` the energies are good to
that share of the total (in practice a hundredth of it); a singular value below sqrt(TOLERANCE) of the norm is
not to be trusted alone. In a bad gauge, where the loss is larger, the Gram matrices are taken again in
float64, and where that is not enough either, QR as in `lolgen.gl.spectrum` decides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lolgen import gl
from lolgen.lora import LoRA

TOLERANCE = 1e-4
"""Largest error of an energy, as a share of the module's."""


@torch.no_grad()
def singular_values(lora: LoRA) -> dict[str, Tensor]:
    """Name -> singular values of delta W, (rank,) float64, descending; the factors must be finite."""
    found: dict[str, Tensor] = {}
    alike: dict[int, list[str]] = {}
    for name, f in lora.factors.items():
        alike.setdefault(f.rank, []).append(name)
    for names in alike.values():
        left = names
        for dtype in (torch.float32, torch.float64):
            left = _by_grams(lora, left, dtype, found)
        for name in left:
            f = lora[name]
            found[name] = gl.spectrum(f.B.double() * f.scale, f.V.double())
    return {name: found[name] for name in lora.names}


def _by_grams(lora: LoRA, names: list[str], dtype: torch.dtype, found: dict[str, Tensor]) -> list[str]:
    """Fill `found`; returns the names whose loss at this dtype is too large."""
    if not names:
        return []
    grams_B = torch.stack([_gram(lora[n].B.T, dtype) for n in names])  # (M, r, r)
    grams_A = torch.stack([_gram(lora[n].A, dtype) for n in names])
    sizes = _trace(grams_B), _trace(grams_A)
    # Squares leave the range of float32 long before the numbers do.
    inside = (torch.stack(sizes) > 1e-25).all(0) & (torch.stack(sizes) < 1e30).all(0)
    grams_B, grams_A = (
        torch.where(inside[:, None, None], g, torch.zeros_like(g)) for g in (grams_B, grams_A)
    )
    L, info = torch.linalg.cholesky_ex(grams_A)
    if bool((info > 0).any()):  # singular, as where A has rows to spare
        values, vectors = torch.linalg.eigh(grams_A[info > 0])
        L[info > 0] = vectors * values.clamp(min=0).sqrt()[:, None]
    energies = torch.linalg.eigvalsh(L.mT @ grams_B @ L).flip(-1).clamp(min=0)  # (M, r)
    loss = torch.finfo(dtype).eps * sizes[0] * sizes[1] / energies.sum(-1)
    good = (inside & (loss <= TOLERANCE)).tolist()
    left = []
    for i, name in enumerate(names):
        f = lora[name]
        if good[i]:
            found[name] = energies[i].sqrt() * abs(f.scale)
        elif f.scale == 0 or not (bool(f.A.any()) and bool(f.B.any())):
            found[name] = torch.zeros(f.rank, dtype=torch.float64)
        else:
            left.append(name)
    return left


def _gram(A: Tensor, dtype: torch.dtype) -> Tensor:
    """A A^T (r, r) of A (r, n), in float64."""
    wide = A.to(dtype)
    return (wide @ wide.T).double()


def _trace(grams: Tensor) -> Tensor:
    return grams.diagonal(dim1=-2, dim2=-1).sum(-1)


def needed(values: Tensor, share: float) -> int:
    """The smallest rank that keeps this share of the energy of these singular values (r,); 0 for zeros."""
    energy = values.square()
    tail = energy.flip(0).cumsum(0).flip(0)  # what a truncation leaves out
    return int((tail > (1 - share) * tail[:1]).sum())
