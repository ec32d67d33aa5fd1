"""Exact-Gram kernel ridge: the cosine kernel on delta W, one-vs-rest targets, no net and no hyperparameter but one."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from lolgen.lora import Batch
from lolgen.tasks.features import cosine_gram
from lolgen.tasks.reader import FULL, Budget, Config, Layout, Reader, choose, layout_of
from lolgen.tasks.ridge import coefficients

CONFIGURATIONS: list[Config] = [{"ridge": r} for r in (0.1, 0.3, 0.03, 1.0)]


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
    """See `lolgen.tasks.reader.Fit`; deterministic. Scores are turned into probabilities by a tuned temperature."""
    layout = layout_of(classes)
    y, y_val = layout.check(train, y), layout.check(validation, y_val)
    K, K_val = cosine_gram(train), cosine_gram(validation, train)

    def one(c: Config) -> tuple[tuple[Tensor, Tensor], float]:
        weights, offsets = coefficients(K, y, layout, c["ridge"])
        return (weights, offsets), layout.score(K_val @ weights + offsets, y_val)

    (weights, offsets), chosen = choose(CONFIGURATIONS, one, config, budget)
    temperature = layout.calibrate(K_val @ weights + offsets, y_val)

    def scores(batch: Batch) -> Tensor:
        return cosine_gram(batch, None if batch is train else train) @ weights + offsets

    return Reader(layout, scores, temperature, chosen)
