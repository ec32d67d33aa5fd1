"""Adapters as the editors take them."""

from __future__ import annotations

from pathlib import Path

import torch

from lolgen import io
from lolgen.lora import Factors, LoRA, Spec


def open_adapter(path: str | Path | LoRA, format: str | None, spec: Spec) -> tuple[LoRA, str]:
    """An adapter of this base with all of its modules, and the format to write: the one it came in by default."""
    if isinstance(path, LoRA):
        return path, format or "peft"
    lora = io.load(path, modules=spec)
    missing = [n for n in spec.names if n not in lora.spec]
    if missing:
        # A module that a file leaves out is one that the adapter does not change.
        zeros = {
            n: Factors(
                torch.zeros(spec[n].out, 1, dtype=lora.dtype),
                torch.zeros(1, spec[n].in_flat, dtype=lora.dtype),
            )
            for n in missing
        }
        lora = LoRA(spec, {**lora.factors, **zeros}, lora.metadata, lora.extras)
    return lora, format or io.detect(path)


def carried(lora: LoRA) -> list[str]:
    """A warning when the file holds tensors that are no factors."""
    some = next(iter(lora.extras), None)
    return (
        [f"it carries tensors that are no factors ({some}, ...): kept as they are, not edited"]
        if some
        else []
    )
