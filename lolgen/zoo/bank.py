"""A bank: K LoRAs of one base model at work in one forward pass.

Rows of a batch are ordered (K, n): n pictures for each LoRA. A hook on each adapted linear layer adds
`scale * B_k A_k x` for the rows of LoRA k with two batched products, so training K LoRAs costs one forward and one
backward of the base, not K.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lolgen.lora import Batch, LoRA, ModuleSpec, Spec


def find_modules(model: nn.Module, targets: Sequence[str], prefix: str) -> Spec:
    """The linear layers whose path ends in one of `targets`, in the model's order, as a Spec."""
    found = [
        ModuleSpec(f"{prefix}{name}", m.out_features, m.in_features)
        for name, m in model.named_modules()
        if isinstance(m, nn.Linear) and any(name.endswith(t) for t in targets)
    ]
    return Spec(tuple(found))


def fingerprint(model: nn.Module) -> str:
    """sha256 over a model's tensors: which base a zoo belongs to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


class Bank(nn.Module):
    """K factor pairs per module, padded to the largest rank; `B` (K, out, r), `A` (K, r, in).

    Padding columns are zero in both factors: their gradients are zero as well, so they stay zero.
    """

    def __init__(self, spec: Spec, ranks: Sequence[int], scales: Sequence[float]) -> None:
        super().__init__()
        self.spec, self.ranks = spec, list(ranks)
        r = max(self.ranks)
        self.A = nn.ParameterList([nn.Parameter(torch.zeros(len(self.ranks), r, m.in_)) for m in spec])
        self.B = nn.ParameterList([nn.Parameter(torch.zeros(len(self.ranks), m.out, r)) for m in spec])
        self.scales: Tensor
        self.register_buffer("scales", torch.tensor(list(scales), dtype=torch.float32))
        self.dropout: Tensor | None = None
        self._handles: list[Any] = []

    def __len__(self) -> int:
        return len(self.ranks)

    def init_(self, generator: torch.Generator) -> Bank:
        """peft's default: A uniform in +-1/sqrt(in) (Kaiming with a = sqrt 5), B zero; independent draws per LoRA."""
        keep = torch.arange(max(self.ranks)) < torch.tensor(self.ranks)[:, None]
        with torch.no_grad():
            for a, m in zip(self.A, self.spec, strict=True):
                draw = torch.rand(a.shape, generator=generator) * 2 - 1
                a.copy_((draw / math.sqrt(m.in_) * keep[:, :, None]).to(a.device))
        return self

    def attach(self, model: nn.Module, prefix: str) -> Bank:
        """Add the bank to `model`'s layers; rows must come as (K * n, tokens, in)."""
        for a, b, m in zip(self.A, self.B, self.spec, strict=True):
            layer = model.get_submodule(m.name.removeprefix(prefix))
            self._handles.append(layer.register_forward_hook(self._hook(a, b)))
        return self

    def drop_(self, share: Sequence[float], generator: torch.Generator) -> Bank:
        """LoRA dropout, a share of its own for every LoRA: what its A sees loses entries at random, as in peft."""
        self.dropout, self._generator = torch.tensor(list(share))[:, None, None], generator
        return self

    def _hook(self, a: Tensor, b: Tensor) -> Any:
        def add(_: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
            x = args[0].reshape(len(self), -1, args[0].shape[-1])  # (K, n * tokens, in)
            if self.dropout is not None:
                keep = torch.rand(x.shape, generator=self._generator) >= self.dropout
                x = x * keep / (1 - self.dropout)
            low = torch.bmm(x, a.transpose(1, 2)) * self.scales[:, None, None]
            return out + torch.bmm(low, b.transpose(1, 2)).view_as(out)

        return add

    def detach_(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def loras(self) -> list[LoRA]:
        """The K LoRAs at their own ranks."""
        from lolgen.lora import Factors

        return [
            LoRA(
                self.spec,
                {
                    m.name: Factors(
                        b[k, :, :r].detach().cpu().clone(),
                        a[k, :r].detach().cpu().clone(),
                        float(self.scales[k]),
                    )
                    for a, b, m in zip(self.A, self.B, self.spec, strict=True)
                },
                {},
                {},
            )
            for k, r in enumerate(self.ranks)
        ]

    @staticmethod
    @contextmanager
    def attached(model: nn.Module, batch: Batch, prefix: str = "") -> Iterator[None]:
        """The K LoRAs of a batch at work in `model` for a while, with gradients to their factors."""
        bank, handles = Bank(batch.spec, [1] * len(batch), [1.0] * len(batch)), []
        try:
            for group in batch.groups:
                for j, m in enumerate(group.index):
                    layer = model.get_submodule(batch.spec.names[m].removeprefix(prefix))
                    hook = bank._hook(group.V[:, j].mT, group.U[:, j])
                    handles.append(layer.register_forward_hook(hook))
            yield
        finally:
            for handle in handles:
                handle.remove()

    @staticmethod
    def of(loras: Sequence[LoRA]) -> Bank:
        """A bank that holds the given LoRAs (to draw with many of them at once)."""
        ranks = [max(f.rank for f in lora.factors.values()) for lora in loras]
        bank = Bank(loras[0].spec, ranks, [1.0] * len(loras))
        with torch.no_grad():
            for k, lora in enumerate(loras):
                for a, b, m in zip(bank.A, bank.B, bank.spec, strict=True):
                    f = lora.factors[m.name]
                    a[k, : f.rank] = f.A.float()
                    b[k, :, : f.rank] = f.B.float() * f.scale
        return bank


class BankAdam:
    """AdamW over a bank with a learning rate, a weight decay and a number of steps of its own for every LoRA."""

    def __init__(self, bank: Bank, lr: Tensor, weight_decay: Tensor, steps: Tensor) -> None:
        self.params = [*bank.A, *bank.B]
        self.lr, self.weight_decay, self.steps, self.t = lr, weight_decay, steps, 0
        self.m = [torch.zeros_like(p) for p in self.params]
        self.v = [torch.zeros_like(p) for p in self.params]

    @torch.no_grad()
    def step(self) -> None:
        """One step for every LoRA that has steps left; the rate falls linearly over its last 40 %."""
        self.t += 1
        left = ((self.steps - self.t + 1) / (0.4 * self.steps)).clamp(0, 1)
        lr = (self.lr * left)[:, None, None]
        c1, c2 = 1 - 0.9**self.t, 1 - 0.99**self.t
        for p, m, v in zip(self.params, self.m, self.v, strict=True):
            if p.grad is None:
                continue
            m.lerp_(p.grad, 0.1)
            v.mul_(0.99).addcmul_(p.grad, p.grad, value=0.01)
            p.mul_(1 - lr * self.weight_decay[:, None, None])
            p.sub_(lr * (m / c1) / ((v / c2).sqrt() + 1e-8))
            p.grad = None
