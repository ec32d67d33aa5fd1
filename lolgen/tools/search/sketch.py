"""A LoRA as one vector whose inner products estimate those of the delta W, whatever gauge, rank, format.

For each module the sketch is `(P U)(Q V)^T`, (p, p), with P (p, out) and Q (p, in) of random signs over sqrt(p); it
depends on delta W = U V^T alone, and `E <sketch(dW1), sketch(dW2)> = <dW1, dW2>` (the bilinear random projection of
Johnson and Lindenstrauss; signs: Achlioptas 2003). The sketches of all modules are added up: each module has
signs of its own, so products of two modules' sketches are zero on average, and a LoRA of any base is one vector of
p^2 numbers. Measured errors are in reports/search.json.

The signs come from SHAKE-128 of the module's name and shape: the same on every machine, with every version of
every library. Changing anything here changes `VERSION`, and old indexes are built anew.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from lolgen.lora import LoRA, ModuleSpec

VERSION = "1"
SIZE = 32
"""p: rows of the projections. A vector has p^2 numbers."""


@torch.no_grad()
def sketch(lora: LoRA, p: int = SIZE) -> Tensor:
    """(p * p,) float64. The same delta W gives the same vector up to rounding; linear in delta W."""
    total = torch.zeros(p, p, dtype=torch.float64)
    for module in lora.spec:
        f = lora[module.name]
        wide = torch.float64 if f.B.dtype == torch.float64 else torch.float32
        left, right = _signs(module)
        PU = (_projection("left", module.out, p) * left).to(wide) @ f.B.to(wide)  # (p, rank)
        VQ = f.A.to(wide) @ (_projection("right", module.in_flat, p) * right).to(wide).T  # (rank, p)
        total += (PU.double() @ VQ.double()) * (f.scale / p)
    return total.flatten()


def direction(lora: LoRA) -> Tensor | None:
    """The sketch at length 1, (p * p,) float32; None for a LoRA that is zero, or whose numbers overflow."""
    vector = sketch(lora)
    size = vector.norm()
    return (vector / size).float() if size > 0 and bool(torch.isfinite(size)) else None


def _signs(module: ModuleSpec) -> tuple[Tensor, Tensor]:
    """The module's own signs of its rows and columns, (out,) and (in_flat,), +1 and -1."""
    seed = f"{canonical(module.name)} {module.out} {module.in_flat}"
    bits = _bits(seed, module.out + module.in_flat)
    return bits[: module.out], bits[module.out :]


def canonical(name: str) -> str:
    """A module's name as all formats can spell it: kohya's underscores, without its prefixes."""
    flat = name.replace(".", "_")
    for prefix, component in _KOHYA:
        if flat.startswith(prefix):
            return component + flat[len(prefix) :]
    return flat


_KOHYA = (("lora_unet_", "unet_"), ("lora_te1_", "text_encoder_"), ("lora_te2_", "text_encoder_2_"),
          ("lora_te_", "text_encoder_"))  # fmt: skip


@lru_cache(maxsize=64)
def _projection(side: str, size: int, p: int) -> Tensor:
    """(p, size) of +1 and -1, shared by all modules of this size, which differ by their own signs."""
    return _bits(f"{side} {size} {p}", p * size).reshape(p, size)


def _bits(seed: str, n: int) -> Tensor:
    """n values of +1 and -1 (float32) from SHAKE-128 of the seed."""
    digest = hashlib.shake_128(f"lolgen sketch {VERSION} {seed}".encode()).digest((n + 7) // 8)
    bits = np.unpackbits(np.frombuffer(digest, dtype=np.uint8))[:n]
    return torch.from_numpy(bits.astype(np.float32)) * 2 - 1
