"""Does a shipped reader say when it is guessing? The share of several kinds of LoRAs that it calls unlike its zoo."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lolgen.lora import Batch
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.tasks import shelf
from lolgen.tasks.paper.tasks import TASKS


def kinds(test: Batch, seed: int = 0) -> dict[str, Batch]:
    """LoRAs made of the test split's that are like nothing in the zoo: name -> batch of the same length."""
    g = torch.Generator().manual_seed(seed)

    def noise(X: torch.Tensor) -> torch.Tensor:
        return torch.randn(X.shape, generator=g) * X.square().mean((-2, -1), keepdim=True).sqrt()

    def shuffled(X: torch.Tensor) -> torch.Tensor:
        return X.roll(1, dims=1)

    other = torch.randperm(len(test), generator=g)
    return {
        "noise of the same size": test.map(lambda U, V: (noise(U), noise(V))),
        "outputs of one LoRA, inputs of another": test.map(lambda U, V: (U, V[other])),
        "modules exchanged": test.map(lambda U, V: (shuffled(U), shuffled(V))),
        "sixteen times as strong": test.map(lambda U, V: (16 * U, V)),
        "a sixteenth as strong": test.map(lambda U, V: (U / 16, V)),
        "sign turned": test.map(lambda U, V: (-U, V)),
    }


def flagged(name: str, readers: Path | None = None, zoos: Path | None = None) -> dict[str, Any]:
    """Kind -> share called unlike the zoo, for the shipped reader of a task; its own test rows first."""
    reader = shelf.load((readers or checkpoints_dir() / "predictors") / name)
    tests = TASKS[name].load(zoos or zoos_dir()).tests
    batches = {row: batch for row, (batch, _) in tests.items()}
    batches |= kinds(next(iter(batches.values())))
    return {k: round(1 - float(reader.familiar(b).float().mean()), 4) for k, b in batches.items()}
