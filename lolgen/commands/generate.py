"""`lolgen generate`: an adapter from attributes, without training."""

from __future__ import annotations

import argparse

from lolgen.commands.common import FORMATS, Subparsers, closing_lines, one_thread, pair, request_of, show


def add(sub: Subparsers) -> None:
    p = sub.add_parser("generate", help="an adapter from attributes, without training")
    p.add_argument("--set", dest="request", type=pair, action="append", default=[], metavar="NAME=VALUE",
                   help="an attribute asked for; repeat it; what is left open is sampled")  # fmt: skip
    add_making(p)
    p.set_defaults(run=run)


def add_making(p: argparse.ArgumentParser) -> None:
    """The options of every command that makes an adapter from nothing."""
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rank", type=int, default=4, help="1 to 64")
    p.add_argument("--format", default="peft", choices=FORMATS)
    p.add_argument("--subject", default="sks person", help="how prompts name the identity")
    p.add_argument("-o", "--out", required=True, help="folder (peft) or .safetensors file")
    p.add_argument("--preview", metavar="PNG", help="draw a grid of pictures with it")
    p.add_argument("--base", help="pipeline folder or hub id to preview with (default: the embedded tiny-sd)")
    p.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    request = request_of(args.request)
    from lolgen import pipeline

    one_thread()
    report = pipeline.generate(
        request, args.out, seed=args.seed, rank=args.rank, format=args.format, subject=args.subject,
        preview=args.preview, base=args.base,
    )  # fmt: skip
    lines = [
        f"{report['adapter']}: rank {report['rank']}, {report['modules']} modules, {report['seconds']} s"
    ]
    lines += [f"  {n}: {v}" for n, v in report["attributes"].items()]
    show(report, lines + closing_lines(report), args.json)
    return 0
