"""`lolgen compare`: cosine and relative distance of two delta W."""

from __future__ import annotations

import argparse

from lolgen.commands.common import Subparsers, one_thread, show


def add(sub: Subparsers) -> None:
    p = sub.add_parser("compare", help="cosine and relative distance of two delta W")
    p.add_argument("a")
    p.add_argument("b")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lolgen import pipeline

    one_thread()
    result = pipeline.compare(args.a, args.b)
    lines = [f"cosine {result['cosine']:.6f}, relative distance {result['relative_distance']:.6f}"]
    show(result, lines, args.json)
    return 0
