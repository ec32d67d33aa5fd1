"""Cross-model generalisation: what was fitted on LoRAs of tiny-sd, asked about LoRAs of tiny-sd trained further (what
SD1.5 is to SD1.4), and about the same new identities on tiny-sd itself. Attributes, accuracy."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from lolgen.tasks.paper.task import Labelled
from lolgen.zoo.zoo import ROW, Zoo

ZOOS = {"cross_model_same_base": "faces-fresh", "cross_model_second_base": "faces-further"}


def tests(zoos: Path, labels: Callable[[list[ROW]], Tensor]) -> dict[str, Labelled]:
    """Row -> all LoRAs of its zoo; rows whose zoo is not there are left out."""
    found = {}
    for row, name in ZOOS.items():
        if (zoos / name / "zoo.json").is_file():
            zoo = Zoo.open(zoos / name).split("test")
            found[row] = (zoo.load(), labels(zoo.rows))
    return found
