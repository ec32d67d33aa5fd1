"""A zoo that takes no training: an attribute is an output direction, or a size, behind noise and a random gauge."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from lolgen import gl
from lolgen.lora import Batch, Group, ModuleSpec, Spec
from lolgen.zoo.zoo import shard_tensors

SPEC = Spec(
    (
        ModuleSpec("a.to_k", 12, 10),
        ModuleSpec("a.to_v", 16, 10),
        ModuleSpec("b.to_k", 12, 10),
        ModuleSpec("b.to_v", 16, 10),
    )
)
CLASSES = {"hue": 4, "strength": 2, "hat": 3}
RANK = 3


def make(count: int, seed: int, *, aligned: bool = False, noise: float = 0.35) -> tuple[Batch, Tensor]:
    """LoRAs whose delta W is `strength * (e_hue + e_hat) v^T` plus noise of rank 2 that no input sees, and labels.

    `aligned`: all in one gauge, the signal in the first column; otherwise each module in a gauge of its own.
    A third of the `hat` labels are -1.
    """
    world, g = torch.Generator().manual_seed(7), torch.Generator().manual_seed(seed)
    y = torch.stack([torch.randint(k, (count,), generator=g) for k in CLASSES.values()], dim=1)
    size = 1 + 1.5 * y[:, 1].float()
    groups = []
    for (out, in_), index in SPEC.groups:
        M = len(index)
        hue, hat = (torch.randn(k, M, out, generator=world) for k in (4, 3))
        v = torch.nn.functional.normalize(torch.randn(M, in_, generator=world), dim=-1)
        U = 1.5 * noise * torch.randn(count, M, out, RANK, generator=g)
        V = torch.randn(count, M, in_, RANK, generator=g) / in_**0.5
        V[..., 1:] -= v[..., None] * (V[..., 1:] * v[..., None]).sum(2, keepdim=True)
        U[..., 0] = size[:, None, None] * (hue[y[:, 0]] + hat[y[:, 2]] + U[..., 0])
        V[..., 0] = v + 0.05 * V[..., 0]
        groups.append(Group(index, U, V))
    batch = Batch(SPEC, groups, torch.full((count, len(SPEC)), RANK))
    if not aligned:
        batch = gl.act_batch(batch, gl.random_gauge_batch(batch, condition=10.0, generator=g))
    y[torch.rand(count, generator=g) < 1 / 3, 2] = -1
    return batch, y


def write_zoo(folder: Path, counts: dict[str, int]) -> Path:
    """The same as a zoo on disk, a shard a split."""
    folder.mkdir(parents=True)
    lines = []
    for number, (split, count) in enumerate(counts.items()):
        batch, y = make(count, seed=number)
        shard = f"shard-{number:04d}.safetensors"
        save_file(shard_tensors(SPEC, batch.unstack(), torch.float32), folder / shard)
        for i, labels in enumerate(y.tolist()):
            row = {
                "shard": shard,
                "row": i,
                "id": f"{split}-{i}",
                "split": split,
                "rank": RANK,
                "labels": labels,
            }
            lines.append(json.dumps(row))
    (folder / "index.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "zoo.json").write_text(json.dumps({"name": "synthetic", "spec": SPEC.to_json()}))
    return folder
