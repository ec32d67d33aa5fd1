"""Build the faces zoo: LoRAs of tiny-sd, one identity each, trained many at once.

    python -m train.zoo_build                        # 2,000 at rank 4 and 5 x 100 at other ranks, two workers
    python -m train.zoo_build --recipe smoke --out runs/zoo-smoke

Kill it at any moment and start it again: it goes on with the banks that are missing, to the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lolgen.paths import checkpoints_dir
from lolgen.zoo.builder import Plan, build

RECIPES = {
    "full": Plan(),
    "smoke": Plan(
        name="smoke", counts={"train": 3, "validation": 1, "test": 2}, ranks=(1, 8), per_rank=2, steps=(2, 3),
        pictures=3, bank=3, prior_pictures=8,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/zoos/faces"))
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    build(RECIPES[args.recipe], args.base or checkpoints_dir() / "tiny-sd", args.out, workers=args.workers)


if __name__ == "__main__":
    main()
