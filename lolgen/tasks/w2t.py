"""W2T (2026): a transformer over rank tokens, the singular vectors of every module.

`delta W = Qu P diag(s) (Qv W)^T` by QR of both factors and an SVD of r x r; a token is [u_i sqrt(s_i); v_i sqrt(s_i)],
its sign such that the largest entry of u_i is positive. Gauge-invariant where singular values are distinct.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lolgen import gl
from lolgen.lora import Batch
from lolgen.tasks.features import memoised
from lolgen.tasks.reader import FULL, Budget, Config, Layout, Reader, choose, layout_of
from lolgen.tasks.token_net import TokenNet, pack
from lolgen.tasks.training import apply, train_net

CONFIGURATIONS: list[Config] = [
    {"width": 64, "lr": 5e-3},
    {"width": 64, "lr": 3e-3},
    {"width": 64, "lr": 1e-2},
    {"width": 64, "lr": 1e-3},
]
FLOOR = 1e-4
"""Singular values below this share of their module's largest are rounding of float32 factors in a bad gauge."""


def rank_tokens(batch: Batch, rank: int) -> list[Tensor]:
    """Tokens of every shape group, (N, M, rank, out + in_flat), by descending singular value.

    Ranks above `rank` are cut to the best approximation, lower ones have tokens of zeros.
    """
    found = []
    for g in gl.truncate_batch(batch, rank).padded(rank).groups:
        s = g.U.square().sum(2)  # (N, M, rank)
        tokens = torch.cat([g.U, g.V], dim=2).mT
        found.append(tokens * (s > FLOOR * s.amax(-1, keepdim=True))[..., None])
    return found


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
    """See `lolgen.tasks.reader.Fit`. Tokens are divided by their group's root mean square entry in training; zero
    tokens (of padding, of zero modules) are not looked at."""
    layout = layout_of(classes)
    y, y_val = layout.check(train, y), layout.check(validation, y_val)
    rank = train.rank
    raw = rank_tokens(train, rank)
    sizes = [size if size > 0 else torch.ones(()) for size in (t.square().mean().sqrt() for t in raw)]
    x = pack([t / size for t, size in zip(raw, sizes, strict=True)])
    lengths = [t.shape[-1] for t in raw]

    def tokens(batch: Batch) -> Tensor:
        return pack([t / size for t, size in zip(rank_tokens(batch, rank), sizes, strict=True)])

    features = memoised(tokens)
    x_val = features(validation)

    def one(c: Config) -> tuple[torch.nn.Module, float]:
        return train_net(
            lambda: TokenNet(
                train.spec, lengths, rank, layout.total, width=int(c["width"]), skip_zeros=True
            ),
            x, y, x_val, y_val, layout, seed=seed, lr=c["lr"], budget=budget, epochs=16, batch=64, patience=6,
        )  # fmt: skip

    net, chosen = choose(CONFIGURATIONS, one, config, budget)
    temperature = layout.calibrate(apply(net, x_val), y_val)
    return Reader(layout, lambda batch: apply(net, features(batch)), temperature, chosen)
