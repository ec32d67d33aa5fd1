"""Which of many files are the same adapter, or near to one another: candidates by sketch, then the exact cosine."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

from lolgen import io
from lolgen.errors import LolgenError
from lolgen.lora import LoRA
from lolgen.tools.search.exact import Likeness, likeness
from lolgen.tools.search.sketch import direction

SAME = 0.999
"""Cosine from which two adapters are called duplicates: half precision costs about 1e-6, rounding to 8 bits 1e-4."""
MARGIN = 0.25
"""How far below the wanted cosine a sketch's may lie for the pair to be looked at: over twice its error."""
MOST_PAIRS = 2000
"""Most pairs compared exactly, the likeliest first."""

Pair = dict[str, Any]


class Relatives:
    """Collects a sketch for each LoRA that is shown to it; the LoRAs themselves are not kept."""

    def __init__(self, near: float = 0.5) -> None:
        self.near = near
        self.paths: list[str] = []
        self.sketches: list[torch.Tensor] = []

    def add(self, path: str, lora: LoRA) -> None:
        vector = direction(lora)
        if vector is not None:
            self.paths.append(path)
            self.sketches.append(vector)

    def candidates(self) -> list[tuple[float, int, int]]:
        """(cosine of the sketches, i, j), likeliest first."""
        if len(self.paths) < 2:
            return []
        x = torch.stack(self.sketches)
        found = []
        for start in range(0, len(x), 1024):
            block = x[start : start + 1024] @ x.T
            near = torch.nonzero(block >= self.near - MARGIN).tolist()
            found += [(float(block[i, j]), start + i, j) for i, j in near if start + i < j]
        return sorted(found, reverse=True)

    def find(self) -> dict[str, Any]:
        """{"pairs": near pairs with their exact cosine, "duplicates": groups of the same delta W, ...}."""
        candidates = self.candidates()
        load = _loader()
        pairs: list[Pair] = []
        for _, i, j in candidates[:MOST_PAIRS]:
            try:
                found: Likeness = likeness(load(self.paths[i]), load(self.paths[j]))
            except LolgenError:  # other shapes under the same names: of different bases, and no relatives
                continue
            if found.cosine >= self.near:
                pairs.append({
                    "a": self.paths[i], "b": self.paths[j], "cosine": round(found.cosine, 6),
                    "strength": round(found.strength, 6),
                })  # fmt: skip
        pairs.sort(key=lambda p: -p["cosine"])
        same = [(p["a"], p["b"]) for p in pairs if p["cosine"] >= SAME]
        return {
            "compared": len(self.paths),
            "near": self.near,
            "pairs": pairs,
            "duplicates": groups(same),
            "candidates_left_out": max(0, len(candidates) - MOST_PAIRS),
        }


def _loader(most: int = 64) -> Callable[[str], LoRA]:
    @lru_cache(maxsize=most)
    def load(path: str) -> LoRA:
        return io.load(Path(path))

    return load


def groups(pairs: list[tuple[str, str]]) -> list[list[str]]:
    """The connected components of the pairs, each sorted, in order."""
    parent: dict[str, str] = {}

    def root(x: str) -> str:
        while parent.setdefault(x, x) != x:
            parent[x] = parent[parent[x]]
            x = parent[x]
        return x

    for a, b in pairs:
        parent[root(a)] = root(b)
    found: dict[str, list[str]] = {}
    for x in parent:
        found.setdefault(root(x), []).append(x)
    return sorted(sorted(g) for g in found.values())
