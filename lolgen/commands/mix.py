"""`lolgen mix`: somebody between two identities."""

from __future__ import annotations

import argparse

from lolgen.commands.common import FORMATS, Subparsers, one_thread, read_lines, show


def add(sub: Subparsers) -> None:
    p = sub.add_parser("mix", help="somebody on the way from one adapter's identity to another's")
    p.add_argument("a")
    p.add_argument("b")
    p.add_argument("--t", type=float, default=0.5, help="0 is a, 1 is b")
    p.add_argument("--format", choices=FORMATS, help="default: the one that a came in")
    p.add_argument("-o", "--out", required=True, help="folder (peft) or .safetensors file")
    p.add_argument(
        "--preview", metavar="PNG", help="draw the walk from a to b in five rows, under the same seeds"
    )
    p.add_argument("--base", help="pipeline folder or hub id to preview with (default: the embedded tiny-sd)")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lolgen import pipeline

    one_thread()
    report = pipeline.mix(
        args.a, args.b, args.out, t=args.t, format=args.format, preview=args.preview, base=args.base
    )
    lines = [f"{report['adapter']}: rank {report['rank']}, {report['format']}, {report['seconds']} s"]
    show(report, lines + read_lines(report), args.json)
    return 0
