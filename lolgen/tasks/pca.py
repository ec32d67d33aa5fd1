"""PCA of flattened factors and a linear readout, as weights2weights sees LoRAs (flatten, standardise, PCA)."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lolgen.lora import Batch
from lolgen.tasks.features import Components, memoised, standard
from lolgen.tasks.mlp import flatten, to_rank
from lolgen.tasks.reader import FULL, Budget, Config, Layout, Reader, choose, layout_of
from lolgen.tasks.ridge import coefficients

CONFIGURATIONS: list[Config] = [
    {"components": 512, "ridge": 0.1},
    {"components": 128, "ridge": 0.1},
    {"components": 512, "ridge": 1.0},
    {"components": 128, "ridge": 0.01},
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
    """See `lolgen.tasks.reader.Fit`; deterministic. Components are exact, by the Gram trick; other ranks are padded or
    cut, as in the MLP."""
    layout = layout_of(classes)
    y, y_val = layout.check(train, y), layout.check(validation, y_val)
    rank = train.rank
    raw = flatten(train)
    mean, std = standard(raw)
    raw = (raw - mean) / std
    most = max(int(c["components"]) for c in (CONFIGURATIONS if config is None else [config]))
    into = raw.T @ Components.fit(raw @ raw.T, most).directions  # (D, k), orthonormal columns
    x = raw @ into
    features = memoised(lambda batch: ((flatten(to_rank(batch, rank)) - mean) / std) @ into)
    x_val = features(validation)

    def one(c: Config) -> tuple[tuple[Tensor, Tensor], float]:
        z = x[:, : int(c["components"])]
        dual, offsets = coefficients(z @ z.T, y, layout, c["ridge"])
        weights = z.T @ dual
        return (weights, offsets), layout.score(x_val[:, : len(weights)] @ weights + offsets, y_val)

    (weights, offsets), chosen = choose(CONFIGURATIONS, one, config, budget)

    def scores(batch: Batch) -> Tensor:
        return features(batch)[:, : len(weights)] @ weights + offsets

    return Reader(layout, scores, layout.calibrate(scores(validation), y_val), chosen)
