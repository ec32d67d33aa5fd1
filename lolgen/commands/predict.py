"""`lolgen predict`: every attribute of adapters, with its probability."""

from __future__ import annotations

import argparse

from lolgen.commands.common import Subparsers, one_thread, show, speeches_model
from lolgen.errors import LolgenError


def add(sub: Subparsers) -> None:
    p = sub.add_parser("predict", help="every attribute of adapters, with its probability")
    p.add_argument("paths", nargs="+")
    p.add_argument(
        "--all", action="store_true",
        help="everything the shipped readers know: attributes or styles, CLIP score, recipe, and what is a guess",
    )  # fmt: skip
    p.add_argument("--zoo", default="faces",
                   help="what the adapters are of: faces (styles with --all), speeches for how much of every source "
                   "they have, or the folder of an editor of speeches of another base")  # fmt: skip
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lolgen import pipeline

    one_thread()
    if args.zoo != "faces":
        return _sources(args)
    if args.all:
        return _everything(args)
    rows = pipeline.predict(args.paths)
    lines = []
    for row in rows:
        lines.append(row["path"])
        lines += [f"  {n}: {a['value']} ({a['probability']:.2f})" for n, a in row["attributes"].items()]
    show(rows, lines, args.json)
    return 0


def _sources(args: argparse.Namespace) -> int:
    if args.all:
        raise LolgenError("--all is for portraits and styles; no other reader of speeches is shipped")
    from lolgen import pipeline

    rows = pipeline.read_sources(args.paths, model=speeches_model(args.zoo))
    lines = []
    for row in rows:
        lines.append(row["path"])
        there = [f"  {s}: {v:.2f}" for s, v in row["sources"].items() if v >= pipeline.BARELY]
        lines += there or ["  none of the sources, to speak of"]
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
