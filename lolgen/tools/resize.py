"""`resize`: an adapter at another rank, as near to the old one as that rank allows.

from lolgen.tools import resize
resize.resize("style.safetensors", rank=16, out="small.safetensors")["error"]       # relative, over all modules
resize.resize("style.safetensors", error=0.05, per="overall", out="small.safetensors")
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lolgen.errors import LolgenError
from lolgen.lora import LoRA
from lolgen.tools import files
from lolgen.tools.ranks import Target, choose
from lolgen.tools.thin import Term, Thin, Written, decompose


def resize(
    path: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    per: str = "module",
    out: str | Path | None = None,
    format: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Truncate every module optimally (Eckart, Young 1936); see `lolgen.tools.ranks.Target` for what to keep.

    Without `out` nothing is written: the report says what would be. `format`, `dtype`: None or "same" for the
    input's. Errors in the report are |delta W - its truncation| / |delta W|, in exact arithmetic; `rounding` is
    what a half-precision `dtype` adds. Extras and metadata are kept.

    Raises FormatError for a bad file, LolgenError for a target out of range or none.
    """
    target = Target(rank, energy, error, per)
    if not target.given:
        raise LolgenError(
            "resize: found no target; wanted a rank, an energy or an error (--rank, --energy, --error)"
        )
    given = files.read(path)
    fmt = files.format_of([given], format)
    start = time.perf_counter()
    made, report = resized(given.lora, target, dtype, progress="resize")
    report = {"input": given.path, "format": fmt, **report}
    report["seconds"] = round(time.perf_counter() - start, 3)
    if out is not None:
        recipe = {"command": "resize", **_options(target)}
        lora = files.result([given], {m.name: m for m in given.lora.spec}, made, recipe)
        report["output"] = files.save(lora, out, fmt)
    return report


def resized(
    lora: LoRA, target: Target, dtype: str | None = None, progress: str = ""
) -> tuple[dict[str, Written], dict[str, Any]]:
    """The new factors of every module, and the report on them."""
    terms = {n: [Term(0, f)] for n, f in lora.factors.items()}
    thin = decompose(terms, [1.0], progress=progress)
    cost = {m.name: sum(m.shape) for m in lora.spec}
    dtypes = files.dtypes_of(terms, dtype)
    made, report = truncated(cost, thin, target, dtypes, progress and f"{progress}: factors")
    for row in report["modules"]:
        row["rank_before"] = lora[row["name"]].rank
    before = {n: Written(f, 0.0) for n, f in lora.factors.items()}
    report["before"] = size(before)
    return made, report


def truncated(
    cost: Mapping[str, int], thin: Thin, target: Target, dtypes: Mapping[str, Any], progress: str = ""
) -> tuple[dict[str, Written], dict[str, Any]]:
    """New factors for a decomposition, and the report: per module and overall the norm before, the rank and the
    relative error of the truncation, and the rounding's."""
    ranks = choose(thin.spectra, cost, target, thin.eps)
    made = thin.truncate(ranks, dtypes, progress)
    rows = []
    total = lost = rounded = 0.0
    for name, S in thin.spectra.items():
        square, tail = _square(S), _square(S[ranks[name] :])
        rows.append(
            {
                "name": name,
                "rank": ranks[name],
                "norm": square**0.5,
                "error": relative(tail, square),
                "rounding": relative(made[name].rounding, square),
            }
        )
        total, lost, rounded = total + square, lost + tail, rounded + made[name].rounding
    report = {
        "norm": total**0.5,
        "error": relative(lost, total),
        "rounding": relative(rounded, total),
        "target": _options(target),
        "after": size(made),
        "modules": rows,
    }
    return made, report


def size(made: Mapping[str, Written]) -> dict[str, Any]:
    """Parameters, bytes and ranks (lowest, highest) of factor pairs."""
    tensors = [t for w in made.values() for t in (w.factors.B, w.factors.A)]
    ranks = [w.factors.rank for w in made.values()]
    return {
        "parameters": sum(t.numel() for t in tensors),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
        "ranks": [min(ranks), max(ranks)],
    }


def relative(part: float, whole: float) -> float:
    """The root of a ratio of squares; 0 of nothing."""
    return (part / whole) ** 0.5 if whole else 0.0


def _square(S: Tensor) -> float:
    return float(S.square().flip(0).sum())


def _options(target: Target) -> dict[str, Any]:
    return {
        "rank": target.rank,
        "energy": target.energy,
        "error": target.error,
        "per": target.per if target.given else None,
    }
