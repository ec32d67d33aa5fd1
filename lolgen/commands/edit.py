"""`lolgen edit`: the same person, changed."""

from __future__ import annotations

import argparse

from lolgen.commands.common import FORMATS, Subparsers, closing_lines, one_thread, pair, request_of, show


def add(sub: Subparsers) -> None:
    p = sub.add_parser("edit", help="change what an adapter draws, without training")
    p.add_argument("path", help="folder (peft) or .safetensors file, of any rank and gauge")
    p.add_argument("--set", dest="request", type=pair, action="append", default=[], metavar="NAME=VALUE",
                   help="what is to become what; repeat it")  # fmt: skip
    p.add_argument(
        "--strength", type=float, default=1.0, help="0 changes nothing, 1 is the whole edit, 4 the most"
    )
    p.add_argument("--keep", default="all", choices=["all", "identity"],
                   help="all: leave the rest of delta W alone; identity: the person, in a cleaner LoRA")  # fmt: skip
    p.add_argument("--rank", type=int, help="1 to 64 (default: the adapter's own)")
    p.add_argument("--format", choices=FORMATS, help="default: the one it came in")
    p.add_argument("--seed", type=int, default=0, help="of what the edit leaves open: which beard, which hat")
    p.add_argument("-o", "--out", required=True, help="folder (peft) or .safetensors file")
    p.add_argument("--preview", metavar="PNG", help="draw before (first row) and after under the same seeds")
    p.add_argument("--base", help="pipeline folder or hub id to preview with (default: the embedded tiny-sd)")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    request = request_of(args.request)
    from lolgen import pipeline

    one_thread()
    report = pipeline.edit(
        args.path, request, args.out, strength=args.strength, keep=args.keep, rank=args.rank, format=args.format,
        seed=args.seed, preview=args.preview, base=args.base,
    )  # fmt: skip
    lines = [
        f"{report['adapter']}: rank {report['rank']}, {report['format']}, delta W moved by "
        f"{report['moved']:.0%}, {report['seconds']} s"
    ]
    for name, c in report["attributes"].items():
        mark = "*" if name in report["requested"] or name in report["also_set"] else " "
        mark = "!" if name in report["moved_unasked"] else mark
        before, after = c["before"], c["after"]
        lines.append(
            f" {mark} {name}: {before['value']} ({before['probability']:.2f}) -> "
            f"{after['value']} ({after['probability']:.2f})"
            + (", does not show" if name in report["hidden"] else "")
        )
    lines += [f"  also set, as it shows now: {n}={v}" for n, v in report["also_set"].items()]
    lines += [f"  moved unasked: {', '.join(report['moved_unasked'])}"] if report["moved_unasked"] else []
    show(report, lines + closing_lines(report), args.json)
    return 0
