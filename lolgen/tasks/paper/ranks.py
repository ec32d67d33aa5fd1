"""Rank generalisation: what was fitted at rank 4, asked about the same hundred identities at ranks 1 to 32. Loss and
metric are those of the task it is asked for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from lolgen.tasks.paper.task import Labelled
from lolgen.zoo.zoo import ROW, Zoo

RANKS = (1, 2, 4, 8, 16, 32)


def tests(zoo: Zoo, name: str, labels: Callable[[list[ROW]], Tensor]) -> dict[str, Labelled]:
    """`name@rank1` ... -> the test identities that the zoo has at every rank."""
    at = {r: zoo.split("test", r) for r in RANKS}
    if not all(len(part) for part in at.values()):
        return {}
    common = set.intersection(*[{row["id"] for row in part} for part in at.values()])
    found = {}
    for r, part in at.items():
        kept = part.select(lambda row: row["id"] in common)
        found[f"{name}@rank{r}"] = (kept.load(), labels(kept.rows))
    return found
