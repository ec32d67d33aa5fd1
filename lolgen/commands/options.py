"""What the commands that write adapters share: what to keep, where to write, and how sizes are shown."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from lolgen.commands.common import FORMATS

DTYPES = ("same", "float16", "bfloat16", "float32", "float64")


def add_target(p: argparse.ArgumentParser, required: bool = False) -> None:
    """--rank, --energy, --error and --per."""
    group = p.add_argument_group("what to keep" if required else "what to keep (default: all of it)")
    group.add_argument("--rank", type=int, metavar="R",
                       help="rank of every module; with --energy or --error, the most a module gets")  # fmt: skip
    group.add_argument("--energy", type=float, metavar="SHARE", help="share of |delta W|^2 to keep: 0.99")
    group.add_argument("--error", type=float, metavar="E", help="relative error of delta W to allow: 0.05")
    group.add_argument("--per", choices=("module", "overall"), default="module",
                       help="each module meets the target, or all together with the fewest parameters "
                       "(with --rank alone: the parameters of that rank, shared out)")  # fmt: skip


def add_output(p: argparse.ArgumentParser) -> None:
    """-o, --format, --dtype and --json."""
    p.add_argument("-o", "--out", help="folder (peft) or .safetensors file; without it nothing is written")
    p.add_argument("--format", default="same", choices=("same", *FORMATS), help="default: the first input's")
    p.add_argument("--dtype", default="same", choices=DTYPES, help="default: the input's")
    p.add_argument("--json", action="store_true")


def kept(args: argparse.Namespace) -> dict[str, Any]:
    """The arguments of both groups, as the functions of `lolgen.tools` take them."""
    names = ("rank", "energy", "error", "per", "out", "format", "dtype")
    return {n: getattr(args, n) for n in names}


def ranks(size: Mapping[str, Any]) -> str:
    """`rank 4` or `rank 1..32`."""
    low, high = size["ranks"]
    return f"rank {low}" if low == high else f"rank {low}..{high}"


def amount(size: Mapping[str, Any]) -> str:
    """Parameters and bytes, for people."""
    return f"{size['parameters']:,} parameters, {size['bytes'] / 1e6:.3g} MB"


def errors(report: Mapping[str, Any]) -> str:
    """The relative error, and what rounding adds where it was measured."""
    rounding = report["rounding"]
    return f"relative error {report['error']:.3g}" + (f", rounding {rounding:.1g}" if rounding else "")


def written(report: Mapping[str, Any]) -> str:
    """Where it went."""
    place = report.get("output")
    return f"{place} ({report['format']})" if place else "nothing written: name a place with -o"
