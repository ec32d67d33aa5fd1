"""Exact cosines of delta W, fast: Gram matrices of the factors as they are, with a bound on what rounding cost.

`<dW1, dW2> = sum((U1^T U2) * (V1^T V2))` in float32 is wrong by about eps |U1| |V1| |U2| |V2| at most. Where that is
too much beside |dW1| |dW2|, as in a bad gauge, float64 is tried, and then `lolgen.metrics`, which takes QR first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from lolgen import metrics
from lolgen.errors import ShapeError
from lolgen.lora import LoRA

TOLERANCE = 1e-4
"""Largest bound on the error of a cosine; the errors themselves are some hundred times smaller."""


@dataclass(frozen=True)
class Likeness:
    """`cosine` of the two delta W, in [-1, 1], 0 when either is zero or they share no module; `strength`, the
    second's norm over the first's."""

    cosine: float
    strength: float


@torch.no_grad()
def likeness(a: LoRA, b: LoRA) -> Likeness:
    """How alike two LoRAs are; a module that only one has is zero in the other. ShapeError when a module has two
    shapes."""
    for name in a.names:
        if name in b.spec and a.spec[name].shape != b.spec[name].shape:
            raise ShapeError(
                f"module {name!r}: found {b.spec[name].shape} in the second, wanted {a.spec[name].shape} as in the "
                "first"
            )
    for dtype in (torch.float32, torch.float64):
        aa, size_a = _inner(a, a, dtype)
        bb, size_b = _inner(b, b, dtype)
        ab, _ = _inner(a, b, dtype)
        if not aa > 0 or not bb > 0:
            continue
        eps = torch.finfo(dtype).eps
        bound = eps * max(size_a / aa, size_b / bb)
        if bound <= TOLERANCE:
            return Likeness(max(-1.0, min(1.0, ab / (aa * bb) ** 0.5)), (bb / aa) ** 0.5)
    norms = metrics.norm(a), metrics.norm(b)
    return Likeness(metrics.cosine(a, b), norms[1] / norms[0] if norms[0] else float("inf"))


def _inner(a: LoRA, b: LoRA, dtype: torch.dtype) -> tuple[float, float]:
    """(<dW_a, dW_b>, the sum of |U_a| |V_a| |U_b| |V_b|), over shared modules."""
    total = size = 0.0
    for name, x in a.factors.items():
        y = b.factors.get(name)
        if y is None:
            continue
        left = x.B.to(dtype).T @ y.B.to(dtype)  # (r_a, r_b)
        right = x.A.to(dtype) @ y.A.to(dtype).T
        scale = x.scale * y.scale
        total += float((left.double() * right.double()).sum()) * scale
        if a is b:
            trace = left.diagonal().double().sum() * right.diagonal().double().sum()
            size += float(trace) * abs(scale)
    return total, size
