"""Directions to project factors on, taken from data: PCA of delta W's columns and rows, by Gram algebra."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lolgen.errors import ShapeError
from lolgen.lora import Batch

Moments = Mapping[str, Tensor]
"""Module name -> S (in_flat, in_flat), E[x x^T] over the inputs x that the module sees."""

_EXACT = 3000  # largest eigenproblem that is solved in full


@torch.no_grad()
def principal_directions(
    batch: Batch, d: int, *, S: Moments | None = None, ridge: float = 1e-3
) -> tuple[list[Tensor], list[Tensor]]:
    """The best maps of d rows for these LoRAs: per group Phi (M, d, out) and Psi (M, d, in_flat), in float64.

    Phi: the top eigenvectors of `sum_n U V^T V U^T = sum_n dW dW^T`, as rows; Psi: those of
    `sum_n V U^T U V^T`. No other orthonormal Phi leaves less of |dW - Phi^T Phi dW|^2 on average.

    `S`: functional directions, for what modules really see. For a module with an entry dW is
    replaced by `dW S^1/2` in both sums (so |dW|_S is what is kept) and Psi becomes `E^T S^1/2`, whose inverse
    is `right_inverse(Psi, S)`. `ridge` times the mean eigenvalue is added to S, which may be singular.

    Where the LoRAs span fewer than d directions others orthogonal to them fill up; rows past out or in_flat
    are zero. Raises ShapeError when S does not fit its module.
    """
    Phi, Psi = [], []
    for group in batch.groups:
        phi, psi = [], []
        for j, m in enumerate(group.index):
            U, V = group.U[:, j].double(), group.V[:, j].double()
            name = batch.spec.names[m]
            root = None
            if S is not None and name in S:
                root = _root(regularised(name, S[name].to(V), V.shape[1], ridge))
                V = root @ V
            # dW = U R^T Q^T with Q orthonormal, so that U R^T has the left directions of dW, and likewise on
            # the right; the triangle instead of V^T V keeps all digits in a bad gauge.
            phi.append(_principal(_columns(U @ torch.linalg.qr(V)[1].mT), d))
            E = _principal(_columns(V @ torch.linalg.qr(U)[1].mT), d)
            psi.append(E if root is None else E @ root)
        Phi.append(torch.stack(phi))
        Psi.append(torch.stack(psi))
    return Phi, Psi


def right_inverse(P: Tensor, S: Tensor | None = None) -> Tensor:
    """W (..., n, d) with P W = 1 for P (..., d, n), the smallest in the norm tr(W^T S W).

    The transpose for orthonormal rows and no S; rows of P that are zero get a zero column.
    """
    back = P.mT if S is None else torch.linalg.solve(S, P.mT)
    return back @ torch.linalg.pinv(P @ back, hermitian=True)


def regularised(name: str, S: Tensor, n: int, ridge: float) -> Tensor:
    """S + ridge * mean eigenvalue, (n, n). ShapeError when S has another shape."""
    if S.shape != (n, n):
        raise ShapeError(f"S of module {name!r}: found {tuple(S.shape)}, wanted {(n, n)}")
    level = (S.diagonal().mean() * ridge).clamp(min=torch.finfo(S.dtype).tiny)
    return S + level * torch.eye(n, dtype=S.dtype, device=S.device)


def _root(S: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(S)
    return (vectors * values.clamp(min=0).sqrt()) @ vectors.mT


def _columns(C: Tensor) -> Tensor:
    """(N, n, k) -> (n, N k), the columns of all LoRAs side by side."""
    return C.permute(1, 0, 2).reshape(C.shape[1], -1)


def _principal(C: Tensor, d: int) -> Tensor:
    """The top d left singular vectors of C (n, K) as rows, completed to orthonormal ones, (d, n)."""
    n, K = C.shape
    if min(n, K) > _EXACT:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            E, s, _ = torch.svd_lowrank(C, q=min(d + 16, n, K), niter=6)
    elif n <= K:
        values, E = torch.linalg.eigh(C @ C.mT)
        E, s = E.flip(-1), values.flip(-1).clamp(min=0).sqrt()
    else:
        values, E = torch.linalg.eigh(C.mT @ C)
        s = values.flip(-1).clamp(min=0).sqrt()
        E = C @ E.flip(-1) / s.clamp(min=torch.finfo(s.dtype).tiny)
    # Below this a direction is rounding (the eigenvalues are squares).
    kept = min(int((s > s[:1] * 1e-7).sum()), d, n)
    E = E[:, :kept]
    rows = min(d, n)
    if kept < rows:
        generator = torch.Generator().manual_seed(0)
        more = torch.randn(n, rows - kept, generator=generator, dtype=C.dtype).to(C.device)
        E = torch.cat([E, torch.linalg.qr(torch.cat([E, more], dim=1))[0][:, kept:]], dim=1)
    peak = E.gather(0, E.abs().argmax(0, keepdim=True))
    E = E * torch.where(peak < 0, -1.0, 1.0)
    return torch.nn.functional.pad(E.mT, (0, 0, 0, d - rows))
