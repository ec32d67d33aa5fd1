"""What a task of the table is: labelled splits of a zoo, and the rows that a fit on them fills."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolgen.errors import LolgenError
from lolgen.lora import Batch
from lolgen.tasks.reader import Layout
from lolgen.zoo.zoo import ROW, Zoo

Labelled = tuple[Batch, Tensor]


@dataclass(frozen=True)
class Data:
    """The splits of a task. `tests`: row of the table -> LoRAs and labels; the first is the task's own test split."""

    layout: Layout
    train: Labelled
    validation: Labelled
    tests: dict[str, Labelled]


@dataclass(frozen=True)
class Task:
    """`load(zoos)` reads the data from the folder of all zoos; `zoos`: the folders there that it needs, `optional`:
    those that some of its rows need, `files`: what results depend on in them.

    `parts`: whether each label has a row of its own beside their mean. `sizes`: numbers of training LoRAs to fit on,
    None for all. `hears`: whether lolgen's reader may listen at the base's text states (the base is at hand). `metric`:
    accuracy, tau or auroc.
    """

    name: str
    title: str
    zoos: tuple[str, ...]
    load: Callable[[Path], Data]
    metric: str = "accuracy"
    parts: bool = False
    sizes: tuple[int | None, ...] = (None,)
    hears: bool = True
    optional: tuple[str, ...] = field(default=())
    files: tuple[str, ...] = ("zoo.json", "index.jsonl", "shard-*.safetensors")

    def missing(self, zoos: Path) -> list[str]:
        """The zoos that are not there."""
        return [z for z in self.zoos if not (zoos / z / "zoo.json").is_file()]


def splits(
    zoo: Zoo, labels: Callable[[list[ROW]], Tensor], rank: int = 4
) -> tuple[Labelled, Labelled, Labelled]:
    """Train, validation and test of one rank; LolgenError when one is empty."""
    found = []
    for name in ("train", "validation", "test"):
        part = zoo.split(name, rank)
        if not len(part):
            raise LolgenError(f"{zoo.folder}: found no LoRA of rank {rank} in the {name} split")
        found.append((part.load(), labels(part.rows)))
    return found[0], found[1], found[2]


def scores_of(zoo: Path) -> dict[str, float]:
    """`id@rank` -> CLIP score, as `train.clip_labels` wrote them; LolgenError when there are none."""
    path = zoo / "clip_scores.json"
    if not path.is_file():
        raise LolgenError(f"{path}: not found; `python -m train.clip_labels` writes it")
    report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return {str(k): float(v) for k, v in report["scores"].items()}


def labels_of(rows: list[ROW]) -> Tensor:
    """(N, attributes) long, the zoo's own labels."""
    return torch.tensor([r["labels"] for r in rows])
