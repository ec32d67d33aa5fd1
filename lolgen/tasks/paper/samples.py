"""Sample efficiency: style membership from 10, 30, 100, 300, 1,000 and all training LoRAs, the same for all models."""

from __future__ import annotations

import torch

from lolgen.tasks.paper.task import Labelled

SIZES: tuple[int | None, ...] = (None, 10, 30, 100, 300, 1000)


def subset(train: Labelled, size: int | None) -> Labelled:
    """The first `size` LoRAs of a fixed random order; all of them for None."""
    if size is None or size >= len(train[0]):
        return train
    keep = torch.randperm(len(train[0]), generator=torch.Generator().manual_seed(12))[:size]
    return train[0][keep], train[1][keep]
