"""The paper's GL-net, as a baseline (arXiv 2410.04207, section 4)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lolgen.lora import Batch, Spec
from lolgen.nn.latent import Latent
from lolgen.nn.layers import GLLinear
from lolgen.nn.pretrained import Pretrained
from lolgen.nn.tokens import ModuleLinear, Summary


@dataclass(frozen=True)
class GLNetConfig:
    outputs: int
    d: int = 64
    layers: int = 1
    """Linear layers before the products."""
    gate: bool = False
    """The sign gate after each of them."""
    hidden: int = 256
    dropout: float = 0.1
    transformer: bool = False
    """The transformer head: a token a module, `hidden` wide, two blocks of four heads."""


class GLNet(Pretrained):
    """Batch -> (N, outputs): (Phi U, Psi V), perhaps gated; the d x d products of all modules, concatenated;
    Linear, LayerNorm, ReLU, Dropout, Linear. With `transformer` the products of each module are a token instead,
    read by a CLS token through two pre-norm blocks.

    `scale`: what the products are divided by, 1 until `fit`. Without it the first bias would drown the
    products of small LoRAs.
    """

    Config = GLNetConfig
    config: GLNetConfig

    scale: Tensor

    def __init__(self, spec: Spec, config: GLNetConfig) -> None:
        super().__init__(spec, config)
        c = config
        self.maps = nn.ModuleList(GLLinear(spec, c.d if i else None, c.d) for i in range(c.layers))
        M, products = len(spec), c.d * c.d
        first: list[nn.Module] = [nn.Linear(M * products, c.hidden), nn.LayerNorm(c.hidden), nn.ReLU()]
        if c.transformer:
            tokens = ModuleLinear(M, products, c.hidden)
            nn.init.normal_(tokens.bias, std=0.2)  # the module's embedding
            first = [nn.Unflatten(1, (M, products)), tokens, Summary(c.hidden, dropout=c.dropout)]
        self.head = nn.Sequential(*first, nn.Dropout(c.dropout), nn.Linear(c.hidden, c.outputs))
        self.register_buffer("scale", torch.ones(()))

    @torch.no_grad()
    def fit(self, batch: Batch) -> None:
        """Set `scale` to the products' root mean square over the training set."""
        squares = [
            self.products(batch[i : i + 64]).double().square().mean(1) for i in range(0, len(batch), 64)
        ]
        size = torch.cat(squares).mean().sqrt()
        self.scale.copy_(size if size > 0 else torch.ones_like(size))

    def products(self, batch: Batch) -> Tensor:
        """(N, M d d)."""
        self.require(batch.spec)
        x: Any = batch
        for layer in self.maps:
            x = layer(x)
            x = sign_gate(x) if self.config.gate else x
        return (x.U @ x.V.mT).flatten(1)

    def forward(self, batch: Batch) -> Tensor:
        return self.head(self.products(batch) / self.scale)


def sign_gate(x: Latent) -> Latent:
    """Row i of U times ReLU(sign(sum_j (U V^T)_ij)), row j of V times ReLU(sign(sum_i (U V^T)_ij))."""
    rows = (x.U @ x.V.sum(2)[..., None]) > 0  # (N, M, d, 1)
    columns = (x.V @ x.U.sum(2)[..., None]) > 0
    return Latent(x.U * rows, x.V * columns, x.ranks)
