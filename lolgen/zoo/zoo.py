"""A zoo on disk: sharded safetensors plus an index with every label and recipe.

    zoo/
      zoo.json            what it is: name, base fingerprint, spec, the plan that built it
      index.jsonl         one line a LoRA: shard, row, id, split, labels, identity, recipe
      shard-0000.safetensors ...

A shard holds LoRAs of one rank, as they came out of training (no gauge fixed): for each shape group `g` of the
spec `B.<g>` (N, M, out, rank) and `A.<g>` (N, M, rank, in), scale folded into B. The index repeats what the shard's
header says of each row, so it can be rebuilt from the shards alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from lolgen.errors import LolgenError
from lolgen.lora import Batch, Group, LoRA, Spec

ROW = dict[str, Any]


@dataclass
class Zoo:
    """Rows of a zoo; `select` narrows them, `load` reads the factors of all rows as one `Batch`."""

    folder: Path
    info: dict[str, Any]
    rows: list[ROW]

    @staticmethod
    def open(folder: str | Path) -> Zoo:
        """Read the index (not the factors); LolgenError names what is missing."""
        folder = Path(folder)
        if not (folder / "zoo.json").is_file() or not (folder / "index.jsonl").is_file():
            raise LolgenError(
                f"{folder}: found no zoo.json with index.jsonl, wanted the folder of a finished zoo"
            )
        info = json.loads((folder / "zoo.json").read_text("utf-8"))
        rows = [json.loads(line) for line in (folder / "index.jsonl").read_text("utf-8").splitlines()]
        return Zoo(folder, info, rows)

    @property
    def spec(self) -> Spec:
        return Spec.from_json(self.info["spec"])

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[ROW]:
        return iter(self.rows)

    def select(self, keep: Callable[[ROW], bool]) -> Zoo:
        return Zoo(self.folder, self.info, [r for r in self.rows if keep(r)])

    def split(self, name: str, rank: int | None = 4) -> Zoo:
        """Rows of one split ('train', 'validation', 'test') and one rank (None: all)."""
        return self.select(lambda r: r["split"] == name and rank in (None, r["rank"]))

    def labels(self) -> Tensor:
        """(N, attributes) long, -1 where an attribute cannot be seen."""
        return torch.tensor([r["labels"] for r in self.rows])

    def load(self, dtype: torch.dtype = torch.float32) -> Batch:
        """All rows as one batch, in the order of `rows`; ranks are padded to the largest."""
        if not self.rows:
            raise LolgenError(f"{self.folder}: no LoRA left to load after selection")
        spec, rank = self.spec, max(r["rank"] for r in self.rows)
        at: dict[str, list[int]] = {}
        for i, row in enumerate(self.rows):
            at.setdefault(row["shard"], []).append(i)
        groups = [
            Group(
                index,
                torch.zeros(len(self.rows), len(index), out, rank, dtype=dtype),
                torch.zeros(len(self.rows), len(index), in_, rank, dtype=dtype),
            )
            for (out, in_), index in spec.groups
        ]
        ranks = torch.zeros(len(self.rows), len(spec), dtype=torch.long)
        for shard, places in at.items():
            rows = torch.tensor([self.rows[i]["row"] for i in places])
            where = torch.tensor(places)
            with safe_open(self.folder / shard, framework="pt") as f:
                for g, group in enumerate(groups):
                    b, a = f.get_tensor(f"B.{g}")[rows], f.get_tensor(f"A.{g}")[rows]
                    group.U[where, ..., : b.shape[-1]] = b.to(dtype)
                    group.V[where, ..., : a.shape[-2]] = a.transpose(-1, -2).to(dtype)
                    ranks[where] = b.shape[-1]
        return Batch(spec, groups, ranks)


def shard_tensors(spec: Spec, loras: Sequence[LoRA], dtype: torch.dtype) -> dict[str, Tensor]:
    """The tensors of a shard; all LoRAs have one rank."""
    out: dict[str, Tensor] = {}
    for g, (_, index) in enumerate(spec.groups):
        names = [spec.names[i] for i in index]
        out[f"B.{g}"] = torch.stack([torch.stack([x.factors[n].U for n in names]) for x in loras]).to(dtype)
        out[f"A.{g}"] = torch.stack([torch.stack([x.factors[n].A for n in names]) for x in loras]).to(dtype)
    return {k: v.contiguous() for k, v in out.items()}
