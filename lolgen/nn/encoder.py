"""The encoder: a batch of LoRAs -> latents (equivariant) and the invariant vector pooled from them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn

from lolgen import gl
from lolgen.lora import Batch, Spec
from lolgen.nn.directions import Moments, principal_directions
from lolgen.nn.latent import Latent
from lolgen.nn.layers import GLLinear, GLMix, Invariants
from lolgen.nn.pretrained import Pretrained
from lolgen.nn.spectrum import Spectrum
from lolgen.nn.tokens import ModuleLinear, ModuleNet


@dataclass(frozen=True)
class EncoderConfig:
    d: int = 32
    """Rows of a module's latent, on each side."""
    mix: int = 0
    """GLMix layers on the latents; 0 keeps the encoder linear."""
    mix_rank: int = 8
    p: int = 16
    """A module's invariants are p x p products."""
    top: int = 8
    """Singular values of a module that the features carry, besides its norm."""
    features: int = 256
    """F, the length of the invariant vector; even."""
    width: int = 128
    depth: int = 1
    heads: int = 4
    dropout: float = 0.1

    def __post_init__(self) -> None:
        if self.features % 2:
            raise ValueError(f"features: found {self.features}, wanted an even number")


class Encoder(Pretrained):
    """Batch -> latents (N, M, d, r) on both sides, and the invariant vector (N, F).

    Latents: each module's own left maps, then `mix` GLMix layers. Invariant vector: of every module the
    products `P U (Q V)^T` of its latent (p x p), divided by |dW| of the whole LoRA, and its log singular
    values; both centred and scaled by the training set's statistics (`fit`). One half of the vector is a
    linear map of all of these, the other half comes from a transformer over modules. The norm is that of the
    whole LoRA, not of each module, so that inner products of the products are nearly cosines of delta W.

    Until `fit` or `from_batch` is called the statistics are 0 and 1.
    """

    Config = EncoderConfig
    config: EncoderConfig

    size: Tensor
    centre: Tensor
    spread: Tensor

    def __init__(self, spec: Spec, config: EncoderConfig | None = None) -> None:
        super().__init__(spec, config or EncoderConfig())
        c, M = self.config, len(spec)
        self.project = GLLinear(spec, d_out=c.d)
        self.mixes = nn.ModuleList(
            GLMix(spec, c.d, rank=c.mix_rank, heads=c.heads, dropout=c.dropout) for _ in range(c.mix)
        )
        self.products = Invariants(spec, c.d, c.p)
        self.spectrum = Spectrum(spec, c.top)
        T = c.p * c.p + self.spectrum.width
        self.linear = ModuleLinear(M, T, c.features // 2)
        self.tokens = ModuleNet(M, T, width=c.width, depth=c.depth, heads=c.heads, dropout=c.dropout)
        self.pool = nn.Linear(c.width, c.features - c.features // 2)
        self.dropout = nn.Dropout(c.dropout)
        self.norm = nn.LayerNorm(c.features)
        self.register_buffer("size", torch.ones(()))
        self.register_buffer("centre", torch.zeros(M, c.p, c.p))
        self.register_buffer("spread", torch.ones(()))

    @classmethod
    def from_batch(
        cls,
        batch: Batch,
        config: EncoderConfig | None = None,
        *,
        S: Moments | None = None,
        ridge: float = 1e-3,
    ) -> Self:
        """An encoder whose maps are the principal directions of these LoRAs, and its statistics theirs.

        `S`: input second moments by module name, for functional directions; see `principal_directions`.
        """
        encoder = cls(batch.spec, config)
        encoder.project.assign(*principal_directions(batch, encoder.config.d, S=S, ridge=ridge))
        encoder.fit(batch)
        return encoder

    @torch.no_grad()
    def fit(self, batch: Batch, spectra: Tensor | None = None) -> None:
        """Take the training set's statistics with the maps as they are now."""
        spectra = self.spectra(batch) if spectra is None else spectra
        latent = self.encode(batch.to(self.size))
        total = spectra.double().square().sum((1, 2))  # (N,)
        self.size.copy_(total.mean().sqrt() if total.any() else torch.ones_like(self.size))
        self.spectrum.fit(spectra)
        I = self._products(latent, spectra)  # noqa: E741
        self.centre.copy_(I.mean(0))
        spread = (I - self.centre).square().mean().sqrt()
        self.spread.copy_(spread if spread > 0 else torch.ones_like(spread))

    def forward(self, batch: Batch, spectra: Tensor | None = None) -> tuple[Latent, Tensor]:
        """(latent, invariant vector (N, F)). `spectra` as `spectra` gives them, when they are known already.

        SpecError when the batch is on another spec.
        """
        latent = self.encode(batch)
        return latent, self.features(latent, self.spectra(batch) if spectra is None else spectra)

    def encode(self, batch: Batch) -> Latent:
        """The latents alone: left maps, no decomposition."""
        self.require(batch.spec)
        latent: Latent = self.project(batch)
        for mix in self.mixes:
            latent = mix(latent)
        return latent

    def spectra(self, batch: Batch) -> Tensor:
        """Singular values of every delta W, (N, M, r). QR and SVD in float64: keep those of a fixed set."""
        self.require(batch.spec)
        return gl.spectrum_batch(batch)

    def features(self, latent: Latent, spectra: Tensor | None = None) -> Tensor:
        """The invariant vector (N, F). Without `spectra` the latents' own stand in for those of delta W."""
        x = self.invariants(latent, spectra)  # (N, M, T)
        direct = self.linear(self.dropout(x)).sum(1) / len(self.spec) ** 0.5
        return self.norm(torch.cat([direct, self.pool(self.tokens(x).mean(1))], dim=-1))

    def invariants(self, latent: Latent, spectra: Tensor | None = None) -> Tensor:
        """What the invariant vector is made from, standardised: (N, M, T), T = p p + top + 1."""
        spectra = latent.spectra() if spectra is None else spectra
        I = (self._products(latent, spectra) - self.centre) / self.spread  # noqa: E741
        return torch.cat([I.flatten(2), self.spectrum(spectra)], dim=-1)

    def _products(self, latent: Latent, spectra: Tensor) -> Tensor:
        """P U (Q V)^T over |dW| of the whole LoRA, (N, M, p, p); LoRAs far below the usual size fade out."""
        total = (spectra.to(self.size) / self.size).square().sum((1, 2))  # (N,)
        norm = self.size * (total + 1e-6).sqrt()
        return self.products(latent) / norm[:, None, None, None]
