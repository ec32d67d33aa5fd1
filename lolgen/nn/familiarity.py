"""What the base feels of a LoRA, and whether a zoo holds others like it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from lolgen import gl
from lolgen.lora import Batch, Spec
from lolgen.nn.directions import Moments, regularised
from lolgen.nn.pretrained import Pretrained

FACTS: tuple[str, ...] = ("size", "unseen", "unexplained")
"""log |dW|_S; the share of |dW|_S^2 that the encoder does not see; the share of the latent off the template's span."""


@dataclass(frozen=True)
class FamiliarityConfig:
    quantile: float = 0.005
    """Share of the zoo's LoRAs outside each bound."""
    slack: float = 0.25
    """How far past the bounds, as a share of the distance between them, a LoRA still counts as like the zoo."""


class Familiarity(Pretrained):
    """S^1/2 of every module, S = E[x x^T] over the inputs it sees, and the range of `FACTS` over a zoo."""

    Config = FamiliarityConfig
    config: FamiliarityConfig

    bounds: Tensor

    def __init__(self, spec: Spec, config: FamiliarityConfig | None = None) -> None:
        super().__init__(spec, config or FamiliarityConfig())
        self.roots = nn.ParameterList(
            nn.Parameter(
                torch.eye(shape[1], dtype=torch.float64).repeat(len(index), 1, 1), requires_grad=False
            )
            for shape, index in spec.groups
        )
        self.register_buffer("bounds", torch.zeros(len(FACTS), 2, dtype=torch.float64))

    @classmethod
    def from_moments(cls, spec: Spec, S: Moments, ridge: float = 1e-3) -> Self:
        """The roots of these moments, made regular as in `principal_directions`; no bounds yet."""
        made = cls(spec)
        for roots, (shape, index) in zip(made.roots, spec.groups, strict=True):
            for j, m in enumerate(index):
                name = spec.names[m]
                values, vectors = torch.linalg.eigh(regularised(name, S[name].double(), shape[1], ridge))
                roots[j] = (vectors * values.clamp(min=0).sqrt()) @ vectors.mT
        return made

    @torch.no_grad()
    def fit(self, facts: Tensor) -> Self:
        """Take the bounds from the facts (N, 3) of a zoo's LoRAs."""
        q = self.config.quantile
        low, high = torch.quantile(facts.double(), torch.tensor([q, 1 - q], dtype=torch.float64), dim=0)
        slack = self.config.slack * (high - low)
        self.bounds.copy_(torch.stack([low - slack, high + slack], 1))
        return self

    def weigh(self, batch: Batch) -> Batch:
        """The LoRAs with V replaced by S^1/2 V: plain norms of it are the norm |dW|_S."""
        roots = iter(self.roots)
        return batch.to(torch.float64).map(lambda U, V: (U, next(roots) @ V))

    def truncate(
        self, U: Tensor, V: Tensor, index: Sequence[int], ranks: Tensor, rank: int
    ) -> tuple[Tensor, Tensor]:
        """The best pairs of `ranks` (N, M) in the norm |dW|_S, padded to `rank`: U (N, M, out, k), V (N, M, in, k).

        `index`: which modules of the spec they are, the modules of one group. Half the optimum's square in the plain
        norm is often noise of training that no input reaches; it goes first.
        """
        group = [i for _, i in self.spec.groups].index(tuple(index))
        root = self.roots[group]
        kept = min(rank, U.shape[-1])
        U, V = gl.truncate(U.double(), root @ V.double(), kept)
        inside = (torch.arange(kept) < ranks[..., None])[..., None, :]
        return gl.pad(U * inside, torch.linalg.solve(root, V) * inside, rank)

    def strange(self, facts: Tensor) -> list[list[str]]:
        """What is out of bounds in the facts (N, 3) of each LoRA, in words; empty lists for LoRAs like the zoo's."""
        words = {
            "size": (
                "it is far weaker than any LoRA of the zoo",
                "it is far stronger than any LoRA of the zoo",
            ),
            "unseen": ("", "much of it lies where no LoRA of the zoo does"),
            "unexplained": ("", "little of it is what the zoo's LoRAs share"),
        }
        found = []
        for row in facts.tolist():
            said = []
            for name, value, (low, high) in zip(FACTS, row, self.bounds.tolist(), strict=True):
                text = words[name][0] if value < low else words[name][1] if value > high else ""
                said += [text] if text else []
            found.append(said)
        return found
