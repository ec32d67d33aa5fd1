"""The template: what a condition asks for on average, as a balanced latent, from ridge regression in closed form."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lolgen import gl
from lolgen.lora import Spec
from lolgen.nn.latent import Latent
from lolgen.nn.pretrained import Pretrained


@dataclass(frozen=True)
class TemplateConfig:
    d: int = 24
    """Rows of a module's latent, on each side, as the encoder's."""
    attributes: int = 24
    """Length of the leading part of the condition: indicators of what the identity is."""
    groups: tuple[tuple[int, ...], ...] = ()
    """Positions of the subject indicators that share one rare word, and so one direction of the input."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "groups", tuple(tuple(g) for g in self.groups))


class Template(Pretrained):
    """Condition (N, C) -> the regression's mean of `U V^T` in latent coordinates, factored at any rank.

    Features are the products of rare word and (1, identity, strength), strength being the condition's last entry: what
    an attribute adds lies in the direction of the LoRA's word. Products of attributes with strength as well
    predict held-out LoRAs a little better and draw worse, as the strong corner is thinly populated.
    """

    Config = TemplateConfig
    config: TemplateConfig

    weight: Tensor

    def __init__(self, spec: Spec, config: TemplateConfig) -> None:
        super().__init__(spec, config)
        self.weight = nn.Buffer(torch.zeros(self._width(), len(spec), config.d, config.d))

    def _width(self) -> int:
        return len(self.config.groups) * (2 + self.config.attributes)

    def features(self, c: Tensor) -> Tensor:
        """(N, F) regression features of conditions c (N, C)."""
        k = self.config.attributes
        word = torch.stack([c[:, list(g)].sum(1) for g in self.config.groups], 1)
        asked = torch.cat([torch.ones_like(c[:, :1]), c[:, :k], c[:, -1:]], 1)
        return torch.einsum("ng,na->nga", word, asked).flatten(1)

    @torch.no_grad()
    def fit(self, c: Tensor, latent: Latent, penalty: float) -> Template:
        """Ridge from conditions to the products of these latents; `penalty` is on unit-variance scale per row."""
        F = self.features(c).double()
        products = (latent.U @ latent.V.mT).double()  # (N, M, d, d)
        gram = F.T @ F + penalty * torch.eye(F.shape[1], dtype=F.dtype)
        solution = torch.linalg.solve(gram, F.T @ products.flatten(1))
        self.weight.copy_(solution.view(-1, *products.shape[1:]))
        return self

    def products(self, c: Tensor) -> Tensor:
        """The mean of U V^T per module, (N, M, d, d)."""
        return torch.einsum("nf,fmij->nmij", self.features(c), self.weight)

    def forward(self, c: Tensor, rank: int) -> Latent:
        """The mean at its best rank-`rank` truncation, balanced and in canonical form."""
        C = self.products(c)
        eye = torch.eye(C.shape[-1], dtype=C.dtype).expand_as(C)
        U, V = gl.truncate(C, eye, rank)
        return Latent(*gl.canonical(U, V), torch.full(C.shape[:2], rank))


def word_groups(subjects: Sequence[str], words: Sequence[str], start: int) -> tuple[tuple[int, ...], ...]:
    """Positions, from `start` on, of the subjects that hold each of `words`."""
    return tuple(tuple(start + i for i, s in enumerate(subjects) if w in s.split()) for w in words)
