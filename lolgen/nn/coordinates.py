"""Where a LoRA lies along what a template knows: one number for every value of every attribute, read and moved."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lolgen.errors import ShapeError
from lolgen.nn.template import Template


@dataclass(frozen=True)
class Block:
    """A set of directions that sums to zero, as the values of one attribute do: columns `start` to `stop`."""

    start: int
    stop: int

    @property
    def columns(self) -> slice:
        return slice(self.start, self.stop)


class Coordinates:
    """Least squares on the directions of a template, per rare word: products (N, M, d, d) <-> coordinates (N, K).

    The template is linear in its condition, so the indicators of an attribute's values are directions in the space
    of products `U V^T`; their mean is no information about the attribute and is folded into the first direction,
    which stands for anybody. What is left is centred: coordinate 1 on a value (and 0 on the others) is a LoRA that
    has it as strongly as the template draws it, and minus the mean is removed with it. GL-invariant, as products are.

    `blocks`: positions of each set of indicators within the template's identity features; `parents`: for each block
    None, or the (block, position) of the value under which its indicators are drawings: their mean belongs to it.
    """

    def __init__(
        self,
        template: Template,
        blocks: tuple[Block, ...],
        parents: tuple[tuple[int, int] | None, ...],
        *,
        strength: float = 0.0,
        ridge: float = 0.02,
    ) -> None:
        k = template.config.attributes
        if blocks[-1].stop != k:
            raise ShapeError(
                f"blocks of a template: found {blocks[-1].stop} indicators, wanted its {k} identity features"
            )
        self.blocks = blocks
        weight = template.weight.detach().double()
        weight = weight.unflatten(0, (-1, k + 2))  # (words, 1 + k + 1, M, d, d)
        anybody, values = weight[:, 0] + strength * weight[:, -1], weight[:, 1:-1].clone()
        for block, parent in reversed(list(zip(blocks, parents, strict=True))):
            mean = values[:, block.columns].mean(1)
            values[:, block.columns] -= mean[:, None]
            if parent is None:
                anybody = anybody + mean
            else:
                values[:, blocks[parent[0]].start + parent[1]] += mean
        self.directions = torch.cat([anybody[:, None], values], 1)
        """(words, 1 + K, M, d, d); the first is anybody."""
        flat = self.directions.flatten(2)
        gram = flat @ flat.mT
        level = ridge * gram.diagonal(dim1=-2, dim2=-1).mean(-1)
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype)
        self._solve = torch.linalg.solve(gram + level[:, None, None] * eye, flat)  # (words, 1 + K, M d d)

    def read(self, products: Tensor, words: Tensor) -> tuple[Tensor, Tensor]:
        """products (N, M, d, d) of LoRAs on `words` (N,) -> (how much of anybody (N,), coordinates (N, K))."""
        flat = products.double().flatten(1)
        found = flat.new_zeros(len(flat), self._solve.shape[1])
        for word, solve in enumerate(self._solve):
            rows = words == word
            found[rows] = flat[rows] @ solve.mT
        return found[:, 0], found[:, 1:]

    def products(self, anybody: Tensor, coordinates: Tensor, words: Tensor) -> Tensor:
        """The products (N, M, d, d) that lie at these coordinates."""
        full = torch.cat([anybody[:, None], coordinates], 1).double()
        found = full.new_zeros(len(full), *self.directions.shape[2:])
        for word, directions in enumerate(self.directions):
            rows = words == word
            found[rows] = torch.einsum("nk,kmij->nmij", full[rows], directions)
        return found
