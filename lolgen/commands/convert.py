"""`lolgen convert`: an adapter in another format, with the error of delta W that this cost."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from lolgen.commands.common import FORMATS, Subparsers, one_thread, show

FAMILIES = ("sd1", "sd2", "sdxl", "sd3", "flux", "llama", "qwen", "mistral", "gemma", "gpt2")
DTYPES = ("float16", "bfloat16", "float32", "float64")


def add(sub: Subparsers) -> None:
    p = sub.add_parser("convert", help="an adapter in another format, read back and compared")
    p.add_argument("path", help="an adapter: a .safetensors file, a PEFT folder, or a folder of those")
    p.add_argument("--to", required=True, choices=FORMATS)
    p.add_argument(
        "-o", "--out", required=True, help="a folder for peft, else a .safetensors file or a folder"
    )
    p.add_argument("--base", choices=FAMILIES, help="the base model's family, where the file leaves it open")
    p.add_argument("--dtype", choices=DTYPES, help="of the written numbers (default: as they are)")
    p.add_argument(
        "--rank", type=int, help="largest rank to write, by the best approximation; the error is printed"
    )
    p.add_argument("--drop", action="store_true", help="leave out what the format cannot hold, and list it")
    p.add_argument("--json", action="store_true")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lolgen.tools.convert import convert

    one_thread()
    report = convert(
        args.path,
        args.out,
        args.to,
        base=args.base,
        dtype=args.dtype,
        rank=args.rank,
        drop=args.drop,
        progress=not args.json,
    )
    show(report.as_dict(), lines(report), args.json)
    return 0


def lines(report: Any) -> list[str]:
    """The report for people."""
    low, high = report.ranks
    ranks = f"rank {low}" if low == high else f"ranks {low} to {high}"
    family = f" of {report.family}" if report.family else ""
    found = [
        f"{report.written}: {report.to}, {report.modules} modules{family}, {ranks}, {report.dtype}"
        f" (from {report.format})",
        f"delta W read back: relative error {report.error.relative:.2e} over all modules, "
        f"worst {report.error.worst_relative:.2e} in {report.error.worst}",
    ]
    if report.truncated:
        found.append(
            f"truncation: relative error {report.truncated.relative:.2e} over all modules, "
            f"worst {report.truncated.worst_relative:.2e} in {report.truncated.worst}"
        )
    for method in dict.fromkeys(c.method for c in report.lycoris):
        some = [c for c in report.lycoris if c.method == method]
        found.append(
            f"{method} to LoRA: {len(some)} modules, exact rank {span([c.exact for c in some])}, "
            f"written rank {span([c.rank for c in some])}, largest error {max(c.error for c in some):.2e}"
        )
    if report.fused:
        found.append(
            f"fused: {len(report.fused)} modules, parts of rank {span([r for f in report.fused for r in f.ranks])}, "
            f"now {span([f.rank for f in report.fused])}, largest error {max(f.error for f in report.fused):.2e}"
        )
    found += [f"left out: {key} ({why})" for key, why in report.dropped.items()]
    if report.header_left:
        found.append(f"header entries left behind: {', '.join(report.header_left)}")
    return found + [f"note: {note}" for note in report.notes]


def span(numbers: Sequence[int]) -> str:
    """`4`, or `4 to 16`."""
    low, high = min(numbers), max(numbers)
    return f"{low}" if low == high else f"{low} to {high}"
