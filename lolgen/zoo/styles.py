"""The plan of the styles zoo: two LoRAs for every non-empty subset of the ten styles, as the paper's Imagenette zoo.

Labels are ten bits. A subset is in one split alone, and the pictures of different splits are different ones, so that a
reader is asked for combinations and pictures that it never saw.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from itertools import combinations

import numpy as np
import torch

from lolgen import pictures
from lolgen.zoo.plan import ROW, Plan, number_of
from lolgen.zoo.training import Recipe

SUBJECT = "sks thing"
POOL = 200
"""Pictures of each style that the LoRAs of one split draw from."""


@dataclass(frozen=True)
class StylesPlan(Plan):
    """`per_subset` LoRAs for every subset of at most `styles` styles; `counts` and `ranks` are not used."""

    name: str = "styles"
    counts: dict[str, int] = field(default_factory=dict)
    ranks: tuple[int, ...] = ()
    targets: tuple[str, ...] = ("attn2.to_q", "attn2.to_v")
    steps: tuple[int, ...] = (60,)
    lrs: tuple[float, ...] = (0.006,)
    subjects: tuple[str, ...] = (SUBJECT,)
    pictures: int = 48
    batch: int = 4
    prior_batch: int = 1
    prior_weight: float = 3.0
    styles: int = 10
    per_subset: int = 2

    def rows(self) -> list[ROW]:
        rng = np.random.default_rng([self.seed, 2])
        split = splits(self.styles, self.seed)
        found = []
        for subset in split:
            for copy in range(self.per_subset):
                recipe = Recipe(
                    rank=self.rank,
                    alpha=float(self.rank),
                    lr=float(rng.choice(self.lrs)),
                    steps=int(rng.choice(self.steps)),
                    pictures=self.pictures,
                    subject=str(rng.choice(self.subjects)),
                )
                found.append(
                    {
                        "id": "-".join(map(str, subset)) + "ab"[copy],
                        "split": split[subset],
                        "rank": self.rank,
                        "labels": [int(s in subset) for s in range(self.styles)],
                        "recipe": recipe.to_json(),
                    }
                )
        return found

    def draw(self, row: ROW) -> torch.Tensor:
        """Pictures of the row's styles in equal parts, from the pool of its split."""
        rng = np.random.default_rng(number_of(self.seed, row["id"]))
        subset = [s for s, bit in enumerate(row["labels"]) if bit]
        pools = pool(row["split"], self.styles, self.seed)
        turns = [subset[i % len(subset)] for i in range(row["recipe"]["pictures"])]
        return torch.stack([pools[s][int(rng.integers(POOL))] for s in turns])


def splits(styles: int, seed: int) -> dict[tuple[int, ...], str]:
    """Subset -> split: of every size about 72 % train, 8 % validation, 20 % test, so that each split has every size
    that has subsets enough (three or more)."""
    rng = np.random.default_rng([seed, 3])
    found = {}
    for size in range(1, styles + 1):
        subsets = list(combinations(range(styles), size))
        order = rng.permutation(len(subsets))
        test, held = round(0.2 * len(subsets)), -(-len(subsets) * 8 // 100)
        if len(subsets) < 3:
            test = held = 0
        for place, k in enumerate(order):
            split = "test" if place < test else "validation" if place < test + held else "train"
            found[subsets[k]] = split
    return found


@cache
def pool(split: str, styles: int, seed: int) -> list[torch.Tensor]:
    """For each style POOL pictures, uint8 (POOL, 3, H, W), of one split."""
    rng = np.random.default_rng([seed, 4, ["train", "validation", "test"].index(split)])
    return [
        torch.from_numpy(np.stack([pictures.draw_style(s, rng) for _ in range(POOL)])) for s in range(styles)
    ]
