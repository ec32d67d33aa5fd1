"""Dataset size: of how many styles a LoRA was trained, 1 to 10, as classes. Styles zoo, split by subset; loss
cross-entropy, metric accuracy. (The one subset of ten styles is in the train split.)"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lolgen import pictures
from lolgen.tasks.paper.task import Data, Task, splits
from lolgen.tasks.reader import Classes
from lolgen.zoo.zoo import ROW, Zoo


def labels(rows: list[ROW]) -> Tensor:
    """(N, 1) long, number of styles less one."""
    return torch.tensor([[sum(r["labels"]) - 1] for r in rows])


def load(zoos: Path) -> Data:
    train, validation, test = splits(Zoo.open(zoos / "styles"), labels)
    layout = Classes({"dataset_size": len(pictures.STYLES)})
    return Data(layout, train, validation, {"dataset_size": test})


TASK = Task("dataset_size", "Dataset size (1 to 10 styles)", ("styles",), load)
