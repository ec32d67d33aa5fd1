"""Validation loss of a language LoRA: nats a token on held-out text of its own sources. Speeches zoo, clean LoRAs, its
splits; loss mean squared error of the standardised number, metric Kendall's tau."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lolgen.tasks.paper.speech_sources import clean
from lolgen.tasks.paper.task import Data, Task, splits
from lolgen.tasks.reader import Numbers
from lolgen.zoo.zoo import ROW, Zoo


def own_loss(row: ROW) -> float:
    """Mean over the row's own sources."""
    own = [v for v, bit in zip(row["losses"], row["labels"], strict=True) if bit]
    return sum(own) / len(own)


def labels(rows: list[ROW]) -> Tensor:
    """(N, 1)."""
    return torch.tensor([[own_loss(r)] for r in rows])


def load(zoos: Path) -> Data:
    train, validation, test = splits(Zoo.open(zoos / "speeches").select(clean), labels)
    return Data(Numbers.of(["loss"], train[1]), train, validation, {"speech_loss": test})


TASK = Task(
    "speech_loss", "Validation loss of a language LoRA", ("speeches",), load, metric="tau", hears=False
)
