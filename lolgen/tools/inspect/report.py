"""Everything that is known of one file, as plain data: what `lolgen inspect --json` prints."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from math import isfinite
from pathlib import Path
from statistics import median
from typing import Any

from lolgen.io import names
from lolgen.io.raw import METHODS
from lolgen.lora import Factors, LoRA
from lolgen.tools.inspect import health, spectra
from lolgen.tools.inspect.finding import REFUSES, Finding
from lolgen.tools.inspect.source import Source, open_source
from lolgen.tools.inspect.summary import others, summary
from lolgen.tools.inspect.targets import TARGETS, findings
from lolgen.tools.inspect.variants import variants

SHARES = (0.9, 0.99)
TOP = (1, 2, 4, 8, 16, 32)
MOST = 20
"""Most keys of one kind that a report lists; it always says how many there are."""

Report = dict[str, Any]


def inspect(path: str | Path, *, modules: bool = False) -> Report:
    """The report of an adapter (a file, or a folder with one); of a file that is none, what it is instead.

    `modules`: with an entry for each module. FormatError when it is no safetensors file, or is not there.
    """
    start = time.perf_counter()
    source = open_source(path)
    report = describe(source, modules=modules)
    report["seconds"] = round(time.perf_counter() - start, 3)
    return report


def describe(source: Source, *, modules: bool = False) -> Report:
    """The report of an opened file; see `inspect`."""
    found = source.family
    report: Report = {
        "path": str(source.path),
        "file": source.file.name,
        "kind": _kind(source),
        "format": source.format,
        "loads": source.lora is not None,
        "reason": _reason(source),
        "method": METHODS.get(source.method, source.method),
        "variants": variants(source),
        "family": {
            "name": found.name,
            "label": found.label,
            "certain": found.certain,
            "evidence": list(found.evidence),
        },
        "size_bytes": source.file.stat().st_size,
        "tensors": len(source.rows),
        "parameters": sum(m.numbers for m in source.modules.values()),
        "dtypes": dict(Counter(r["dtype"] for r in source.rows.values()).most_common()),
        "modules": _modules(source),
        "targets": _targets(findings(source)),
        "metadata": {"summary": summary(source.metadata), "other_entries": others(source.metadata)},
    }
    if source.lora is not None:
        report |= _numbers(source.lora, detail=modules)
    else:
        bad = health.not_finite(source)
        report["health"] = {
            "not_finite": _listed([{"key": k, "nan": nan, "inf": inf} for k, nan, inf in bad]),
        }
    return report


def _kind(source: Source) -> str:
    if source.lora is not None:
        return "adapter"
    if source.is_model:
        return "full model"
    return "adapter" if source.method not in ("full", "unknown") else "unknown"


def _reason(source: Source) -> str | None:
    if source.lora is None and source.is_model:
        return "this is a full model, or a part of one, not an adapter"
    return source.reason


def _modules(source: Source) -> Report:
    """By the keys alone, so that files that do not load have it too."""
    adapted = [m for m in source.modules.values() if m.method not in ("unknown",)]
    components = Counter(_component(m.path) for m in adapted)
    ranks = Counter(m.rank for m in adapted if m.rank)
    return {
        "count": len(adapted),
        "methods": dict(Counter(m.method for m in adapted).most_common()),
        "components": dict(components.most_common()),
        "ranks": {str(r): n for r, n in ranks.most_common()},
        "unknown_keys": _listed([m.path for m in source.modules.values() if m.method == "unknown"]),
    }


_KOHYA = {"lora_unet_": "unet", "lora_te_": "text_encoder", "lora_te1_": "text_encoder",
          "lora_te2_": "text_encoder_2", "lora_te3_": "text_encoder_3", "lycoris_": "unet"}  # fmt: skip


def _component(path: str) -> str:
    for prefix, part in _KOHYA.items():
        if path.startswith(prefix):
            return part
    return names.component(path.removeprefix("base_model.model.")) or "model"


def _targets(found: list[Finding]) -> Report:
    return {
        target: {
            "loads": not any(f.target == target and f.effect == REFUSES for f in found),
            "findings": [
                {
                    "effect": f.effect,
                    "text": f.text,
                    "modules": len(f.modules),
                    "example": next(iter(f.modules), None),
                }
                for f in found
                if f.target == target
            ],
        }
        for target in TARGETS
    }


def _numbers(lora: LoRA, detail: bool) -> Report:
    """Scales, norms, spectra, and what is odd about them."""
    huge = [n for n, f in lora.factors.items() if not isfinite(_bound(f) * len(lora))]
    if huge:
        return _too_large(huge)
    values = spectra.singular_values(lora)
    norms = {n: float(s.square().sum().sqrt()) for n, s in values.items()}
    rows: dict[str, Report] = {}
    for module in lora.spec:
        f, s = lora[module.name], values[module.name]
        rows[module.name] = {
            "name": module.name,
            "kind": module.kind,
            "shape": [module.out, module.in_, *module.kernel],
            "rank": f.rank,
            "alpha": round(_alpha(f), 6),
            "scale": f.scale,
            "norm": norms[module.name],
            "largest_singular_value": float(s[0]) if len(s) else 0.0,
            **{f"effective_rank_{share:g}": spectra.needed(s, share) for share in SHARES},
        }
    zero = [n for n, norm in norms.items() if norm == 0]
    off = health.outliers(lora, norms)
    report: Report = {
        "scale": _range([f.scale for f in lora.factors.values()]),
        "alpha": _range([r["alpha"] for r in rows.values()]),
        "norm": sum(n * n for n in norms.values()) ** 0.5,
        "energy": _energy(values),
        "effective_rank": {
            f"{share:g}": _range([r[f"effective_rank_{share:g}"] for r in rows.values()]) for share in SHARES
        },
        "health": {
            "not_finite": _listed([]),
            "zero_modules": _listed(zero),
            "outliers": _listed(
                [{"name": o.name, "norm": o.norm, "times_median": round(o.times, 3)} for o in off]
            ),
        },
    }
    if detail:
        report["module_rows"] = list(rows.values())
    return report


def _too_large(names: list[str]) -> Report:
    """The report of numbers whose squares are past float64: nothing that rests on norms can be said."""
    empty = {"not_finite": _listed([]), "zero_modules": _listed([]), "outliers": _listed([])}
    return {"health": {**empty, "too_large": _listed(names)}}


def _bound(factors: Factors) -> float:
    """More than alpha and the square of |delta W|; infinite where that is past float64."""
    sizes = [float(t.abs().amax()) * t.numel() for t in (factors.B, factors.A)]
    size = sizes[0] * sizes[1] * factors.scale
    return size * size + abs(_alpha(factors))


def _alpha(factors: Factors) -> float:
    return factors.scale * factors.rank


def _energy(values: Mapping[str, Any]) -> Report:
    """Share of the energy that the top k singular values of each module hold, over all modules."""
    total = sum(float(s.square().sum()) for s in values.values())
    longest = max((len(s) for s in values.values()), default=0)
    if not total:
        return {}
    return {
        f"top_{k}": round(sum(float(s[:k].square().sum()) for s in values.values()) / total, 6)
        for k in TOP
        if k < longest or k == 1
    }


def _range(numbers: list[float]) -> Report:
    if not numbers:
        return {"min": 0, "median": 0, "max": 0}
    return {"min": min(numbers), "median": median(numbers), "max": max(numbers)}


def _listed(items: list[Any]) -> Report:
    return {"count": len(items), "first": items[:MOST]}
