"""`lolgen predict`: every attribute of adapters, with its probability."""

from __future__ import annotations

import argparse

from lolgen.commands.common import Subparsers, one_thread, show


def add(sub: Subparsers) -> None:
    p = sub.add_parser("predict", help="every attribute of adapters, with its probability")
    p.add_argument("paths", nargs="+")
    p.add_argument(
        "--all", action="store_true",
        help="everything the shipped readers know: attributes or styles, CLIP score, recipe, and what is a guess",
    )  # fmt: skip
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lolgen import pipeline

    one_thread()
    if args.all:
        return _everything(args)
    rows = pipeline.predict(args.paths)
    lines = []
    for row in rows:
        lines.append(row["path"])
        lines += [f"  {n}: {a['value']} ({a['probability']:.2f})" for n, a in row["attributes"].items()]
    show(rows, lines, args.json)
    return 0


def _everything(args: argparse.Namespace) -> int:
    from lolgen import pipeline

    rows = pipeline.read(args.paths)
    lines = []
    for row in rows:
        lines.append(row["path"])
        for name, label in row["labels"].items():
            sure = (
                f"{label['probability']:.2f}"
                if "probability" in label
                else "to".join(f" {x} " for x in label["interval"])
            )
            lines.append(f"  {name}: {label['value']} ({sure.strip()})")
        if row["unlike"]:
            lines.append(f"  unlike the LoRAs that were learned from, so a guess: {', '.join(row['unlike'])}")
    show(rows, lines, args.json)
    return 0
