"""`lolgen compare`: cosine and relative distance of two delta W, overall and by module."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from typing import Any

from lolgen.commands.common import Subparsers, one_thread, show


def add(sub: Subparsers) -> None:
    p = sub.add_parser("compare", help="cosine and relative distance of two delta W")
    p.add_argument("a")
    p.add_argument("b")
    p.add_argument("--modules", action="store_true", help="module by module, with principal angles")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lolgen.tools.compare import compare

    one_thread()
    report = compare(args.a, args.b, modules=args.modules)
    lines = [line(m) for m in report.get("per_module", ())]
    lines.append(overall(report))
    if any(report["extras"].values()):
        lines.append(
            "not compared: tensors that are not factor pairs (DoRA magnitudes, biases, full modules)"
        )
    show(plain(report), lines, args.json)
    return 0


def overall(report: Mapping[str, Any]) -> str:
    """The line that sums it up."""
    return f"cosine {report['cosine']:.6f}, relative distance {report['relative_distance']:.6f}"


def line(row: Mapping[str, Any]) -> str:
    """One module, for people: of the angles the smallest and the largest."""
    text = f"{row['name']}: "
    if row["in"] != "both":
        return text + f"only in {row['in']}, norm {max(row['norm_a'], row['norm_b']):.4g}"
    text += (
        f"rank {row['rank_a']}, {row['rank_b']}, norm {row['norm_a']:.4g}, {row['norm_b']:.4g}, "
        f"cosine {row['cosine']:.4f}, relative distance {row['relative_distance']:.4g}"
    )
    for what in ("column", "row"):
        angles = row[f"{what}_angles"]
        if angles:
            text += f", {what} angles {angles[0]:.1f}..{angles[-1]:.1f} deg"
    return text


def plain(value: Any) -> Any:
    """What JSON can say: an infinite ratio (to a zero LoRA) is null."""
    if isinstance(value, Mapping):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
