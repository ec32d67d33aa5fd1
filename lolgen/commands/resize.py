"""`lolgen resize`: an adapter at another rank, as near to the old one as that allows."""

from __future__ import annotations

import argparse

from lolgen.commands.common import Subparsers, show
from lolgen.commands.options import add_output, add_target, amount, errors, kept, ranks, written


def add(sub: Subparsers) -> None:
    p = sub.add_parser("resize", help="another rank, or the fewest parameters for an error; optimal")
    p.add_argument("path")
    add_target(p, required=True)
    add_output(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lolgen.tools.resize import resize

    report = resize(args.path, **kept(args))
    lines = [f"{m['name']}: rank {m['rank_before']} -> {m['rank']}, {errors(m)}" for m in report["modules"]]
    before, after = report["before"], report["after"]
    lines += [
        f"overall: {ranks(before)} -> {ranks(after)}, {errors(report)}",
        f"{amount(before)} -> {amount(after)}",
        written(report),
    ]
    show(report, lines, args.json)
    return 0
