"""`lolgen inspect`: what a file is, whether it will load, what is in it."""

from __future__ import annotations

import argparse
import json
import sys

from lolgen.commands.common import Subparsers, one_thread


def add(sub: Subparsers) -> None:
    p = sub.add_parser(
        "inspect",
        help="what an adapter is, whether it will load, what is in it",
        description="What an adapter is, which base it is for, what diffusers, PEFT and ComfyUI will make of it. Of "
        "many files, a table and their relatives. Exit code 0 if at least one file could be read, else 2.",
    )
    p.add_argument("paths", nargs="+", metavar="PATH", help="adapter files or folders, or folders of them")
    p.add_argument("--modules", action="store_true", help="with a line for each module")
    p.add_argument("--base", metavar="FOLDER", help="the base model's folder: count intruder dimensions")
    p.add_argument("--threshold", type=float, default=0.5, help="an intruder's largest cosine (default 0.5)")
    p.add_argument("--k", type=int, default=10, help="singular vectors of each module looked at (default 10)")
    p.add_argument("--near", type=float, default=0.5, metavar="COSINE",
                   help="of many files: list pairs whose delta W have at least this cosine (default 0.5)")  # fmt: skip
    p.add_argument("--json", action="store_true", help="a line of JSON for each file")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lolgen.tools.inspect import many, text

    one_thread()
    found = many.inspect_all(
        args.paths, modules=args.modules, base=args.base, threshold=args.threshold, k=args.k, near=args.near
    )
    reports = []
    for report in found.reports:
        reports.append(report)
        if args.json:
            print(json.dumps(report), flush=True)
    relatives = found.relatives()
    if args.json:
        if len(reports) > 1:
            print(json.dumps({"kind": "relatives", **relatives}))
    elif len(reports) == 1:
        print("\n".join(text.page(reports[0])))
    else:
        print("\n".join([*text.table(reports), *text.related(relatives)]))
    if any("error" not in r for r in reports):
        return 0
    print("lolgen: no file could be read", file=sys.stderr)
    return 2
