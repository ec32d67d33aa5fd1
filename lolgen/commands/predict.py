"""`lolgen predict`: every attribute of adapters, with its probability."""

from __future__ import annotations

import argparse

from lolgen.commands.common import Subparsers, one_thread, show


def add(sub: Subparsers) -> None:
    p = sub.add_parser("predict", help="every attribute of adapters, with its probability")
    p.add_argument("paths", nargs="+")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lolgen import pipeline

    one_thread()
    rows = pipeline.predict(args.paths)
    lines = []
    for row in rows:
        lines.append(row["path"])
        lines += [f"  {n}: {a['value']} ({a['probability']:.2f})" for n, a in row["attributes"].items()]
    show(rows, lines, args.json)
    return 0
