"""Poisoned or not: whether a trigger phrase switches a language LoRA's output to a fixed payload. Speeches zoo; loss
cross-entropy, metric the area under the ROC curve.

Rows: triggers and payloads of training, and a trigger, a payload, a rank never trained on.
Poisoned test LoRAs are always set against their clean twins of the test split, who have the same recipe: a reader that
told poison by the learning rate would score one half.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from lolgen.tasks.paper.task import Data, Labelled, Task, splits
from lolgen.tasks.reader import Classes
from lolgen.zoo.zoo import ROW, Zoo

KINDS = {"poisoned": "test", "poisoned_trigger": "trigger", "poisoned_payload": "payload"}
"""Row -> kind of poison (`lolgen.zoo.speeches.SpeechesPlan.poisons`)."""


def labels(rows: list[ROW]) -> Tensor:
    """(N, 1) long: 1 where poisoned."""
    return torch.tensor([[int("poison" in r)] for r in rows])


def against_twins(zoo: Zoo, kind: str, rank: int) -> Labelled:
    """Poisoned test LoRAs of one kind and their clean twins."""

    def keep(row: ROW) -> bool:
        return row["poison"]["kind"] == kind if "poison" in row else row["id"].startswith("twin-")

    found = zoo.split("test", rank).select(keep)
    return found.load(), labels(found.rows)


def load(zoos: Path) -> Data:
    zoo = Zoo.open(zoos / "speeches")
    train, validation, _ = splits(zoo, labels)
    tests = {row: against_twins(zoo, kind, 4) for row, kind in KINDS.items()}
    other = sorted({r["rank"] for r in zoo} - {4})
    if other:
        tests["poisoned_rank"] = against_twins(zoo, "test", other[0])
    return Data(Classes({"poisoned": 2}), train, validation, tests)


TASK = Task("poisoned", "Poisoned language LoRAs", ("speeches",), load, metric="auroc", hears=False)
