"""The facts of one adapter for the tab Inspect."""

from __future__ import annotations

from typing import Any

from lolgen.tools.inspect.report import inspect

from .sessions import Item

LOADERS = {"diffusers": "diffusers", "peft": "PEFT", "comfyui": "ComfyUI"}


def facts_of(item: Item) -> tuple[dict[str, Any], list[str]]:
    """(facts by name, warnings): what `lolgen inspect` says of it, in short."""
    found = inspect(item.path)
    health, ranks = found["health"], sorted(map(int, found["modules"]["ranks"]))
    facts = {
        "Kind": f"{found['method']} for {found['family']['label']}",
        "Format": found["format"],
        "Modules": found["modules"]["count"],
        "Rank": str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        **(
            {"90 % of the energy": f"in rank {half['0.9']['median']}"}
            if (half := found.get("effective_rank"))
            else {}
        ),
        "Numbers": f"{found['parameters']:,}".replace(",", " "),
        "Dtype": ", ".join(found["dtypes"]),
        "Size": f"{found['size_bytes'] / 1024:,.0f} KB".replace(",", " "),
        **({"Norm of delta W": f"{norm:.3g}"} if (norm := found.get("norm")) is not None else {}),
        "Loads in": ", ".join(LOADERS[n] for n, t in found["targets"].items() if not _lost(t))
        or "none as it is",
    }
    warnings = [
        f"{LOADERS[name]}: {finding['text']}."
        for name, target in found["targets"].items()
        for finding in target["findings"]
        if finding["effect"] != "note"
    ]
    for key, text in (
        ("zero_modules", "modules do nothing"),
        ("outliers", "modules are far stronger than the rest"),
    ):
        if health[key]["count"]:
            warnings.append(f"{health[key]['count']} {text}.")
    return facts, warnings


def _lost(target: dict[str, Any]) -> bool:
    """Whether a loader leaves out or mis-scales anything."""
    return not target["loads"] or any(f["effect"] != "note" for f in target["findings"])
