"""What the toolbox's tests share: dense references in float64, and small LoRAs of every kind of module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lolgen.lora import LoRA, ModuleSpec, Spec
from lolgen.testing import random_lora
from lolgen.tools.files import Input
from lolgen.tools.thin import Written

EVERY_KIND = Spec(
    (
        ModuleSpec("attn.to_q", 12, 10),
        ModuleSpec("attn.to_v", 12, 10),
        ModuleSpec("conv_in", 8, 3, (3, 3), "conv"),
        ModuleSpec("conv_1x1", 8, 27, (1, 1), "conv"),
        ModuleSpec("embed", 6, 40, (), "embedding"),
        ModuleSpec("gate", 1, 10),
    )
)
RANKS_A, RANKS_B = (4, 3, 5, 2, 3, 3), (2, 6, 4, 1, 3, 1)
"""Mixed ranks, 1 among them, and one above min(out, in)."""


def draw(
    spec: Spec = EVERY_KIND,
    ranks: int | Sequence[int] = RANKS_A,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    scale: float = 0.7,
    zero: Sequence[str] = (),
) -> LoRA:
    """A random LoRA."""
    generator = torch.Generator().manual_seed(seed)
    return random_lora(spec, ranks, zero=zero, scale=scale, generator=generator, dtype=dtype)


def without(lora: LoRA, *names: str) -> LoRA:
    """The LoRA less some modules."""
    kept = [m for m in lora.spec if m.name not in names]
    return LoRA(Spec(tuple(kept)), {m.name: lora[m.name] for m in kept})


def given(*loras: LoRA) -> list[Input]:
    """LoRAs as if read from files."""
    return [Input(f"file{i}", lora, "peft") for i, lora in enumerate(loras)]


def lora_of(made: Mapping[str, Written], *sources: LoRA) -> LoRA:
    """What the toolbox made, as a LoRA on the modules of its sources."""
    modules = {m.name: m for s in sources for m in s.spec}
    return LoRA(Spec(tuple(modules[n] for n in made)), {n: w.factors for n, w in made.items()})


def delta(lora: LoRA, name: str) -> Tensor:
    """delta W in float64; zero for a module that is not there."""
    f = lora[name]
    return f.scale * f.B.double() @ f.A.double()


def relative(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error."""
    return float((found - wanted).norm() / wanted.norm().clamp(min=1e-300))


def best(W: Tensor, rank: int) -> Tensor:
    """The best approximation of at most `rank`, by a dense SVD."""
    P, S, Q = torch.linalg.svd(W, full_matrices=False)
    return P[:, :rank] * S[:rank] @ Q[:rank]
