"""A small transformer over tokens of several lengths, for the models that read factors as they are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lolgen.lora import Spec
from lolgen.nn.tokens import Summary


def pack(parts: Sequence[Tensor]) -> Tensor:
    """Tokens of each shape group (N, M, T, L) in one row a LoRA, (N, sum of M T L)."""
    return torch.cat([x.flatten(1) for x in parts], dim=1)


class TokenNet(nn.Module):
    """Rows of `pack` -> (N, outputs): projection a shape group, embeddings of module and place, `Summary`, linear.

    `lengths`: L of each group of the spec; `places`: T, the tokens a module. `skip_zeros`: tokens that are all zeros
    are not looked at.
    """

    def __init__(
        self,
        spec: Spec,
        lengths: Sequence[int],
        places: int,
        outputs: int,
        *,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
        dropout: float = 0.1,
        skip_zeros: bool = False,
    ) -> None:
        super().__init__()
        self.shapes = [(len(index), places, n) for (_, index), n in zip(spec.groups, lengths, strict=True)]
        self.skip_zeros = skip_zeros
        self.embed = nn.ModuleList(nn.Linear(n, width, bias=False) for n in lengths)
        self.module = nn.Parameter(0.2 * torch.randn(len(spec), 1, width))
        self.place = nn.Parameter(0.2 * torch.randn(places, width))
        self.summary = Summary(width, depth, heads, dropout)
        self.out = nn.Sequential(nn.Dropout(dropout), nn.Linear(width, outputs))

    def forward(self, x: Tensor) -> Tensor:
        rows = x.split([m * t * n for m, t, n in self.shapes], dim=1)
        parts = [part.view(len(x), *shape) for part, shape in zip(rows, self.shapes, strict=True)]
        tokens = torch.cat([embed(part) for embed, part in zip(self.embed, parts, strict=True)], dim=1)
        keep = (
            torch.cat([(part != 0).any(-1) for part in parts], dim=1).flatten(1) if self.skip_zeros else None
        )
        # The order of modules is that of the groups; each has an embedding of its own.
        return self.out(self.summary((tokens + self.module + self.place).flatten(1, 2), keep))
