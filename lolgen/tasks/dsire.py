"""Nearest neighbours by singular values, a vote a module, as DSiRe reads the size of a data set off a LoRA."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from lolgen import gl
from lolgen.lora import Batch
from lolgen.tasks.features import memoised
from lolgen.tasks.reader import FULL, Budget, Config, Layout, Numbers, Reader, choose, layout_of

CONFIGURATIONS: list[Config] = [{"neighbours": k} for k in (15, 5, 40, 100)]
PRIOR = 1.0
"""Votes that the training average has beside the neighbours': no class is ever ruled out."""


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
    """See `lolgen.tasks.reader.Fit`; deterministic. Singular values are standardised one by one; every module has its
    own neighbours, and what they know of a label is averaged. Ranks above the training rank are cut, lower ones count
    as zeros."""
    layout = layout_of(classes)
    y, y_val = layout.check(train, y), layout.check(validation, y_val)
    rank = train.rank
    raw = gl.spectrum_batch(train)
    mean, std = raw.mean(0), raw.std(0, correction=0)
    std = torch.where(std > 0, std, torch.ones_like(std))

    def spectra(batch: Batch) -> Tensor:
        s = gl.spectrum_batch(batch)[..., :rank]
        return (pad(s, (0, rank - s.shape[-1])) - mean) / std

    features = memoised(spectra)
    x, x_val = features(train), features(validation)
    targets, seen = layout.targets(y), layout.seen(y).float()
    prior = targets.sum(0) / seen.sum(0).clamp(min=1)

    def read(new: Tensor, neighbours: int) -> Tensor:
        votes, voters = PRIOR * prior.expand(len(new), -1), torch.full((len(new), layout.total), PRIOR)
        for m in range(x.shape[1]):
            near = _distances(new[:, m], x[:, m]).topk(min(neighbours, len(x)), largest=False).indices
            votes, voters = votes + targets[near].sum(1), voters + seen[near].sum(1)
        found = votes / voters
        return found if isinstance(layout, Numbers) else found.clamp(min=1e-6).log()

    def one(c: Config) -> tuple[int, float]:
        k = int(c["neighbours"])
        return k, layout.score(read(x_val, k), y_val)

    k, chosen = choose(CONFIGURATIONS, one, config, budget)
    temperature = layout.calibrate(read(x_val, k), y_val)
    return Reader(layout, lambda batch: read(features(batch), k), temperature, chosen)


def _distances(x: Tensor, z: Tensor) -> Tensor:
    # The differences themselves: |x|^2 + |z|^2 - 2 x z would lose the nearest neighbours to rounding.
    return torch.cdist(x, z, compute_mode="donot_use_mm_for_euclid_dist")
