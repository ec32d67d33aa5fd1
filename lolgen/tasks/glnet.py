"""The paper's GL-net with linear layers (arXiv 2410.04207, section 4), as in `lolgen.nn.glnet`."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lolgen.lora import Batch
from lolgen.nn.glnet import GLNet, GLNetConfig
from lolgen.tasks.reader import FULL, Budget, Config, Layout, Reader, choose, layout_of
from lolgen.tasks.training import apply, train_net

CONFIGURATIONS: list[Config] = [
    {"d": 16, "hidden": 128, "lr": 1e-2},
    {"d": 16, "hidden": 128, "lr": 3e-3},
    {"d": 32, "hidden": 128, "lr": 3e-3},
    {"d": 32, "hidden": 128, "lr": 1e-3},
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
    """See `lolgen.tasks.reader.Fit`. One set of weights serves every rank."""

    def design(outputs: int, c: Config) -> GLNetConfig:
        return GLNetConfig(outputs, d=int(c["d"]), hidden=int(c["hidden"]))

    data = train, y, validation, y_val
    return fit_glnet(design, CONFIGURATIONS, *data, classes, seed, config=config, budget=budget)


def fit_glnet(
    design: Callable[[int, Config], GLNetConfig],
    configurations: list[Config],
    train: Batch,
    y: Tensor,
    validation: Batch,
    y_val: Tensor,
    classes: Mapping[str, int] | Layout,
    seed: int,
    *,
    config: Config | None,
    budget: Budget,
    epochs: int = 40,
    batch: int = 64,
    patience: int = 12,
) -> Reader:
    """`fit` of any GL-net: `design(outputs, configuration)` is its config."""
    layout = layout_of(classes)
    y, y_val = layout.check(train, y), layout.check(validation, y_val)

    def one(c: Config) -> tuple[torch.nn.Module, float]:
        def make() -> GLNet:
            net = GLNet(train.spec, design(layout.total, c))
            net.fit(train)
            return net

        return train_net(
            make, train, y, validation, y_val, layout,
            seed=seed, lr=c["lr"], budget=budget, epochs=epochs, batch=batch, patience=patience,
        )  # fmt: skip

    net, chosen = choose(configurations, one, config, budget)
    temperature = layout.calibrate(apply(net, validation), y_val)
    return Reader(layout, lambda batch: apply(net, batch), temperature, chosen)
