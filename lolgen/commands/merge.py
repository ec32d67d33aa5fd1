"""`lolgen merge`: one adapter out of several, of any ranks, formats and modules."""

from __future__ import annotations

import argparse

from lolgen.commands.common import Subparsers, show
from lolgen.commands.options import add_output, add_target, amount, errors, kept, ranks, written

METHODS = ("sum", "average", "ties", "dare", "orthogonal")
HELP = """methods, all on delta W, none dependent on the factors' gauge:
  sum         the weighted sum, exact (no cross terms)
  average     the same with weights divided by their sum
  ties        trim, elect signs, mean of those that agree; in the shared basis of the inputs' subspaces
  dare        random drop and rescale in that basis, unbiased; by --seed
  orthogonal  each LoRA without what lies in the column and row spaces of those before it
"""


def add(sub: Subparsers) -> None:
    p = sub.add_parser(
        "merge",
        help="one adapter out of several, of any ranks, formats and modules",
        epilog=HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("inputs", nargs="+", metavar="PATH[:WEIGHT]",
                   help="an adapter and its weight (default 1; may be negative)")  # fmt: skip
    p.add_argument("--method", choices=METHODS, default="sum")
    p.add_argument("--density", type=float, default=0.5, help="share that ties and dare keep (default 0.5)")
    p.add_argument("--seed", type=int, default=0, help="of dare")
    add_target(p)
    add_output(p)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lolgen.tools.files import parse
    from lolgen.tools.merge import merge

    report = merge(
        [parse(t) for t in args.inputs],
        method=args.method,
        density=args.density,
        seed=args.seed,
        **kept(args),
    )
    lines = [
        f"{m['name']}: rank {m['rank']}, norm {m['norm']:.4g}, {errors(m)}, from the sum {m['from_sum']:.3g}"
        for m in report["modules"]
    ]
    lines += [
        f"{i['path']}: weight {i['weight']:g}, {i['modules']} modules, {ranks(i)}, norm {i['norm']:.4g}, "
        f"used {i['used']:.1%}"
        for i in report["inputs"]
    ]
    if len(report["inputs"]) > 1 and not report["shared_modules"]:
        lines.append("no module is in all inputs: are they for one base?")
    lines += [
        f"{report['method']}: {ranks(report['after'])}, norm {report['norm']:.4g}, {errors(report)}, "
        f"from the plain sum {report['from_sum']:.3g}",
        amount(report["after"]),
        written(report),
    ]
    show(report, lines, args.json)
    return 0
