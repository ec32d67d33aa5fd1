"""`lolgen edit`: the same person, changed; or the same speaker, with sources added or removed."""

from __future__ import annotations

import argparse

from lolgen.commands.common import (
    FORMATS,
    Subparsers,
    closing_lines,
    one_thread,
    pair,
    request_of,
    show,
    speeches_model,
)
from lolgen.errors import LolgenError


def add(sub: Subparsers) -> None:
    p = sub.add_parser("edit", help="change what an adapter draws, or who it speaks like, without training")
    p.add_argument("path", help="folder (peft) or .safetensors file, of any rank and gauge")
    p.add_argument("--set", dest="request", type=pair, action="append", default=[], metavar="NAME=VALUE",
                   help="what is to become what; repeat it")  # fmt: skip
    p.add_argument("--add", type=source, action="append", default=[], metavar="SOURCE",
                   help="of an adapter of speeches: a source that it is to speak like as well; repeat it")  # fmt: skip
    p.add_argument("--remove", type=source, action="append", default=[], metavar="SOURCE",
                   help="of an adapter of speeches: a source that it is to speak like no more; repeat it")  # fmt: skip
    p.add_argument("--zoo", default="speeches",
                   help="with --add, --remove: folder of an editor of another base (default: speeches)")  # fmt: skip
    p.add_argument(
        "--strength",
        type=float,
        default=1.0,
        help="0 changes nothing, 1 is the whole edit, 4 (sources: 2) the most",
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


def source(text: str) -> str:
    """SOURCE or source=SOURCE, for `type=` of an argument."""
    return text.removeprefix("source=")


def run_speeches(args: argparse.Namespace) -> int:
    if args.request:
        raise LolgenError("--set is for portraits, --add and --remove for speeches; ask by one of them")
    if args.preview or args.base or args.keep != "all":
        raise LolgenError(
            "--preview, --base and --keep are for portraits: an adapter of speeches draws nothing"
        )
    from lolgen import pipeline

    one_thread()
    report = pipeline.edit_sources(
        args.path, args.out, add=args.add, remove=args.remove, strength=args.strength, rank=args.rank,
        format=args.format, model=speeches_model(args.zoo),
    )  # fmt: skip
    lines = [
        f"{report['adapter']}: rank {report['rank']}, {report['format']}, delta W moved by "
        f"{report['moved']:.0%}, {report['seconds']} s"
    ]
    if report["added"]:
        lines.append(f"  {report['kept']:.0%} of it stays, to make room")
    asked = {**dict.fromkeys(report["added"], "+"), **dict.fromkeys(report["removed"], "-")}
    for name, c in report["sources"].items():
        if name in asked or max(c["before"], c["after"]) >= pipeline.BARELY:
            lines.append(f" {asked.get(name, ' ')} {name}: {c['before']:.2f} -> {c['after']:.2f}")
    lines += [f"  warning: {text}" for text in report["warnings"]]
    show(report, [*lines, f"  use it with PeftModel.from_pretrained on {report['base']}"], args.json)
    return 0


def run(args: argparse.Namespace) -> int:
    if args.add or args.remove:
        return run_speeches(args)
    request = request_of(args.request)
    if "source" in request:
        raise LolgenError(
            "an adapter of speeches is edited by --add SOURCE and --remove SOURCE, not by --set"
        )
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
