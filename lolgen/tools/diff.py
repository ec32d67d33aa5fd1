"""`diff`: what turns one adapter into another, `B - A`, as an adapter and as a report."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from lolgen.tools import compare, files
from lolgen.tools.ranks import Target
from lolgen.tools.resize import truncated
from lolgen.tools.thin import decompose


def diff(
    a: str | Path,
    b: str | Path,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    per: str = "module",
    out: str | Path | None = None,
    format: str | None = None,
    dtype: str | None = None,
) -> dict[str, Any]:
    """`B - A` at its exact rank (at most the sum of the two), or truncated to a target, written to `out` if given.

    The report has the rows of `lolgen.tools.compare.rows`, each with the `rank` and the relative truncation `error`
    of the difference, and the same overall. FormatError for a bad file, ShapeError for adapters of different bases,
    LolgenError for tensors that are not factors: they have no difference.
    """
    target = Target(rank, energy, error, per)
    given = [files.read(a, -1.0), files.read(b, 1.0)]
    files.no_extras(given, "a difference")
    fmt = files.format_of(given, format)
    start = time.perf_counter()
    table = compare.rows(given, progress="compare")
    modules, terms = files.match(given)
    thin = decompose(terms, [-1.0, 1.0], progress="diff")
    cost = {n: sum(m.shape) for n, m in modules.items()}
    made, report = truncated(cost, thin, target, files.dtypes_of(terms, dtype), "diff: factors")
    figures = {row["name"]: row for row in report.pop("modules")}
    for row in table:
        row |= {k: figures[row["name"]][k] for k in ("rank", "error", "rounding")}
    report = {"a": str(a), "b": str(b), "format": fmt, **compare.overall(table), **report, "modules": table}
    report["seconds"] = round(time.perf_counter() - start, 3)
    if out is not None:
        lora = files.result(given, modules, made, {"command": "diff", **report["target"]})
        report["output"] = files.save(lora, out, fmt)
    return report
