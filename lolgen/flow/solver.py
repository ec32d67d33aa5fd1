"""ODE solvers dx/dt = v(x, t), and classifier-free guidance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]
"""(x (N, ...), t (N,)) -> velocities (N, ...)."""

Method = Literal["euler", "midpoint", "heun"]


def solve(
    velocity: Velocity,
    x_0: Tensor,
    *,
    steps: int = 32,
    method: Method = "midpoint",
    t_0: float = 0.0,
    t_1: float = 1.0,
) -> Tensor:
    """x at t_1, from x_0 (N, ...) at t_0, in equal steps; t_1 < t_0 goes back.

    `steps` of 1 or more. "euler" asks for one velocity a step (error of order h), "midpoint" and "heun" for
    two (order h^2). Equivariant whenever `velocity` is.
    """
    if steps < 1:
        raise ValueError(f"steps: found {steps}, wanted 1 or more")
    if method not in get_args(Method):
        raise ValueError(f"method: found {method!r}, wanted one of {', '.join(get_args(Method))}")
    x, h = x_0, (t_1 - t_0) / steps
    for i in range(steps):
        now = t_0 + i * h
        v = velocity(x, _at(now, x))
        if method == "midpoint":
            v = velocity(x + h / 2 * v, _at(now + h / 2, x))
        elif method == "heun":
            v = (v + velocity(x + h * v, _at(now + h, x))) / 2
        x = x + h * v
    return x


def _at(t: float, x: Tensor) -> Tensor:
    return torch.full((len(x),), t, dtype=x.dtype, device=x.device)


def guided(
    field: Callable[..., Tensor],
    c: Tensor,
    w: float | Tensor = 1.0,
    *,
    null: Tensor | None = None,
    **batched: Tensor,
) -> Velocity:
    """The velocity v_null + w (v_c - v_null) of a conditional field (arXiv 2207.12598).

    `field(x, t, c, **batched)`; `c` (N, C); `null` (N, C) or (C,), zeros by default; `w` one number or (N,):
    0 unconditional, 1 plain, more than 1 pushes further. `batched`: tensors with N rows that the field
    takes too (ranks). Both velocities come from one call, and from half the work where `w` is the number 1.
    """
    null = torch.zeros_like(c) if null is None else null.to(c).expand_as(c)
    both = torch.cat([c, null])
    twice = {k: torch.cat([v, v]) for k, v in batched.items()}

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        if not isinstance(w, Tensor) and w == 1:
            return field(x, t, c, **batched)
        v_c, v_null = field(torch.cat([x, x]), torch.cat([t, t]), both, **twice).chunk(2)
        weight = torch.as_tensor(w, dtype=x.dtype, device=x.device).reshape(-1, *[1] * (x.ndim - 1))
        return v_null + weight * (v_c - v_null)

    return velocity
