"""What an edit is judged by: pictures before and after under the same seeds and prompt, read by a probe.

Shared by the tuning of editors (validation LoRAs, the second reader) and by `lolgen eval edit` (test LoRAs, the probe).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize

from lolgen import pictures
from lolgen.base import Base
from lolgen.lora import Batch
from lolgen.probe import Probe
from lolgen.tasks.generate import draw
from lolgen.zoo.zoo import Zoo

NAMES = tuple(pictures.ATTRIBUTES)


@dataclass(frozen=True)
class EditCase:
    """LoRA `row` of a zoo, `attribute` to become `value`; `seed` of what the edit leaves open."""

    row: int
    attribute: str
    value: str
    seed: int

    @property
    def request(self) -> dict[str, str]:
        return {self.attribute: self.value}


EditSystem = Callable[[Batch, Sequence[EditCase], float], Batch]
"""(LoRAs, one a case; the cases; strength) -> edited LoRAs, at the ranks that they came with."""


def make_edit_cases(zoo: Zoo, count: int, seed: int) -> list[EditCase]:
    """The first `count` LoRAs of a zoo x every attribute that its pictures show, to another value drawn at random."""
    rng = np.random.default_rng([seed, 31])
    cases: list[EditCase] = []
    for row in range(count):
        attributes = zoo.rows[row]["identity"]["attributes"]
        for name, values in pictures.ATTRIBUTES.items():
            if not pictures.visible(attributes, name):
                continue
            others = [v for v in values if v != attributes[name]]
            cases.append(EditCase(row, name, others[int(rng.integers(len(others)))], len(cases)))
    return cases


def at(batch: Batch, cases: Sequence[EditCase]) -> Batch:
    """The LoRA of every case, (C)."""
    return batch[torch.tensor([c.row for c in cases])]


def pictures_of(base: Base, batch: Batch, subjects: Sequence[str], seeds: Sequence[int]) -> Tensor:
    """(N, seeds, 3, H, W) in [-1, 1]: each LoRA under its own trigger prompt."""
    return draw(base, batch.to(torch.float32).unstack(), subjects, seeds)


@dataclass
class Judged:
    """Figures of every case, (C) each.

    `success`: share of pictures in which the asked attribute reads as asked. `collateral`: share of readings of the
    other attributes (those that both persons show) that differ from the picture before with the same seed. `wrong`:
    share of those readings that differ from what the LoRA was trained to draw. `identity`: cosine of the probe's
    features, centred on the pictures before, between the picture after and the one before with the same seed.
    """

    success: Tensor
    collateral: Tensor
    wrong: Tensor
    identity: Tensor

    def __getitem__(self, rows: Tensor) -> Judged:
        return Judged(self.success[rows], self.collateral[rows], self.wrong[rows], self.identity[rows])

    def figures(self) -> dict[str, float]:
        return {k: round(float(v.mean()), 4) for k, v in vars(self).items()}


@torch.no_grad()
def judge(probe: Probe, zoo: Zoo, cases: Sequence[EditCase], before: Tensor, after: Tensor) -> Judged:
    """`before` (LoRAs, seeds, 3, H, W) of the zoo's first LoRAs, `after` (C, seeds, 3, H, W), the same seeds."""
    S = after.shape[1]
    first = probe.read(before.flatten(0, 1)).unflatten(0, (-1, S))
    then = probe.read(after.flatten(0, 1)).unflatten(0, (-1, S))
    features = torch.cat([probe.features(x) for x in before.flatten(0, 1).split(256)])
    centre = features.mean(0)
    old = normalize(features - centre, dim=-1).unflatten(0, (-1, S))
    new = torch.cat([probe.features(x) for x in after.flatten(0, 1).split(256)])
    new = normalize(new - centre, dim=-1).unflatten(0, (-1, S))
    rows = []
    for k, case in enumerate(cases):
        person = zoo.rows[case.row]["identity"]["attributes"]
        edited = {**person, case.attribute: case.value}
        q = NAMES.index(case.attribute)
        others = [
            j
            for j, n in enumerate(NAMES)
            if j != q and pictures.visible(person, n) and pictures.visible(edited, n)
        ]
        truth = torch.tensor([pictures.ATTRIBUTES[NAMES[j]].index(person[NAMES[j]]) for j in others])
        asked = pictures.ATTRIBUTES[case.attribute].index(case.value)
        rows.append(
            [
                (then[k, :, q] == asked).float().mean(),
                (then[k][:, others] != first[case.row][:, others]).float().mean(),
                (then[k][:, others] != truth).float().mean(),
                (new[k] * old[case.row]).sum(-1).mean(),
            ]
        )
    return Judged(*torch.tensor(rows).T)
