"""`lolgen search`: index a folder of adapters; find those like one, and duplicates."""

from __future__ import annotations

import argparse
import json
import sys

from lolgen.commands.common import Subparsers, one_thread


def add(sub: Subparsers) -> None:
    p = sub.add_parser("search", help="index a folder of adapters; find those like one, and duplicates")
    actions = p.add_subparsers(dest="action", required=True)
    where = "the index's folder (default: .lolgen-search, here or above)"

    q = actions.add_parser("index", help="index every adapter below a folder, or bring the index up to date")
    q.add_argument("folder")
    q.add_argument("--index", metavar="DIR", help="the index's folder (default: .lolgen-search in FOLDER)")
    q.add_argument("--json", action="store_true")
    q.set_defaults(run=run_index)

    q = actions.add_parser("like", help="the indexed adapters most like one")
    q.add_argument("path")
    q.add_argument("--index", metavar="DIR", help=where)
    q.add_argument("-n", type=int, default=10, help="how many (default 10)")
    q.add_argument("--json", action="store_true")
    q.set_defaults(run=run_like)

    q = actions.add_parser(
        "duplicates", help="indexed adapters with the same delta W, whatever gauge, rank, format"
    )
    q.add_argument("--index", metavar="DIR", help=where)
    q.add_argument("--threshold", type=float, default=0.999, metavar="COSINE",
                   help="cosine from which two are the same (default 0.999)")  # fmt: skip
    q.add_argument("--json", action="store_true")
    q.set_defaults(run=run_duplicates)


def run_index(args: argparse.Namespace) -> int:
    from lolgen.tools.search.build import build

    one_thread()
    done = build(args.folder, args.index)
    for error in done.bad.values():
        print(f"lolgen: {error}", file=sys.stderr)
    if args.json:
        print(json.dumps(done.to_json()))
    else:
        print(
            f"{done.total} adapters: {done.indexed} read, {done.unchanged} unchanged, {done.removed} gone, "
            f"{len(done.bad)} bad; {done.seconds} s"
        )
    return 0


def run_like(args: argparse.Namespace) -> int:
    from lolgen.tools.search.query import like, open_index

    one_thread()
    hits = like(open_index(args.index, args.path), args.path, args.n)
    if args.json:
        print(json.dumps([vars(h) for h in hits]))
    else:
        for h in hits:
            print(f"{h.cosine:.4f}  {h.path}  ({h.family or 'unknown'}, {h.strength:.3g} times as strong)")
    return 0


def run_duplicates(args: argparse.Namespace) -> int:
    from lolgen.tools.search.query import duplicates, open_index

    one_thread()
    found = duplicates(open_index(args.index), args.threshold)
    if args.json:
        print(json.dumps(found))
    else:
        print("\n\n".join("\n".join(g["files"]) for g in found) or "no duplicates")
    return 0
