"""`lolgen invert`: a picture to an adapter."""

from __future__ import annotations

import argparse

from lolgen.commands.common import Subparsers, one_thread, read_lines, show
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
    show(report, lines + read_lines(report), args.json)
    return 0
