"""The paper's O-Align + MLP (arXiv 2410.04207, section 4): factors turned onto one template, then the flattened MLP.

Per module, an orthogonal Q makes [U; V] Q nearest to the template's [U0; V0]. That takes away O(r) alone: a gauge that
stretches still changes what the net reads.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lolgen import gl
from lolgen.lora import Batch
from lolgen.tasks.features import memoised, standard
from lolgen.tasks.reader import FULL, Budget, Config, Layout, Reader, choose, layout_of
from lolgen.tasks.training import apply, mlp, train_net

CONFIGURATIONS: list[Config] = [
    {"hidden": 256, "lr": 1e-3},
    {"hidden": 64, "lr": 3e-3},
    {"hidden": 256, "lr": 3e-4},
    {"hidden": 64, "lr": 1e-3},
]


def align(batch: Batch, template: Batch) -> Tensor:
    """Every entry of U Q and V Q, (N, sum of (out + in_flat) r), r the rank of the template (a batch of one LoRA).

    A batch of lower rank keeps its delta W; of one of higher rank only the r columns that fit the template best are
    kept, whatever rotation it came in.
    """
    found = []
    for g, t in zip(batch.groups, template.groups, strict=True):
        Q = gl.procrustes(g.U, g.V, t.U, t.V)
        found += [(g.U @ Q).flatten(1), (g.V @ Q).flatten(1)]
    return torch.cat(found, dim=1)


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
    """See `lolgen.tasks.reader.Fit`. The template is a training LoRA drawn by the seed, as it is."""
    layout = layout_of(classes)
    y, y_val = layout.check(train, y), layout.check(validation, y_val)
    generator = torch.Generator().manual_seed(seed)
    template = train[int(torch.randint(len(train), (1,), generator=generator))]
    raw = align(train, template)
    mean, std = standard(raw)
    features = memoised(lambda batch: (align(batch, template) - mean) / std)
    x, x_val = (raw - mean) / std, features(validation)

    def one(c: Config) -> tuple[torch.nn.Module, float]:
        return train_net(
            lambda: mlp(x.shape[1], int(c["hidden"]), layout.total, dropout=0.2),
            x, y, x_val, y_val, layout, seed=seed, lr=c["lr"], budget=budget, epochs=40,
        )  # fmt: skip

    net, chosen = choose(CONFIGURATIONS, one, config, budget)
    temperature = layout.calibrate(apply(net, x_val), y_val)
    return Reader(layout, lambda batch: apply(net, features(batch)), temperature, chosen)
