"""Adapter files for the tests of the toolbox: a tiny base, every format, every way of saying the same delta W."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from lolgen import gl, io
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec
from lolgen.testing import random_lora, regauge

BLOCK = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
SPEC = Spec(
    (
        *(ModuleSpec(f"{BLOCK}.attn1.{p}", 16, 16) for p in ("to_q", "to_k", "to_v", "to_out.0")),
        *(ModuleSpec(f"{BLOCK}.attn2.{p}", 16, 12) for p in ("to_k", "to_v")),
        ModuleSpec(f"{BLOCK}.ff.net.2", 16, 64),
        ModuleSpec("unet.mid_block.attentions.0.proj_in", 16, 16),
    )
)


def lora(seed: int = 0, rank: int = 4, spec: Spec = SPEC, scale: float = 1.0, **rest: Any) -> LoRA:
    return random_lora(spec, rank, scale=scale, generator=torch.Generator().manual_seed(seed), **rest)


def padded(x: LoRA, rank: int) -> LoRA:
    """The same delta W at a higher rank."""
    factors = {}
    for name, f in x.factors.items():
        U, V = gl.pad(f.B, f.V, rank)
        factors[name] = Factors(U, V.T.contiguous(), f.scale)
    return x.replace(factors)


def regauged(x: LoRA, condition: float = 30.0, seed: int = 9) -> LoRA:
    """The same delta W in another gauge."""
    return regauge(x, condition=condition, generator=torch.Generator().manual_seed(seed))[0]


def off_group(x: LoRA) -> LoRA:
    """The twin that is no gauge: delta W changes."""
    return regauge(x, condition=30.0, off_group=True, generator=torch.Generator().manual_seed(5))[0]


def copies(x: LoRA, folder: Path) -> dict[str, Path]:
    """The same delta W in other gauges, ranks, precisions and formats."""
    return {
        "kohya": io.save(x, folder / "kohya.safetensors", "kohya"),
        "peft": io.save(x, folder / "peft", "peft"),
        "diffusers": io.save(x, folder / "diffusers.safetensors", "diffusers"),
        "gauge": io.save(regauged(x), folder / "gauge.safetensors", "kohya"),
        "rank": io.save(padded(x, 7), folder / "rank.safetensors", "kohya"),
        "half": io.save(x, folder / "half.safetensors", "kohya", dtype=torch.float16),
        "bfloat": io.save(x, folder / "bfloat.safetensors", "diffusers", dtype=torch.bfloat16),
    }
