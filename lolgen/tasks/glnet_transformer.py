"""The paper's GL-net with a transformer head (arXiv 2410.04207, section 4), as in `lolgen.nn.glnet`."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lolgen.lora import Batch
from lolgen.nn.glnet import GLNetConfig
from lolgen.tasks.glnet import fit_glnet
from lolgen.tasks.reader import FULL, Budget, Config, Layout, Reader

CONFIGURATIONS: list[Config] = [
    {"d": 16, "hidden": 64, "lr": 3e-3},
    {"d": 16, "hidden": 64, "lr": 1e-3},
    {"d": 32, "hidden": 64, "lr": 1e-3},
    {"d": 32, "hidden": 64, "lr": 3e-3},
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
    """See `lolgen.tasks.reader.Fit`. `hidden` is the width of the tokens; one set of weights serves every rank."""

    def design(outputs: int, c: Config) -> GLNetConfig:
        return GLNetConfig(outputs, d=int(c["d"]), hidden=int(c["hidden"]), transformer=True)

    data = train, y, validation, y_val
    return fit_glnet(
        design,
        CONFIGURATIONS,
        *data,
        classes,
        seed,
        config=config,
        budget=budget,
        epochs=30,
        batch=128,
        patience=8,
    )
