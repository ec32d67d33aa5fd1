"""The paper's MLP(SVD): the singular values of every module (arXiv 2410.04207, section 4)."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lolgen import gl
from lolgen.lora import Batch
from lolgen.tasks.features import memoised
from lolgen.tasks.reader import FULL, Budget, Config, Layout, Reader, choose, layout_of
from lolgen.tasks.training import apply, mlp, train_net

CONFIGURATIONS: list[Config] = [
    {"hidden": 256, "lr": 3e-3},
    {"hidden": 64, "lr": 3e-3},
    {"hidden": 256, "lr": 1e-3},
    {"hidden": 64, "lr": 1e-2},
]


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
    """See `lolgen.tasks.reader.Fit`. Values and their logarithms, standardised; ranks above the training rank are
    cut, lower ones count as zeros."""
    layout = layout_of(classes)
    y, y_val = layout.check(train, y), layout.check(validation, y_val)
    rank = train.rank
    raw = gl.spectrum_batch(train)[..., :rank]
    floor = 1e-3 * raw.mean().clamp(min=1e-30)

    def both(s: Tensor) -> Tensor:
        s = torch.nn.functional.pad(s[..., :rank], (0, max(0, rank - s.shape[-1]))).flatten(1)
        return torch.cat([s, (s + floor).log()], dim=1)

    x = both(raw)
    mean, std = x.mean(0), x.std(0)
    std = torch.where(std > 0, std, torch.ones_like(std))
    features = memoised(lambda batch: (both(gl.spectrum_batch(batch)) - mean) / std)
    x, x_val = (x - mean) / std, features(validation)

    def one(c: Config) -> tuple[torch.nn.Module, float]:
        return train_net(
            lambda: mlp(x.shape[1], int(c["hidden"]), layout.total),
            x, y, x_val, y_val, layout, seed=seed, lr=c["lr"], budget=budget,
        )  # fmt: skip

    net, chosen = choose(CONFIGURATIONS, one, config, budget)
    temperature = layout.calibrate(apply(net, x_val), y_val)
    return Reader(layout, lambda batch: apply(net, features(batch)), temperature, chosen)
