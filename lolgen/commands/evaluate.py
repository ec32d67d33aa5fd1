"""`lolgen eval`: write the tables of the README from the stored artefacts."""

from __future__ import annotations

import argparse

from lolgen.commands.common import Subparsers

WHAT = ("generate", "predict", "edit", "invert", "paper", "shipped", "speeches", "speeches-edit")


def add(sub: Subparsers) -> None:
    p = sub.add_parser("eval", help="write the tables of the README from the stored artefacts")
    p.add_argument("what", choices=WHAT)
    p.add_argument("--out", default="reports")
    p.add_argument("--quick", action="store_true", help="a small run, to see that everything works")
    p.add_argument(
        "--zoo", help="folder of the zoo (default: the shipped faces); paper, predict: of all zoos"
    )
    p.add_argument("--workers", type=int, default=2, help="paper, predict: processes, one thread each")
    p.add_argument(
        "--model", help="speeches, speeches-edit: folder of the speaker (default: the shipped one)"
    )
    p.add_argument(
        "--base", default="tiny-lm", help="speeches, speeches-edit: what the zoo is of; smollm2, or a folder"
    )
    p.add_argument("--tasks", nargs="+", help="paper: only these")
    p.add_argument("--models", nargs="+", help="paper, predict: only these")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from lolgen.paths import zoos_dir

    zoo = args.zoo or zoos_dir() / "faces"
    speeches = {"quick": args.quick, "model": args.model, "base": args.base}
    if args.what == "generate":
        from lolgen.tasks.generate import evaluate

        print(evaluate(zoo, args.out, quick=args.quick))
    elif args.what == "paper":
        from lolgen.tasks.paper.report import evaluate as evaluate_paper

        print(
            evaluate_paper(
                args.zoo,
                args.out,
                models=args.models,
                tasks=args.tasks,
                quick=args.quick,
                workers=args.workers,
            )
        )
    elif args.what == "shipped":
        from lolgen.tasks.paper.shipped import evaluate as evaluate_shipped

        print(evaluate_shipped())
    elif args.what == "edit":
        from lolgen import pipeline
        from lolgen.tasks.edit_report import evaluate as evaluate_edits

        print(evaluate_edits(zoo, args.out, edit_file=pipeline.edit, quick=args.quick))
    elif args.what == "speeches":
        from lolgen.tasks.speak import evaluate as evaluate_speeches

        print(evaluate_speeches(args.zoo or zoos_dir() / "speeches", args.out, **speeches))
    elif args.what == "speeches-edit":
        from lolgen.tasks.respeak import evaluate as evaluate_source_edits

        print(evaluate_source_edits(args.zoo or zoos_dir() / "speeches", args.out, **speeches))
    elif args.what == "invert":
        from lolgen.tasks.invert import evaluate as evaluate_inversion

        print(evaluate_inversion(zoo, args.out, quick=args.quick))
    else:
        from lolgen.tasks.paper.report import evaluate_attributes

        print(
            evaluate_attributes(
                args.zoo, args.out, models=args.models, quick=args.quick, workers=args.workers
            )
        )
    return 0
