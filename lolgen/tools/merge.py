"""`merge`: one adapter out of several of any ranks, formats and modules.

from lolgen.tools import merge
merge.merge([("style.safetensors", 0.7), ("person", 0.3)], rank=16, out="both.safetensors")
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lolgen.errors import LolgenError
from lolgen.tools import files
from lolgen.tools.methods import METHODS, Made, Options
from lolgen.tools.ranks import Target
from lolgen.tools.resize import relative, size, truncated
from lolgen.tools.thin import Frame, Written, decompose, weighted_sum


def merge(
    inputs: Sequence[tuple[str | Path, float]],
    *,
    method: str = "sum",
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    per: str = "module",
    density: float = 0.5,
    seed: int = 0,
    out: str | Path | None = None,
    format: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """Combine adapters, (path, weight) each, by one of `lolgen.tools.methods.METHODS`, exactly; then truncate.

    Without `rank`, `energy` or `error` nothing is truncated but what is rounding: ranks add up at most. A module
    that an input does not have counts as zero there. Without `out` nothing is written. `format`, `dtype`: None or
    "same" for the first input's and the widest.

    The report has per module and overall the norm of the exact merge, its relative distance from the plain weighted
    sum (`from_sum`), the truncation's relative error, and per input the share of its norm that the method used.
    Raises FormatError for a bad file, ShapeError for adapters of different bases, LolgenError for extras.
    """
    if not inputs:
        raise LolgenError("merge: found no adapter; wanted PATH or PATH:WEIGHT, one or more")
    target = Target(rank, energy, error, per)
    options = Options(tuple(w for _, w in inputs), density, seed)
    given = [files.read(p, w) for p, w in inputs]
    fmt = files.format_of(given, format)
    start = time.perf_counter()
    made, report = merged(given, method, options, target, dtype, progress="merge")
    report = {"method": method, "format": fmt, **report, "seconds": round(time.perf_counter() - start, 3)}
    if out is not None:
        lora = files.result(given, files.match(given)[0], made, report["recipe"])
        report["output"] = files.save(lora, out, fmt)
    return report


def merged(
    given: Sequence[files.Input],
    method: str,
    options: Options,
    target: Target,
    dtype: str | None = None,
    progress: str = "",
) -> tuple[dict[str, Written], dict[str, Any]]:
    """The factors of every module of the merge, and the report, with the recipe."""
    if method not in METHODS:
        raise LolgenError(f"method: found {method!r}, wanted one of {', '.join(METHODS)}")
    files.no_extras(given, "a merge")
    modules, terms = files.match(given)
    away: dict[str, float] = {}  # squared distance from the plain sum
    plain: dict[str, float] = {}
    parts: dict[
        str, list[tuple[int, float, float]]
    ] = {}  # of a frame: input, its squared norm, what was used

    def core(frame: Frame) -> torch.Tensor:
        made: Made = METHODS[method](frame, options)
        total = weighted_sum(frame, options.weights)
        plain.update(zip(frame.names, total.square().sum((-2, -1)).tolist(), strict=True))
        away.update(zip(frame.names, (made.core - total).square().sum((-2, -1)).tolist(), strict=True))
        parts[frame.names[0]] = [
            (j, float(frame.core(i).square().sum()), float(made.used[i].sum()))
            for i, j in enumerate(frame.index)
        ]
        return made.core

    thin = decompose(terms, options.weights, core, progress)
    whole, used = [0.0] * len(given), [0.0] * len(given)
    for name in terms:  # not in the order in which threads came by
        for j, square, share in parts.get(name, ()):
            whole[j], used[j] = whole[j] + square, used[j] + share
    cost = {n: sum(m.shape) for n, m in modules.items()}
    dtypes = files.dtypes_of(terms, dtype)
    made, report = truncated(cost, thin, target, dtypes, progress and f"{progress}: factors")
    for row in report["modules"]:
        name = row["name"]
        row["inputs"] = [t.input for t in terms[name]]
        row["from_sum"] = relative(away[name], plain[name])
    rows = [
        {
            "path": i.path,
            "format": i.format,
            "weight": i.weight,
            "modules": len(i.lora),
            "norm": whole[k] ** 0.5,
            "used": relative(used[k], whole[k]),
            **size({n: Written(f, 0.0) for n, f in i.lora.factors.items()}),
        }
        for k, i in enumerate(given)
    ]
    recipe: dict[str, Any] = {"command": "merge", "method": method, **report["target"]}
    if method in ("ties", "dare"):
        recipe["density"] = options.density
    if method == "dare":
        recipe["seed"] = options.seed
    report = {
        "inputs": rows,
        "recipe": {k: v for k, v in recipe.items() if v is not None},
        "shared_modules": sum(len(parts) == len(given) for parts in terms.values()),
        "from_sum": relative(sum(away[n] for n in terms), sum(plain[n] for n in terms)),
        **report,
    }
    return made, report
