"""bf16 where a CPU gains by it: inside linear layers and convolutions, float32 everywhere else.

Autocast also moves attention and the norms to bf16, whose CPU kernels are several times slower than their
float32 ones; the whole step then gains nothing.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class _Linear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        b = None if self.bias is None else self.bias.bfloat16()
        return F.linear(x.bfloat16(), self.weight.bfloat16(), b).float()


class _Conv2d(nn.Conv2d):
    def forward(self, x: Tensor) -> Tensor:
        b = None if self.bias is None else self.bias.bfloat16()
        w = self.weight.bfloat16()
        return F.conv2d(x.bfloat16(), w, b, self.stride, self.padding, self.dilation, self.groups).float()


def bf16_matmuls(model: nn.Module, enable: bool = True) -> nn.Module:
    """Switch the plain linear layers and convolutions of `model` to bf16 products, in place (or back)."""
    swap: dict[type, type] = {nn.Linear: _Linear, nn.Conv2d: _Conv2d}
    if not enable:
        swap = {v: k for k, v in swap.items()}
    for module in model.modules():
        if type(module) in swap:
            module.__class__ = swap[type(module)]
    return model
