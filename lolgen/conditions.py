"""What a LoRA is asked to be, as the vector that conditions the generator.

One block of indicators per attribute (all zero: not asked for), one for how the prompts name the identity, and how
strongly it was trained. Strength is a condition because real zoos hold weak and strong LoRAs: the generator learns
the difference, and is asked for a strong one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from lolgen import pictures

WIDTHS: tuple[int, ...] = tuple(len(v) for v in pictures.ATTRIBUTES.values())
LENGTH = sum(WIDTHS) + len(pictures.SUBJECTS) + 1
"""C, the length of a condition vector."""


def conditions(labels: Tensor, subjects: Tensor, strength: Tensor) -> Tensor:
    """labels (N, attributes) long, negative where not asked for; subjects (N,) index into `pictures.SUBJECTS`;
    strength (N,), about -1 to 1 -> (N, C) float32."""
    blocks = [
        torch.nn.functional.one_hot(labels[:, k].clamp(min=0), width) * (labels[:, k : k + 1] >= 0)
        for k, width in enumerate(WIDTHS)
    ]
    blocks.append(torch.nn.functional.one_hot(subjects, len(pictures.SUBJECTS)))
    return torch.cat([*[b.float() for b in blocks], strength[:, None].float()], 1)


def drop_attributes(c: Tensor, drop: Tensor) -> Tensor:
    """c (N, C) with the attributes where `drop` (N, attributes) is true no longer asked for."""
    keep = torch.cat(
        [(~drop[:, k : k + 1]).expand(-1, w) for k, w in enumerate(WIDTHS)]
        + [torch.ones(len(c), LENGTH - sum(WIDTHS), dtype=torch.bool)],
        1,
    )
    return c * keep


def strength_of(recipe: Mapping[str, float]) -> float:
    """log2 of learning rate times steps, centred: 0 for 60 steps of 4e-3, 1 for eight times as much."""
    return float(torch.log2(torch.tensor(recipe["lr"] * recipe["steps"] / (4e-3 * 60)))) / 3


def complete(
    request: Mapping[str, str], marginals: Sequence[Tensor], generator: torch.Generator
) -> dict[str, str]:
    """The request with every attribute that it leaves open drawn from `marginals` (one (values,) each)."""
    full: dict[str, str] = {}
    for (name, values), p in zip(pictures.ATTRIBUTES.items(), marginals, strict=True):
        k = int(torch.multinomial(p, 1, generator=generator))
        full[name] = request.get(name, values[k])
    return full
