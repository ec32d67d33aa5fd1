"""The training recipe of a language LoRA: learning rate (quarters of its logarithmic range), epochs, batch size.
Speeches zoo, clean LoRAs, its splits; loss cross-entropy, metric accuracy.

Weight decay and dropout are not asked for: the first moves a weight by at most one part in ten thousand here.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from lolgen.tasks.paper.speech_sources import clean
from lolgen.tasks.paper.task import Data, Task, splits
from lolgen.tasks.reader import Classes
from lolgen.zoo.speeches import SpeechesPlan
from lolgen.zoo.zoo import ROW, Zoo

RATES = 4
_PLAN = SpeechesPlan()


def rate_class(lr: float) -> int:
    """Quarter of the plan's range on a logarithmic scale; rates above it count to the last."""
    low, high = (math.log(v) for v in _PLAN.lr)
    return min(RATES - 1, int(RATES * (math.log(lr) - low) / (high - low)))


def labels(rows: list[ROW]) -> Tensor:
    """(N, 3) long."""
    return torch.tensor(
        [
            [rate_class(c["lr"]), _PLAN.epochs.index(c["epochs"]), _PLAN.batches.index(c["batch"])]
            for c in (r["recipe"] for r in rows)
        ]
    )


def load(zoos: Path) -> Data:
    train, validation, test = splits(Zoo.open(zoos / "speeches").select(clean), labels)
    layout = Classes({"lr": RATES, "epochs": len(_PLAN.epochs), "batch": len(_PLAN.batches)})
    return Data(layout, train, validation, {"speech_recipe": test})


TASK = Task(
    "speech_recipe",
    "Recipe of a language LoRA (lr, epochs, batch)",
    ("speeches",),
    load,
    parts=True,
    hears=False,
)
