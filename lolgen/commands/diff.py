"""`lolgen diff`: what turns one adapter into another, as an adapter and as a report."""

from __future__ import annotations

import argparse

from lolgen.commands.common import Subparsers, show
from lolgen.commands.options import add_output, add_target, amount, errors, kept, ranks, written


def add(sub: Subparsers) -> None:
    p = sub.add_parser("diff", help="B - A as an adapter, and how each module differs")
    p.add_argument("a")
    p.add_argument("b")
    add_target(p)
    add_output(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lolgen.commands.compare import line, overall, plain
    from lolgen.tools.diff import diff

    report = diff(args.a, args.b, **kept(args))
    lines = [f"{line(m)}; difference: rank {m['rank']}, {errors(m)}" for m in report["modules"]]
    lines += [
        overall(report),
        f"difference: {ranks(report['after'])}, norm {report['distance']:.4g}, {errors(report)}",
        amount(report["after"]),
        written(report),
    ]
    show(plain(report), lines, args.json)
    return 0
