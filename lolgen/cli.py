"""The command `lolgen`: it parses, calls one of `lolgen.commands`, and shows. Errors are one line and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lolgen.commands import (
    compare,
    convert,
    demo,
    diff,
    edit,
    evaluate,
    generate,
    inspect,
    invert,
    merge,
    mix,
    predict,
    resize,
    sample,
    search,
)
from lolgen.errors import LolgenError

COMMANDS = (
    demo,
    inspect,
    convert,
    resize,
    merge,
    diff,
    compare,
    search,
    generate,
    sample,
    edit,
    mix,
    invert,
    predict,
    evaluate,
)
"""In the order of `lolgen --help`."""


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lolgen", description="Generate, read, edit and compare LoRAs.")
    sub = parser.add_subparsers(dest="command", required=True)
    for command in COMMANDS:
        command.add(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 with one line on standard error."""
    args = build_parser().parse_args(argv)
    try:
        code: int = args.run(args)
        return code
    except LolgenError as error:
        print(f"lolgen: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"lolgen: {error.name} is not installed; pip install 'lolgen[all]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lolgen: stopped", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
