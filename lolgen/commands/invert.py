"""`lolgen invert`: a picture to an adapter."""

from __future__ import annotations

import argparse

from lolgen.commands.common import Subparsers, one_thread, show
from lolgen.commands.generate import add_making


def add(sub: Subparsers) -> None:
    p = sub.add_parser("invert", help="an adapter that draws who is in a picture, without training")
    p.add_argument("picture", help="PNG, JPEG, WebP, BMP or GIF; its middle square is read")
    add_making(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lolgen import pipeline

    one_thread()
    report = pipeline.invert(
        args.picture, args.out, seed=args.seed, rank=args.rank, format=args.format, subject=args.subject,
        preview=args.preview, base=args.base,
    )  # fmt: skip
    lines = [f"{report['adapter']}: rank {report['rank']}, {report['format']}, {report['seconds']} s"]
    lines += [f"  {n}: {a['value']} ({a['probability']:.2f})" for n, a in report["attributes"].items()]
    lines += [f"  warning: {text}" for text in report["warnings"]]
    lines += [f"  use it with the prompt: {report['prompt']}"]
    lines += [f"  preview: {report['preview']}"] if args.preview else []
    show(report, lines, args.json)
    return 0
