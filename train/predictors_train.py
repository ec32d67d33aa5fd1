"""Fit lolgen's reader for every task of the table and put it on the shelf.

    python -m train.predictors_train                 # 4 min on one core; checkpoints/predictors/TASK
    python -m train.predictors_train --tasks styles

The settings are those of `lolgen eval paper`, seed 0, so that the shipped reader is the one of the table. The rank of a
LoRA is written in the shape of its file: no reader of it is shipped.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.tasks import ours, shelf
from lolgen.tasks.paper.figures import figures
from lolgen.tasks.paper.runner import PAPER, directions
from lolgen.tasks.paper.tasks import TASKS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=[t for t in TASKS if t != "rank"])
    parser.add_argument("--zoos", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/predictors"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    hears = directions(checkpoints_dir() / "tiny-sd")
    for name in args.tasks:
        data = TASKS[name].load(args.zoos or zoos_dir())
        reader = ours.fit(*data.train, *data.validation, data.layout, 0, budget=PAPER, directions=hears)
        path = shelf.save(reader, data.train[0].spec, args.out / name)
        row, labelled = next(iter(data.tests.items()))
        fitted, shipped = (figures(r, *labelled)["metric"] for r in (reader, shelf.load(args.out / name)))
        print(
            f"{row}: {fitted:.4f}, from the shelf {shipped:.4f}, {path.stat().st_size / 1e6:.1f} MB",
            flush=True,
        )


if __name__ == "__main__":
    main()
