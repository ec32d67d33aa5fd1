"""The facts of one adapter for the tab Inspect, from `lolgen.tools.inspect`."""

from __future__ import annotations

from typing import Any

from lolgen.tools.inspect import report

from .sessions import Item

PROGRAMS = {"diffusers": "diffusers", "peft": "PEFT", "comfyui": "ComfyUI"}


def facts_of(item: Item) -> tuple[dict[str, Any], list[str]]:
    """(facts by name, warnings). LolgenError when the file cannot be read."""
    found = report.inspect(item.path)
    ranks = sorted(map(int, found["modules"]["ranks"]))
    whole = [
        PROGRAMS[name]
        for name, target in found["targets"].items()
        if target["loads"] and not any(f["effect"] == "drops" for f in target["findings"])
    ]
    facts = {
        "For": found["family"]["label"].split(",")[0],
        "Format": found["format"],
        "Method": found["method"],
        "Modules": found["modules"]["count"],
        "Rank": "mixed" if not ranks else ranks[0] if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
        "Numbers": f"{found['parameters']:,}".replace(",", " "),
        "Dtype": ", ".join(found["dtypes"]),
        "Size": f"{found['size_bytes'] / 1024:,.0f} KB".replace(",", " "),
        "Loads as it is in": ", ".join(whole) or "none of diffusers, PEFT, ComfyUI",
    }
    if "norm" in found:
        facts["Norm of delta W"] = f"{found['norm']:.3g}"
    if "effective_rank" in found:
        facts["Rank with 90 % of the energy"] = f"{found['effective_rank']['0.9']['median']:g} (median)"
    health = found.get("health", {})
    zero = health.get("zero_modules", {}).get("count", 0)
    large = health.get("outliers", {}).get("count", 0)
    warnings = [f"Modules that are zero and change nothing: {zero}."] if zero else []
    if large:
        warnings.append(f"{large} of its modules are far larger than the others: training may have diverged.")
    return facts, warnings
