"""Kernel ridge regression onto one-vs-rest targets, closed form, several attributes at once."""

from __future__ import annotations

import torch
from torch import Tensor

from lolgen.tasks.reader import Layout


def coefficients(K: Tensor, y: Tensor, classes: Layout, ridge: float) -> tuple[Tensor, Tensor]:
    """Dual weights (N, C) and offsets (C,): scores are `K(new, train) @ weights + offsets`.

    Targets are 1 for the class and 0 for the others of its attribute, less their mean. `ridge` is in units of
    the mean diagonal of K (N, N). LoRAs without a label of an attribute have weight 0 for its classes.
    """
    targets, seen = classes.targets(y), classes.seen(y)
    offsets = targets.sum(0) / seen.sum(0).clamp(min=1)
    weights = torch.zeros_like(targets)
    lift = ridge * K.diagonal().mean()
    # Attributes that are visible in the same LoRAs share one factorisation.
    for mask in seen.T.unique(dim=0):
        columns = (mask == seen.T).all(1)
        if not mask.any():
            continue
        A = K[mask][:, mask].double()
        A.diagonal().add_(lift.clamp(min=1e-12))
        rest = (targets - offsets)[mask][:, columns].double()
        found = torch.cholesky_solve(rest, torch.linalg.cholesky(A)).float()
        weights[mask.nonzero(), columns.nonzero()[:, 0]] = found
    return weights, offsets
