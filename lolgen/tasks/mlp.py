"""The flattened MLP of the paper (arXiv 2410.04207, section 4): entries of U and V, no symmetry respected."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lolgen.lora import Batch
from lolgen.tasks.reader import FULL, Budget, Config, Layout, Reader, choose, layout_of
from lolgen.tasks.training import apply, mlp, train_net

CONFIGURATIONS: list[Config] = [
    {"hidden": 64, "lr": 1e-3},
    {"hidden": 256, "lr": 1e-3},
    {"hidden": 64, "lr": 3e-3},
    {"hidden": 256, "lr": 3e-4},
]


def flatten(batch: Batch) -> Tensor:
    """Every entry of U and V, scale folded into U: (N, sum of (out + in_flat) r)."""
    return torch.cat([t.flatten(1) for g in batch.groups for t in (g.U, g.V)], dim=1)


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
    """See `lolgen.tasks.reader.Fit`. Every entry is standardised by its training mean and deviation.

    A batch of lower rank is padded to the training rank; one of higher rank has entries the net has no place for,
    and is truncated in its own gauge: the model knows no better.
    """
    layout = layout_of(classes)
    y, y_val = layout.check(train, y), layout.check(validation, y_val)
    rank = train.rank
    raw = flatten(train)
    mean, std = raw.mean(0), raw.std(0)
    std = torch.where(std > 0, std, torch.ones_like(std))

    def features(batch: Batch) -> Tensor:
        return (flatten(to_rank(batch, rank)) - mean) / std

    x, x_val = (raw - mean) / std, features(validation)

    def one(c: Config) -> tuple[torch.nn.Module, float]:
        return train_net(
            lambda: mlp(x.shape[1], int(c["hidden"]), layout.total, dropout=0.2),
            x, y, x_val, y_val, layout, seed=seed, lr=c["lr"], budget=budget, epochs=40,
        )  # fmt: skip

    net, chosen = choose(CONFIGURATIONS, one, config, budget)
    temperature = layout.calibrate(apply(net, x_val), y_val)
    return Reader(layout, lambda batch: apply(net, features(batch)), temperature, chosen)


def to_rank(batch: Batch, rank: int) -> Batch:
    """The batch padded with zero columns to `rank`, or cut to its first `rank` columns in its own gauge."""
    if batch.rank <= rank:
        return batch.padded(rank)
    return batch.map(lambda U, V: (U[..., :rank], V[..., :rank]), ranks=batch.ranks.clamp(max=rank))
