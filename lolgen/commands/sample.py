"""`lolgen sample`: a new identity."""

from __future__ import annotations

from lolgen.commands.common import Subparsers
from lolgen.commands.generate import add_making, run


def add(sub: Subparsers) -> None:
    p = sub.add_parser("sample", help="a new identity, everything about it drawn by the seed")
    add_making(p)
    p.set_defaults(run=run, request=[], zoo="faces", text=None)
