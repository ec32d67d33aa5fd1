"""The rank that a LoRA was trained at: 1 to 32, six classes, from LoRAs all padded or cut to one shape. Faces zoo, the
hundred test identities that it has at every rank, split by identity (60, 15, 25); cross-entropy, accuracy.

The rank is written in the shape of a file: a reader that is told the shape need not be fitted. Here it is padded with
zeros to rank 32, so that the task is the same for all."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lolgen.tasks.paper.ranks import RANKS
from lolgen.tasks.paper.task import Data, Labelled, Task
from lolgen.tasks.reader import Classes
from lolgen.zoo.zoo import ROW, Zoo


def labels(rows: list[ROW]) -> Tensor:
    """(N, 1) long."""
    return torch.tensor([[RANKS.index(r["rank"])] for r in rows])


def load(zoos: Path) -> Data:
    zoo = Zoo.open(zoos / "faces").split("test", None)
    common = set.intersection(*[{r["id"] for r in zoo if r["rank"] == rank} for rank in RANKS])
    names = sorted(common)

    def part(start: int, stop: int) -> Labelled:
        keep = set(names[start * len(names) // 100 : stop * len(names) // 100])
        rows = zoo.select(lambda r: r["id"] in keep)
        return rows.load().padded(max(RANKS)), labels(rows.rows)

    return Data(Classes({"rank": len(RANKS)}), part(0, 60), part(60, 75), {"recipe_rank": part(75, 100)})


TASK = Task("rank", "Rank (1 to 32)", ("faces",), load)
