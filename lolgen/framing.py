"""The gauge of one pair for the delta W of another: what makes an edit of re-gauged factors the re-gauged edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lolgen import gl
from lolgen.lora import Batch, Group

Truncate = Callable[[Tensor, Tensor, Sequence[int], Tensor, int], tuple[Tensor, Tensor]]
"""(U, V, the modules of a group, ranks (N, modules), r) -> the pairs cut to these ranks, padded to r columns."""


def in_frame(U: Tensor, V: Tensor, V0: Tensor, rank: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The pair of delta W = U V^T in the gauge of factors whose right half is V0.

    U (..., m, r), V (..., n, r), V0 (..., n, r); `rank` (...) long: columns of V0 at or past it are padding, and so
    are those of the result (delta W must have no more than that rank). With V0 = Q R, Q orthonormal, a gauge g of
    the input changes Q R into (Q O^T)(O R g^T), O orthogonal. With delta W = L S W^T it is (L S P R^-T, W P R), P
    the polar factor of W^T Q: it turns into (U' g^-1, V' g^T), and for a small change V' stays near V0. Where V0 has
    no such frame (columns that depend on each other) the balanced pair is returned. Worked out in float64.
    """
    Uc, Vc = gl.canonical(U.double(), V.double())
    root = Vc.square().sum(-2, keepdim=True).sqrt()
    W = Vc / torch.where(root > 0, root, torch.ones_like(root))  # columns of singular value 0 stay zero
    Q, R = torch.linalg.qr(V0.double())
    r = V0.shape[-1]
    inside = torch.ones(*V0.shape[:-2], r, dtype=torch.bool, device=V0.device)
    if rank is not None:
        inside = torch.arange(r, device=V0.device) < rank[..., None]
    k = R.shape[-2]  # min(n, r)
    if k < r:  # more columns than rows: no frame
        return Uc.to(U), Vc.to(V)
    both = inside[..., :, None] & inside[..., None, :]
    eye = torch.eye(r, dtype=R.dtype, device=R.device)
    R = torch.where(both, R, eye)
    P = gl.polar(torch.where(both, W.mT @ Q, eye))
    size = torch.where(both, R, torch.zeros_like(R)).abs().amax((-2, -1))
    pivots = torch.where(inside, R.diagonal(dim1=-2, dim2=-1).abs(), size[..., None])
    framed = (pivots.amin(-1) > 1e-10 * size)[..., None, None]
    left = torch.linalg.solve(torch.where(framed, R, eye), (Uc * root @ P).mT).mT
    return torch.where(framed, left, Uc).to(U), torch.where(framed, W @ P @ R, Vc).to(V)


def in_frame_batch(batch: Batch, frame: Batch) -> Batch:
    """`in_frame` for every module: the delta W of `batch` in the gauges and at the ranks of `frame`, one spec."""
    groups = []
    for g, f in zip(batch.groups, frame.groups, strict=True):
        ranks = frame.ranks[:, list(f.index)]
        groups.append(Group(g.index, *in_frame(g.U, g.V, f.V, ranks)))
    return Batch(batch.spec, groups, frame.ranks)


def plain_truncate(
    U: Tensor, V: Tensor, index: Sequence[int], ranks: Tensor, rank: int
) -> tuple[Tensor, Tensor]:
    """`Truncate` by the Frobenius norm of delta W."""
    U, V = gl.truncate(U, V, min(rank, U.shape[-1]))
    inside = (torch.arange(U.shape[-1], device=U.device) < ranks[..., None])[..., None, :]
    return gl.pad(U * inside, V * inside, rank)


def moved(
    batch: Batch,
    step: Batch,
    *,
    kept: float | Tensor = 1.0,
    ranks: Tensor | None = None,
    truncate: Truncate = plain_truncate,
) -> Batch:
    """`kept` (a number, or one a LoRA, (N,)) times delta W plus that of `step`: at the ranks and in the gauges of
    `batch`, or balanced at other `ranks` (N, modules)."""
    share = torch.as_tensor(kept, dtype=batch.dtype).reshape(-1, 1, 1, 1)
    wanted = batch.ranks if ranks is None else ranks
    groups = []
    for g, s in zip(batch.groups, step.groups, strict=True):
        U, V = torch.cat([share * g.U, s.U], -1), torch.cat([g.V, s.V], -1)
        groups.append(Group(g.index, *truncate(U, V, g.index, wanted[:, list(g.index)], int(wanted.max()))))
    made = Batch(batch.spec, groups, wanted)
    return in_frame_batch(made, batch) if torch.equal(wanted, batch.ranks) else gl.balance_batch(made)
