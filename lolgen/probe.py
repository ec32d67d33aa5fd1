"""The attribute probe: a small CNN that reads portrait attributes off pictures.

It is trained on rendered pictures alone and is the judge of this project: it never trains or guides a model.
A second head tells portraits and the ten styles apart.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Self

import torch
from safetensors import safe_open
from torch import Tensor, nn

from lolgen import pictures


class Probe(nn.Module):
    """(N, 3, 32, 32) in [-1, 1] -> logits per attribute and `kind` (N, 11): portrait, then the ten styles."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width

        def block(i: int, o: int, stride: int) -> list[nn.Module]:
            return [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

        w = width
        self.body = nn.Sequential(
            *block(3, w, 1), *block(w, w, 2), *block(w, 2 * w, 1), *block(2 * w, 2 * w, 2),
            *block(2 * w, 3 * w, 1), *block(3 * w, 3 * w, 2), nn.Flatten(), nn.Dropout(0.1),
            nn.Linear(3 * w * 16, 128), nn.ReLU(),
        )  # fmt: skip
        self.heads = nn.ModuleDict({n: nn.Linear(128, len(v)) for n, v in pictures.ATTRIBUTES.items()})
        self.kind = nn.Linear(128, 1 + len(pictures.STYLES))

    def features(self, x: Tensor) -> Tensor:
        """(N, 128) features, for identity similarity."""
        return self.body(x)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        h = self.body(x)
        return {n: head(h) for n, head in self.heads.items()} | {"kind": self.kind(h)}

    @torch.no_grad()
    def read(self, x: Tensor, batch: int = 256) -> Tensor:
        """Predicted class per attribute, (N, 6) long, in the order of `pictures.ATTRIBUTES`."""
        rows = [self(c) for c in x.split(batch)]
        return torch.cat([torch.stack([r[n].argmax(-1) for n in pictures.ATTRIBUTES], -1) for r in rows])

    @classmethod
    def load(cls, path: str | Path) -> Self:
        with safe_open(path, framework="pt") as f:
            meta = json.loads(f.metadata()["lolgen"])
            probe = cls(meta["width"])
            probe.load_state_dict({k: f.get_tensor(k) for k in f.keys()})  # noqa: SIM118 (no mapping)
        return probe.eval().requires_grad_(False)


def accuracy(read: Tensor, labels: Tensor) -> Tensor:
    """Share of right readings per attribute over the visible ones, (6,); `labels` is -1 where not visible."""
    seen = labels >= 0
    right = (read == labels) & seen
    return right.sum(0) / seen.sum(0).clamp(min=1)


def mean_accuracy(read: Tensor, labels: Tensor) -> float:
    """Mean over attributes of `accuracy`, the figure that every gate and table uses."""
    seen = (labels >= 0).any(0)
    return float(accuracy(read, labels)[seen].mean())
