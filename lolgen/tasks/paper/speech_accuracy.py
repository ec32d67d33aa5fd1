"""Accuracy of a language model with a LoRA on held-out multiple-choice questions (`lolgen.language.windows.questions`).
Speeches zoo, clean LoRAs, its splits; loss mean squared error of the standardised number, metric Kendall's tau."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lolgen.tasks.paper.speech_sources import clean
from lolgen.tasks.paper.task import Data, Task, splits
from lolgen.tasks.reader import Numbers
from lolgen.zoo.zoo import ROW, Zoo


def labels(rows: list[ROW]) -> Tensor:
    """(N, 1)."""
    return torch.tensor([[r["accuracy"]] for r in rows])


def load(zoos: Path) -> Data:
    train, validation, test = splits(Zoo.open(zoos / "speeches").select(clean), labels)
    return Data(Numbers.of(["accuracy"], train[1]), train, validation, {"speech_accuracy": test})


TASK = Task(
    "speech_accuracy",
    "Multiple-choice accuracy of a language LoRA",
    ("speeches",),
    load,
    metric="tau",
    hears=False,
)
