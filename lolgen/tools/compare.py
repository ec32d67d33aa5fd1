"""`compare`: how two adapters relate, overall and module by module, whatever their formats, ranks and gauges."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolgen.errors import LolgenError
from lolgen.tools import files
from lolgen.tools.methods import spaces
from lolgen.tools.thin import Frame, frames


def compare(a: str | Path, b: str | Path, *, modules: bool = False) -> dict[str, Any]:
    """Cosine of the two delta W, and |A - B| / |A| (A is the reference); a module missing in one is zero there.

    `modules`: also a row a module under `per_module`, see `rows`. Tensors that are not factors (DoRA magnitudes,
    biases) are not compared; `extras` counts them. LolgenError when no module is shared.
    """
    given = [files.read(a), files.read(b)]
    table = rows(given)
    shared = [r for r in table if r["in"] == "both"]
    if not shared:
        raise LolgenError(
            f"{a} and {b} share no module: they are for different bases, or name them differently"
        )
    report = {
        "a": str(a),
        "b": str(b),
        **overall(table),
        "modules": {
            "shared": len(shared),
            "only_a": sum(r["in"] == "a" for r in table),
            "only_b": sum(r["in"] == "b" for r in table),
        },
        "extras": {"a": len(given[0].lora.extras), "b": len(given[1].lora.extras)},
    }
    if modules:
        report["per_module"] = table
    return report


def overall(table: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Cosine, relative distance and norms over all modules, from the rows."""
    a, b, d = (sum(r[k] ** 2 for r in table) ** 0.5 for k in ("norm_a", "norm_b", "distance"))
    inner = sum(r["inner"] for r in table)
    return {
        "cosine": _cosine(inner, a, b),
        "relative_distance": _ratio(d, a),
        "norm_a": a,
        "norm_b": b,
        "distance": d,
    }


def rows(given: Sequence[files.Input], progress: str = "") -> list[dict[str, Any]]:
    """A row a module of either of two adapters: `in` ("both", "a", "b"), ranks, norms, `inner` product, `cosine`,
    `distance` |A - B|, `relative_distance` |A - B| / |A|, and for modules of both the principal angles between
    the column spaces and between the row spaces, in degrees, ascending (as many as the smaller rank)."""
    _, terms = files.match(given)
    found = {}
    for frame in frames(terms, progress):
        zero = frame.core(0) * 0
        A, B = (frame.core(frame.index.index(i)) if i in frame.index else zero for i in range(2))
        figures = {
            "norm_a": _norms(A),
            "norm_b": _norms(B),
            "distance": _norms(A - B),
            "inner": (A * B).sum((-2, -1)).tolist(),
        }
        for j, name in enumerate(frame.names):
            ranks = {t.input: t.factors.rank for t in frame.terms[j]}
            row: dict[str, Any] = {
                "name": name,
                "in": "both" if len(ranks) == 2 else "ab"[frame.index[0]],
                "rank_a": ranks.get(0, 0),
                "rank_b": ranks.get(1, 0),
                **{k: v[j] for k, v in figures.items()},
            }
            row["cosine"] = _cosine(row["inner"], row["norm_a"], row["norm_b"])
            row["relative_distance"] = _ratio(row["distance"], row["norm_a"])
            if len(ranks) == 2:
                row["column_angles"], row["row_angles"] = _angles(frame, j)
            found[name] = row
    return [found[n] for n in terms]


def _angles(frame: Frame, j: int) -> tuple[list[float], list[float]]:
    """(between the column spaces, between the row spaces) of module j."""
    first, second = (spaces(E[j], F[j], frame.eps) for E, F in frame.blocks)
    return principal_angles(first[0], second[0]), principal_angles(first[1], second[1])


def principal_angles(Q1: Tensor, Q2: Tensor) -> list[float]:
    """Angles in degrees between the spans of two orthonormal bases, ascending; zero columns count for nothing.
    Small angles come from their sines, as cosines near 1 say nothing (Bjoerck and Golub 1973)."""
    Q1, Q2 = (Q[:, Q.square().sum(0) > 0.5] for Q in (Q1, Q2))
    if Q2.shape[-1] > Q1.shape[-1]:
        Q1, Q2 = Q2, Q1
    M = Q1.mT @ Q2
    cosines = torch.linalg.svdvals(M).clamp(max=1)  # descending
    sines = torch.linalg.svdvals(Q2 - Q1 @ M).flip(-1).clamp(max=1)  # ascending
    return [float(x) for x in torch.rad2deg(torch.atan2(sines, cosines))]


def _norms(C: Tensor) -> list[float]:
    found: list[float] = torch.linalg.matrix_norm(C).tolist()
    return found


def _cosine(inner: float, a: float, b: float) -> float:
    return min(1.0, max(-1.0, inner / (a * b))) if a * b else 0.0


def _ratio(part: float, whole: float) -> float:
    return part / whole if whole else (float("inf") if part else 0.0)
