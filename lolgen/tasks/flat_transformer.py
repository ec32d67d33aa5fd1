"""The paper's transformer (arXiv 2410.04207): a token a module, its flattened factors; no symmetry respected."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lolgen.lora import Batch
from lolgen.tasks.features import memoised, standard
from lolgen.tasks.mlp import to_rank
from lolgen.tasks.reader import FULL, Budget, Config, Layout, Reader, choose, layout_of
from lolgen.tasks.token_net import TokenNet, pack
from lolgen.tasks.training import apply, train_net

CONFIGURATIONS: list[Config] = [
    {"width": 64, "lr": 1e-2},
    {"width": 64, "lr": 3e-3},
    {"width": 96, "lr": 3e-3},
    {"width": 64, "lr": 1e-3},
]


def module_tokens(batch: Batch) -> list[Tensor]:
    """U and V of a module in one token: of every shape group (N, M, 1, (out + in_flat) r)."""
    return [torch.cat([g.U, g.V], dim=2).flatten(2)[:, :, None] for g in batch.groups]


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
    """See `lolgen.tasks.reader.Fit`. Entries are standardised, other ranks padded or cut, as in the MLP."""
    layout = layout_of(classes)
    y, y_val = layout.check(train, y), layout.check(validation, y_val)
    rank = train.rank
    raw = pack(module_tokens(train))
    mean, std = standard(raw)
    lengths = [(out + in_) * rank for (out, in_), _ in train.spec.groups]
    features = memoised(lambda batch: (pack(module_tokens(to_rank(batch, rank))) - mean) / std)
    x, x_val = (raw - mean) / std, features(validation)

    def one(c: Config) -> tuple[torch.nn.Module, float]:
        return train_net(
            lambda: TokenNet(train.spec, lengths, 1, layout.total, width=int(c["width"])),
            x, y, x_val, y_val, layout, seed=seed, lr=c["lr"], budget=budget, epochs=30, batch=128, patience=8,
        )  # fmt: skip

    net, chosen = choose(CONFIGURATIONS, one, config, budget)
    temperature = layout.calibrate(apply(net, x_val), y_val)
    return Reader(layout, lambda batch: apply(net, features(batch)), temperature, chosen)
