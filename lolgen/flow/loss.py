"""The flow-matching loss on balanced latents."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from lolgen.flow.path import align, column_mask, gaussian, linear_path


def flow_loss(
    velocity: Callable[[Tensor, Tensor], Tensor],
    x_1: Tensor,
    *,
    ranks: Tensor | None = None,
    weight: Tensor | None = None,
    x_0: Tensor | None = None,
    t: Tensor | None = None,
    aligned: bool = True,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Mean square of velocity(x_t, t) - dx_t for data x_1 (N, M, D, r), one number per LoRA: (N,).

    (arXiv 2210.02747, equation 23, on linear paths.) The mean is over entries within `ranks` (N, M), each
    times `weight` (broadcast to (N, M, D, 1)) if given. `x_0` and `t` are drawn where not given; with
    `aligned` the noise is first rotated to the data (`align`).
    """
    N, M, D, r = x_1.shape
    if x_0 is None:
        x_0 = gaussian(N, M, D, r, ranks=ranks, generator=generator, dtype=x_1.dtype, device=x_1.device)
    if t is None:
        t = sample_t(N, generator=generator).to(x_1)
    if aligned:
        x_0 = align(x_0, x_1, ranks)
    path = linear_path(x_0, x_1, t)
    error = (velocity(path.x_t, path.t) - path.dx_t).square()
    if weight is not None:
        error = error * weight
    if ranks is None:
        return error.mean((1, 2, 3))
    inside = column_mask(ranks, r)[:, :, None]  # (N, M, 1, r)
    return (error * inside).sum((1, 2, 3)) / (D * ranks.sum(1).clamp(min=1))


def sample_t(
    N: int,
    how: Literal["uniform", "logit_normal"] = "uniform",
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """N times in (0, 1), stratified when uniform (one in each N-th, in random order); or the logistic of unit
    normals (arXiv 2403.03206)."""
    if how == "logit_normal":
        return torch.randn(N, generator=generator).sigmoid()
    return (torch.randperm(N, generator=generator) + torch.rand(N, generator=generator)) / max(N, 1)


def drop_condition(
    c: Tensor, p: float, *, null: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """c (N, C) with each row replaced by `null` (C,), zeros by default, with probability p.

    Training on it is what classifier-free guidance (`guided`) needs.
    """
    dropped = (torch.rand(len(c), 1, generator=generator) < p).to(c.device)
    return torch.where(dropped, torch.zeros_like(c) if null is None else null.to(c).expand_as(c), c)
