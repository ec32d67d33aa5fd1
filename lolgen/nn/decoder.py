"""The decoder: latents -> factor pairs of the spec's own sizes, at any rank."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import nn

from lolgen.lora import Batch, Spec
from lolgen.nn.directions import Moments, regularised, right_inverse
from lolgen.nn.encoder import Encoder
from lolgen.nn.latent import Latent
from lolgen.nn.layers import GLLinear, GLMix
from lolgen.nn.pretrained import Pretrained


@dataclass(frozen=True)
class DecoderConfig:
    d: int = 32
    """Rows of a module's latent, on each side, as the encoder's."""
    mix: int = 0
    """GLMix layers on the latents before they are lifted."""
    mix_rank: int = 8
    heads: int = 4
    dropout: float = 0.0


class Decoder(Pretrained):
    """Latent -> Batch: `mix` GLMix layers, then each module's own left maps. Rank is the latent's."""

    Config = DecoderConfig
    config: DecoderConfig

    def __init__(self, spec: Spec, config: DecoderConfig | None = None) -> None:
        super().__init__(spec, config or DecoderConfig())
        c = self.config
        self.mixes = nn.ModuleList(
            GLMix(spec, c.d, rank=c.mix_rank, heads=c.heads, dropout=c.dropout) for _ in range(c.mix)
        )
        self.lift = GLLinear(spec, c.d)

    @classmethod
    def from_encoder(
        cls,
        encoder: Encoder,
        *,
        mix: int = 0,
        mix_rank: int = 8,
        S: Moments | None = None,
        ridge: float = 1e-3,
    ) -> Self:
        """The decoder that undoes the encoder's left maps: their transposes where rows are orthonormal.

        After `Encoder.from_batch(batch, S=S, ridge=ridge)`, given the same S and ridge, decode(encode(x)) is
        the orthogonal projection on its directions, in the norm |dW|_S where a module has an S.
        """
        c = encoder.config
        decoder = cls(encoder.spec, DecoderConfig(c.d, mix, mix_rank, c.heads))
        Us = [right_inverse(P.detach().double()) for P in encoder.project.U]
        Vs = []
        for Q, (shape, index) in zip(encoder.project.V, encoder.spec.groups, strict=True):
            rows = []
            for q, m in zip(Q.detach().double(), index, strict=True):
                name = encoder.spec.names[m]
                moment = None
                if S is not None and name in S:
                    moment = regularised(name, S[name].to(q), shape[1], ridge)
                rows.append(right_inverse(q, moment))
            Vs.append(torch.stack(rows))
        decoder.lift.assign(Us, Vs)
        return decoder

    def forward(self, latent: Latent) -> Batch:
        for mix in self.mixes:
            latent = mix(latent)
        batch: Batch = self.lift(latent)
        return batch
