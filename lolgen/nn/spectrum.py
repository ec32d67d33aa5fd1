"""Singular values as features: logarithms, standardised by what the training set has."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from lolgen.lora import Spec


class Spectrum(nn.Module):
    """Singular values (N, M, r) of every module -> (N, M, top + 1), for any r.

    The `top` largest and the module's norm, as `log(s / size + 1e-3)`, standardised value by value. `size` is
    the root mean square of the module's norm in the training set, at least 1e-3 of a usual module's. The
    1e-3 in the logarithm keeps untrained modules and columns past the rank finite.
    """

    FLOOR = 1e-3

    size: Tensor
    mean: Tensor
    deviation: Tensor

    def __init__(self, spec: Spec, top: int = 8) -> None:
        super().__init__()
        self.spec, self.top = spec, top
        M = len(spec)
        self.register_buffer("size", torch.ones(M))
        self.register_buffer("mean", torch.zeros(M, top + 1))
        self.register_buffer("deviation", torch.ones(M, top + 1))

    @property
    def width(self) -> int:
        return self.top + 1

    @torch.no_grad()
    def fit(self, S: Tensor) -> None:
        """Take the statistics of the training set's singular values (N, M, r)."""
        size = S.double().square().sum(-1).mean(0).sqrt()  # (M,)
        typical = size.square().mean().sqrt()
        size = torch.maximum(size, typical * self.FLOOR)
        self.size.copy_(torch.where(typical > 0, size, torch.ones_like(size)))
        values = self._logarithms(S)
        self.mean.copy_(values.mean(0))
        # A value that hardly moves in training must not become all that counts when it does.
        self.deviation.copy_(values.std(0, correction=0).clamp(min=0.1))

    def forward(self, S: Tensor) -> Tensor:
        return (self._logarithms(S) - self.mean) / self.deviation

    def _logarithms(self, S: Tensor) -> Tensor:
        S = S.to(self.size) / self.size[:, None]
        # Scaled first: the squares of a tiny LoRA's values would underflow.
        norm = torch.linalg.vector_norm(S, dim=-1, keepdim=True)
        leading = S[..., : self.top]
        leading = pad(leading, (0, self.top - leading.shape[-1]))
        return (torch.cat([leading, norm], dim=-1) + self.FLOOR).log()
