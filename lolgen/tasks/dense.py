"""The dense baseline: a linear map or an MLP on the flattened delta W (arXiv 2410.04207, section 4).

The flattened delta W of 1,600 LoRAs need not fit in memory, and need not be formed: a net whose first layer starts
in the span of the training rows stays there, so it may as well read their coordinates on all principal components,
which follow from the Gram matrix. That is a rotation of the input, and loses nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lolgen.lora import Batch
from lolgen.tasks.features import Components, gram
from lolgen.tasks.reader import FULL, Budget, Config, Layout, Reader, choose, layout_of
from lolgen.tasks.training import apply, mlp, train_net

CONFIGURATIONS: list[Config] = [
    {"hidden": 0, "lr": 3e-3},
    {"hidden": 512, "lr": 1e-3},
    {"hidden": 0, "lr": 1e-2},
    {"hidden": 256, "lr": 1e-3},
]
"""`hidden` 0 is the linear map."""


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
    """See `lolgen.tasks.reader.Fit`. One common factor brings the coordinates to unit mean square."""
    layout = layout_of(classes)
    y, y_val = layout.check(train, y), layout.check(validation, y_val)
    components = Components.fit(gram(train))
    size = components.variance.mean().sqrt().clamp(min=1e-30)

    def features(batch: Batch) -> Tensor:
        return components.scores(gram(batch, None if batch is train else train)) / size

    x, x_val = features(train), features(validation)

    def one(c: Config) -> tuple[torch.nn.Module, float]:
        return train_net(
            lambda: mlp(x.shape[1], int(c["hidden"]), layout.total, dropout=0.2),
            x, y, x_val, y_val, layout, seed=seed, lr=c["lr"], budget=budget,
        )  # fmt: skip

    net, chosen = choose(CONFIGURATIONS, one, config, budget)
    temperature = layout.calibrate(apply(net, x_val), y_val)
    return Reader(layout, lambda batch: apply(net, features(batch)), temperature, chosen)
