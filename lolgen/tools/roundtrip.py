"""How far one LoRA is from another, module by module: what a written file is checked with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from lolgen.lora import Factors, LoRA


@dataclass(frozen=True)
class Error:
    """|delta W - wanted| / |wanted| over all modules (`relative`), and the module where that is largest (`worst`, and
    its own relative error `worst_relative`). A module that only one of the two has counts as zero in the other."""

    relative: float
    worst: str
    worst_relative: float


def error(wanted: LoRA, found: LoRA, *, progress: bool = False) -> Error:
    """The error of `found`, exactly: from the factors in float64, delta W is never formed.

    A module that is zero where a zero was wanted has error 0, and infinity where something is there instead.
    ShapeError is not raised: modules of one name have one shape, or count as different altogether.
    """
    total = size = 0.0
    worst, largest = "", -1.0
    every = list(dict.fromkeys((*wanted.names, *found.names)))
    for name in tqdm(every, "comparing", leave=False, disable=None if progress else True):
        w, f = wanted.factors.get(name), found.factors.get(name)
        own = _norm(*_pair(w)) if w is not None else 0.0
        apart = _apart(w, f)
        relative = apart / own if own else (float("inf") if apart else 0.0)
        total, size = total + apart**2, size + own**2
        if relative > largest:
            worst, largest = name, relative
    overall = (total / size) ** 0.5 if size else (float("inf") if total else 0.0)
    return Error(overall, worst, max(largest, 0.0))


def _pair(f: Factors) -> tuple[Tensor, Tensor]:
    """(U, V) in float64; the scale comes after the cast, as it may be tiny for half precision."""
    return f.B.double() * f.scale, f.A.double().T


def _norm(U: Tensor, V: Tensor) -> float:
    """|U V^T| from Gram matrices."""
    return max(0.0, float(((U.mT @ U) * (V.mT @ V)).sum())) ** 0.5


def _apart(w: Factors | None, f: Factors | None) -> float:
    if w is None or f is None:
        one = w if w is not None else f
        return _norm(*_pair(one)) if one is not None else 0.0
    (Uw, Vw), (Uf, Vf) = _pair(w), _pair(f)
    if (len(Uw), len(Vw)) != (len(Uf), len(Vf)):
        return float("inf")
    if Vw.shape == Vf.shape and torch.equal(Vw, Vf):
        return _norm(Uw - Uf, Vw)
    # Grams of a difference would leave nothing but their rounding; orthonormal columns do not cancel.
    _, R = torch.linalg.qr(torch.cat([Vw, Vf], 1))
    return float(torch.linalg.matrix_norm(torch.cat([Uw, -Uf], 1) @ R.mT))
