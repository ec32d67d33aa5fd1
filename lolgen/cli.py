"""The command `lolgen`: it parses, calls `lolgen.pipeline`, and shows. Errors are one line and exit code 2."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from typing import Any

from lolgen.errors import LolgenError


def _pair(text: str) -> tuple[str, str]:
    name, sep, value = text.partition("=")
    if not sep or not name or not value:
        raise argparse.ArgumentTypeError(f"found {text!r}, wanted NAME=VALUE")
    return name, value


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lolgen", description="Generate, read and compare LoRAs.")
    sub = parser.add_subparsers(dest="command", required=True)

    p = sub.add_parser("generate", help="an adapter from attributes, without training")
    p.add_argument("--set", dest="request", type=_pair, action="append", default=[], metavar="NAME=VALUE",
                   help="an attribute asked for; repeat it; what is left open is sampled")  # fmt: skip
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--rank", type=int, default=4, help="1 to 64")
    p.add_argument("--format", default="peft", choices=["peft", "diffusers", "kohya"])
    p.add_argument("--subject", default="sks person", help="how prompts name the identity")
    p.add_argument("-o", "--out", required=True, help="folder (peft) or .safetensors file")
    p.add_argument("--preview", metavar="PNG", help="draw a grid of pictures with it")
    p.add_argument("--base", help="pipeline folder or hub id to preview with (default: the embedded tiny-sd)")
    p.add_argument("--json", action="store_true")

    p = sub.add_parser("predict", help="every attribute of adapters, with its probability")
    p.add_argument("paths", nargs="+")
    p.add_argument("--json", action="store_true")

    p = sub.add_parser("compare", help="cosine and relative distance of two delta W")
    p.add_argument("a")
    p.add_argument("b")
    p.add_argument("--json", action="store_true")

    p = sub.add_parser("eval", help="write the tables of the README from the stored artefacts")
    p.add_argument("what", choices=["generate", "predict"])
    p.add_argument("--out", default="reports")
    p.add_argument("--quick", action="store_true", help="a small run, to see that everything works")
    p.add_argument("--zoo", help="folder of the zoo (default: the shipped faces)")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0, or 2 with one line on standard error."""
    args = build_parser().parse_args(argv)
    try:
        return _run(args)
    except LolgenError as error:
        print(f"lolgen: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        print(f"lolgen: {error.name} is not installed; pip install 'lolgen[all]'", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("lolgen: stopped", file=sys.stderr)
        return 130


def _run(args: argparse.Namespace) -> int:
    if args.command == "eval":
        return _evaluate(args)
    import torch

    from lolgen import pipeline

    # The models are small: a second thread gains nothing, and beside another busy process it costs seconds.
    torch.set_num_threads(1)
    if args.command == "generate":
        request: dict[str, str] = {}
        for name, value in args.request:
            if request.get(name, value) != value:
                raise LolgenError(f"{name} is asked to be both {request[name]!r} and {value!r}; ask for one")
            request[name] = value
        report = pipeline.generate(
            request, args.out, seed=args.seed, rank=args.rank, format=args.format, subject=args.subject,
            preview=args.preview, base=args.base,
        )  # fmt: skip
        lines = [
            f"{report['adapter']}: rank {report['rank']}, {report['modules']} modules, {report['seconds']} s"
        ]
        lines += [f"  {n}: {v}" for n, v in report["attributes"].items()]
        lines += [f"  use it with the prompt: {report['prompt']}"]
        lines += [f"  preview: {report['preview']}"] if args.preview else []
        _show(report, lines, args.json)
    elif args.command == "predict":
        rows = pipeline.predict(args.paths)
        lines = []
        for row in rows:
            lines.append(row["path"])
            lines += [f"  {n}: {a['value']} ({a['probability']:.2f})" for n, a in row["attributes"].items()]
        _show(rows, lines, args.json)
    else:
        result = pipeline.compare(args.a, args.b)
        _show(
            result,
            [f"cosine {result['cosine']:.6f}, relative distance {result['relative_distance']:.6f}"],
            args.json,
        )
    return 0


def _evaluate(args: argparse.Namespace) -> int:
    from lolgen.paths import checkpoints_dir, zoos_dir

    zoo = args.zoo or zoos_dir() / "faces"
    if args.what == "generate":
        from lolgen.tasks.generate import evaluate

        print(evaluate(zoo, args.out, quick=args.quick))
    else:
        from lolgen.base import Base
        from lolgen.tasks.directions import directions_of
        from lolgen.tasks.predict import evaluate as evaluate_readers

        base = Base.load(checkpoints_dir() / "tiny-sd")
        evaluate_readers(zoo, out=args.out, quick=args.quick, directions=directions_of(base))
    return 0


def _show(data: Any, lines: list[str], as_json: bool) -> None:
    print(json.dumps(data, indent=1) if as_json else "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
