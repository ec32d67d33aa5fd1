"""What a zoo is to hold: who is learned, by which recipe, in which split; all of it follows from a seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lolgen import pictures
from lolgen.base import Base
from lolgen.lora import LoRA, Spec
from lolgen.precision import bf16_matmuls
from lolgen.zoo.bank import find_modules, fingerprint
from lolgen.zoo.training import Prior, Recipe, Task, make_prior, train_bank
from lolgen.zoo.zoo import ROW


@dataclass(frozen=True)
class Plan:
    """What to build. Identities, splits, recipes and pictures all follow from `seed`.

    `counts`: rank-4 LoRAs per split. `ranks`: further ranks, each for the first `per_rank` test identities.
    `steps`, `lrs`, `subjects`: one of each is drawn per LoRA, as the paper does.
    """

    name: str = "faces"
    seed: int = 0
    counts: dict[str, int] = field(default_factory=lambda: {"train": 1600, "validation": 160, "test": 240})
    rank: int = 4
    ranks: tuple[int, ...] = (1, 2, 8, 16, 32)
    per_rank: int = 100
    targets: tuple[str, ...] = ("attn2.to_v",)
    steps: tuple[int, ...] = (30, 40, 50, 60)
    lrs: tuple[float, ...] = (0.0015, 0.003, 0.006, 0.012)
    subjects: tuple[str, ...] = pictures.SUBJECTS
    pictures: int = 21
    bank: int = 40
    batch: int = 3
    prior_batch: int = 2
    prior_weight: float = 10.0
    prior_pictures: int = 2000

    def to_json(self) -> dict[str, Any]:
        return json.loads(json.dumps(self.__dict__))

    def rows(self) -> list[ROW]:
        """Labels and recipe of every LoRA, no factors yet."""
        return _faces(self)

    def draw(self, row: ROW) -> torch.Tensor:
        """The pictures of one LoRA, uint8 (N, 3, H, W); the same at every rank."""
        rng = np.random.default_rng(number_of(self.seed, row["id"]))
        identity = pictures.Identity.from_json(row["identity"])
        count = row["recipe"]["pictures"]
        return torch.from_numpy(np.stack([pictures.draw_portrait(identity, rng) for _ in range(count)]))

    def banks(self) -> list[list[ROW]]:
        """The rows of every shard, see `banks_of`."""
        return banks_of(self.rows(), self.bank, lambda r: r["recipe"]["steps"])

    def worker(self, base_folder: str | Path) -> PicturesWorker:
        """What trains the banks."""
        return PicturesWorker.of(self, base_folder)

    def prior(self, base: Base) -> Prior:
        """What the LoRAs must leave as it is."""
        return make_prior(base, self.prior_pictures, self.seed)


@dataclass
class PicturesWorker:
    """A text-to-image base model, and LoRAs of it trained on the pictures that the plan draws."""

    plan: Plan
    base: Base
    spec: Spec
    fingerprint: str

    @staticmethod
    def of(plan: Plan, base_folder: str | Path) -> PicturesWorker:
        base = Base.load(base_folder)
        spec, digest = find_modules(base.unet, plan.targets, "unet."), fingerprint(base.unet)
        if torch.cuda.is_available():
            base.to("cuda")
        else:
            bf16_matmuls(base.unet)
        return PicturesWorker(plan, base, spec, digest)

    @cached_property
    def prior(self) -> Prior:
        return self.plan.prior(self.base)

    def train(self, rows: list[ROW], number: int) -> tuple[list[LoRA], list[ROW]]:
        plan = self.plan
        tasks = [Task(Recipe(**r["recipe"]), plan.draw(r)) for r in rows]
        loras = train_bank(
            self.base, self.spec, tasks, self.prior, plan.seed * 100_003 + number,
            batch=plan.batch, prior_batch=plan.prior_batch, prior_weight=plan.prior_weight,
        )  # fmt: skip
        return loras, rows


def number_of(seed: int, name: str) -> int:
    """A seed of its own for everything that has a name."""
    return int(hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()[:12], 16)


def banks_of(rows: Iterable[ROW], size: int, length: Callable[[ROW], Any]) -> list[list[ROW]]:
    """The rows of every shard, at most `size` of one rank and split; LoRAs of equal length train side by side."""
    banks: list[list[ROW]] = []
    # Long banks last in their rank would leave a core idle: order is by rank, split, length, then as drawn.
    for r in sorted(rows, key=lambda r: (r["rank"], r["split"], length(r))):
        same = banks and (banks[-1][0]["rank"], banks[-1][0]["split"]) == (r["rank"], r["split"])
        if not same or len(banks[-1]) == size:
            banks.append([])
        banks[-1].append(r)
    return banks


def _faces(plan: Plan) -> list[ROW]:
    rng = np.random.default_rng([plan.seed, 1])
    rows: list[ROW] = []
    for split, count in plan.counts.items():
        for i in range(count):
            identity = pictures.sample_identity(rng, split)
            recipe = Recipe(
                rank=plan.rank,
                alpha=float(plan.rank),
                lr=float(rng.choice(plan.lrs)),
                steps=int(rng.choice(plan.steps)),
                pictures=plan.pictures,
                subject=str(rng.choice(plan.subjects)),
            )
            rows.append(_row(f"{split}-{i:04d}", split, identity, recipe))
    tests = [r for r in rows if r["split"] == "test"][: plan.per_rank]
    for rank in plan.ranks:
        for r in tests:
            recipe = Recipe(**{**r["recipe"], "rank": rank, "alpha": float(rank)})
            rows.append(_row(r["id"], "test", pictures.Identity.from_json(r["identity"]), recipe))
    return rows


def _row(name: str, split: str, identity: pictures.Identity, recipe: Recipe) -> ROW:
    return {
        "id": name,
        "split": split,
        "rank": recipe.rank,
        "labels": pictures.labels(identity.attributes),
        "identity": identity.to_json(),
        "recipe": recipe.to_json(),
    }
