"""lolgen's reader where the base is at hand: the shipped `Predictor`, which listens at the rare words."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from lolgen.errors import ShapeError
from lolgen.lora import Batch
from lolgen.predictor import Predictor, PredictorConfig
from lolgen.tasks.reader import FULL, Budget, Classes, Config, Layout, Reader, layout_of


def fit(
    train: Batch,
    y: Tensor,
    validation: Batch,
    y_val: Tensor,
    classes: Mapping[str, int] | Layout,
    seed: int = 0,
    *,
    directions: Tensor,
    config: Config | None = None,
    budget: Budget = FULL,
) -> Reader:
    """See `lolgen.tasks.reader.Fit`; `directions` (words, tokens, in): see `lolgen.tasks.directions`.

    The ridge's penalty is chosen on validation inside the predictor; the networks have no choice to make.
    """
    layout = layout_of(classes)
    if not isinstance(layout, Classes):
        raise ShapeError("the attribute predictor reads classes, found numbers")
    words, tokens, inputs = directions.shape
    values = {name: tuple(str(i) for i in range(n)) for name, n in layout.counts.items()}
    model = Predictor.train_on(
        train,
        layout.check(train, y),
        validation,
        layout.check(validation, y_val),
        directions,
        PredictorConfig(values, words=words, tokens=tokens, inputs=inputs),
        seed=seed,
        epochs=max(1, round(60 * budget.epochs)),
    )

    def scores(batch: Batch) -> Tensor:
        return torch.cat(list(model.probabilities(batch).values()), 1).clamp(min=1e-9).log()

    return Reader(layout, scores, torch.ones(len(layout)), dict(config or {}))
