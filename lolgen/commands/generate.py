"""`lolgen generate`: an adapter from attributes, without training."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

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
    p = sub.add_parser("generate", help="an adapter from attributes, without training")
    p.add_argument("--set", dest="request", type=pair, action="append", default=[], metavar="NAME=VALUE",
                   help="an attribute asked for; repeat it; what is left open is sampled; "
                   "of speeches: source=NAME or source=NAME:WEIGHT")  # fmt: skip
    p.add_argument("--zoo", default="faces",
                   help="what the adapter is of: faces, speeches (of the language model tiny-lm, where a request has "
                   "one answer: --seed and --subject change nothing), or the folder of a generator of speeches "
                   "of another base")  # fmt: skip
    p.add_argument("--text", help="of speeches: a line that says who is to speak, in place of --set")
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


def sources_of(pairs: Sequence[tuple[str, str]]) -> dict[str, float]:
    """source=NAME[:WEIGHT] as a mapping; LolgenError for another name or a weight that is none."""
    request: dict[str, float] = {}
    for name, value in pairs:
        source, _, weight = value.partition(":")
        try:
            number = float(weight or 1)
        except ValueError:
            number = -1.0
        if name != "source" or number <= 0:
            raise LolgenError(f"found {name}={value}, wanted source=NAME or source=NAME:WEIGHT")
        request[source] = number
    return request


def run_speeches(args: argparse.Namespace) -> int:
    if args.text is not None and args.request:
        raise LolgenError("--text and --set were both given; ask by one of them")
    model = speeches_model(args.zoo)
    if args.preview or args.base:
        raise LolgenError("--preview and --base are for portraits: an adapter of speeches draws nothing")
    from lolgen import pipeline

    one_thread()
    request = sources_of(args.request) if args.text is None else pipeline.sources_in(args.text)
    report = pipeline.speak(request, args.out, rank=args.rank, format=args.format, model=model)
    lines = [
        f"{report['adapter']}: rank {report['rank']}, {report['modules']} modules, {report['seconds']} s",
        *(f"  {s}: {w:g}" for s, w in report["sources"].items()),
        f"  use it with PeftModel.from_pretrained on {report['base']}",
    ]
    show(report, lines, args.json)
    return 0


def run(args: argparse.Namespace) -> int:
    if args.zoo != "faces":
        return run_speeches(args)
    if args.text is not None:
        raise LolgenError("--text is for --zoo speeches; portraits are asked for by --set")
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
