"""CLIP score of the finetuned model: the mean over 33 fixed prompts (`lolgen.clip_score`). Faces zoo, its splits; loss
mean squared error of the standardised score, metric Kendall's tau."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lolgen.tasks.paper import ranks
from lolgen.tasks.paper.task import Data, Task, scores_of, splits
from lolgen.tasks.reader import Numbers
from lolgen.zoo.zoo import ROW, Zoo


def load(zoos: Path) -> Data:
    scores = scores_of(zoos / "faces")
    zoo = Zoo.open(zoos / "faces").select(lambda r: f"{r['id']}@{r['rank']}" in scores)

    def labels(rows: list[ROW]) -> Tensor:
        return torch.tensor([[scores[f"{r['id']}@{r['rank']}"]] for r in rows])

    train, validation, test = splits(zoo, labels)
    tests = {"clip_score": test} | ranks.tests(zoo, "clip_score", labels)
    return Data(Numbers.of(["clip_score"], train[1]), train, validation, tests)


TASK = Task(
    "clip_score",
    "CLIP score (33 prompts)",
    ("faces",),
    load,
    metric="tau",
    files=(*Task.files, "clip_scores.json"),
)
