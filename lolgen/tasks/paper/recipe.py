"""The training recipe: learning rate, steps and prompt, four classes each. Faces zoo, its splits; loss cross-entropy,
metric accuracy. None of it is a function of delta W alone: readers may look at the factors as training left them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lolgen import pictures
from lolgen.tasks.paper.task import Data, Task, splits
from lolgen.tasks.reader import Classes
from lolgen.zoo.zoo import ROW, Zoo

LRS, STEPS = (0.0015, 0.003, 0.006, 0.012), (30, 40, 50, 60)


def labels(rows: list[ROW]) -> Tensor:
    """(N, 3) long."""
    return torch.tensor(
        [
            [LRS.index(c["lr"]), STEPS.index(c["steps"]), pictures.SUBJECTS.index(c["subject"])]
            for c in (r["recipe"] for r in rows)
        ]
    )


def load(zoos: Path) -> Data:
    train, validation, test = splits(Zoo.open(zoos / "faces"), labels)
    layout = Classes({"lr": len(LRS), "steps": len(STEPS), "prompt": len(pictures.SUBJECTS)})
    return Data(layout, train, validation, {"recipe": test})


TASK = Task("recipe", "Training recipe (lr, steps, prompt)", ("faces",), load, parts=True)
