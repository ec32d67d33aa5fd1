"""A Gaussian process on exact Gram matrices of delta W; amplitude and noise by marginal likelihood, no net.

Beside kernel ridge (`lolgen.tasks.kernel`) the kernels are of distance, not linear, and every attribute has a noise
of its own, found on the training labels alone (Rasmussen and Williams 2006, equation 5.8); validation chooses the
kernel. Classes are regressed on, one against the rest.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lolgen.lora import Batch
from lolgen.tasks.features import cosine_gram, gram, norms
from lolgen.tasks.reader import FULL, Budget, Config, Layout, Reader, choose, layout_of

CONFIGURATIONS: list[Config] = [
    {"angle": 1, "rational": 0, "width": 2.0},
    {"angle": 1, "rational": 1, "width": 4.0},
    {"angle": 0, "rational": 0, "width": 1.0},
    {"angle": 1, "rational": 0, "width": 0.1},
]
"""`angle` 1: distances between LoRAs of size one, 0: between LoRAs as they are. `rational` 0: exp(-width d / 2), 1:
1 / (1 + width d / 2), with d the squared distance in units of its mean. A small width is nearly the cosine kernel."""
NOISES = (1e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 10.0)
"""Variance of the noise in units of the kernel's amplitude."""


def squared_distances(batch: Batch, train: Batch, angle: bool) -> Tensor:
    """|delta W - delta W'|^2 of every pair, (N, N_train), from Gram matrices; `angle`: of both over their norms."""
    other = None if batch is train else train
    if angle:
        return (2 - 2 * cosine_gram(batch, other)).clamp(min=0)
    sizes = norms(batch).square()[:, None] + norms(train).square()
    return (sizes - 2 * gram(batch, other)).clamp(min=0)


def fit(
    train: Batch,
    y: Tensor,
    validation: Batch,
    y_val: Tensor,
    classes: Mapping[str, int] | Layout,
    seed: int = 0,
    *,
    config: Config | None = None,
    budget: Budget = FULL,
) -> Reader:
    """See `lolgen.tasks.reader.Fit`; deterministic. Scores are the posterior mean; how sure it is, the common
    temperature says, as for every model."""
    layout = layout_of(classes)
    y, y_val = layout.check(train, y), layout.check(validation, y_val)

    def kernel_of(c: Config) -> Callable[[Batch], Tensor]:
        angle = bool(c["angle"])
        unit = squared_distances(train, train, angle).mean().clamp(min=1e-30)

        def kernel(batch: Batch) -> Tensor:
            d = c["width"] / 2 * squared_distances(batch, train, angle) / unit
            return 1 / (1 + d) if c["rational"] else torch.exp(-d)

        return kernel

    def one(c: Config) -> tuple[Callable[[Batch], Tensor], float]:
        kernel = kernel_of(c)
        weights, offsets = posterior(kernel(train), y, layout)

        def scores(batch: Batch) -> Tensor:
            return kernel(batch) @ weights + offsets

        return scores, layout.score(scores(validation), y_val)

    scores, chosen = choose(CONFIGURATIONS, one, config, budget)
    return Reader(layout, scores, layout.calibrate(scores(validation), y_val), chosen)


def posterior(K: Tensor, y: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Dual weights (N, C) and offsets (C,): the posterior mean is `K(new, train) @ weights + offsets`.

    Each attribute takes the noise of `NOISES` with the greatest marginal likelihood of its targets, less their mean;
    the best amplitude of each noise is known in closed form. LoRAs without its label have weight 0.
    """
    targets, seen = layout.targets(y), layout.seen(y)
    offsets = targets.sum(0) / seen.sum(0).clamp(min=1)
    weights = torch.zeros_like(targets)
    owner = torch.cat([torch.full((p.stop - p.start,), k) for k, p in enumerate(layout.slices)])
    # Attributes that are visible in the same LoRAs share their factorisations.
    for mask in seen.T.unique(dim=0):
        columns = (mask == seen.T).all(1)
        n = int(mask.sum())
        if not n:
            continue
        rest = (targets - offsets)[mask][:, columns].double()
        attributes, sizes = owner[columns].unique_consecutive(return_inverse=True)
        most = torch.full((len(attributes),), -torch.inf, dtype=torch.float64)
        found = torch.zeros_like(rest)
        for noise in NOISES:
            A = K[mask][:, mask].double()
            A.diagonal().add_(noise)
            L = torch.linalg.cholesky(A)
            solved = torch.cholesky_solve(rest, L)
            # With amplitude a: log p = -(C n log a + C log |A| + sum(fit) / a) / 2, greatest at a = sum(fit) / (C n).
            each = torch.zeros(len(attributes), dtype=torch.float64).index_add_(
                0, sizes, (rest * solved).sum(0)
            )
            count = torch.zeros_like(each).index_add_(0, sizes, torch.ones(len(sizes), dtype=torch.float64))
            amplitude = (each / (count * n)).clamp(min=1e-30)
            log_p = -0.5 * count * (n * amplitude.log() + 2 * L.diagonal().log().sum())
            better = log_p > most
            most = torch.where(better, log_p, most)
            found = torch.where(better[sizes], solved, found)
        weights[mask.nonzero(), columns.nonzero()[:, 0]] = found.float()
    return weights, offsets
