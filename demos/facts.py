"""The facts of one adapter for the tab Inspect."""

from __future__ import annotations

from typing import Any

from lolgen import io, metrics

from .sessions import Item


def facts_of(item: Item) -> tuple[dict[str, Any], list[str]]:
    """(facts by name, warnings)."""
    lora = io.load(item.path)
    ranks = sorted({f.rank for f in lora.factors.values()})
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for f in lora.factors.values() for t in (f.B, f.A)})
    numbers = sum(t.numel() for f in lora.factors.values() for t in (f.B, f.A))
    files = [item.path] if item.path.is_file() else sorted(item.path.glob("*.safetensors"))[:1]
    facts = {
        "Format": io.detect(item.path),
        "Modules": len(lora.spec),
        "Rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        "Numbers": f"{numbers:,}".replace(",", " "),
        "Dtype": ", ".join(dtypes),
        "Size": f"{sum(f.stat().st_size for f in files) / 1024:,.0f} KB".replace(",", " "),
        "Norm of delta W": f"{float(metrics.norm(lora)):.3g}",
    }
    return facts, []
