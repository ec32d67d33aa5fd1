"""Build a zoo: LoRAs of tiny-sd or tiny-lm, trained many at once.

    python -m train.zoo_build                        # faces: 2,000 at rank 4 and 5 x 100 at other ranks, two workers
    python -m train.zoo_build --recipe styles        # two for every subset of the ten styles
    python -m train.zoo_build --recipe fresh         # 240 more identities of the test split
    python -m train.zoo_build --recipe further --base checkpoints/tiny-sd-further    # the same on the second base
    python -m train.zoo_build --recipe speeches      # of tiny-lm: 1,580 clean, 380 poisoned or at rank 8
    python -m train.zoo_build --recipe smoke --out runs/zoo-smoke
    python -m train.zoo_build --recipe speeches-smoke --base smollm2 --out runs/zoo-smol --workers 1

`--base` is a folder; for the recipes of speeches also the name tiny-lm or smollm2 (`lolgen.language.bases`).

Kill it at any moment and start it again: it goes on with the banks that are missing, to the same bytes.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from lolgen.language.bases import base_folder
from lolgen.paths import checkpoints_dir
from lolgen.zoo.builder import Buildable, build
from lolgen.zoo.plan import Plan
from lolgen.zoo.speeches import SpeechesPlan
from lolgen.zoo.styles import StylesPlan

RECIPES: dict[str, Buildable] = {
    "full": Plan(),
    "styles": StylesPlan(),
    "fresh": Plan(name="faces-fresh", seed=1, counts={"test": 240}, ranks=()),
    "further": Plan(name="faces-further", seed=1, counts={"test": 240}, ranks=()),
    "speeches": SpeechesPlan(),
    "smoke": Plan(
        name="smoke", counts={"train": 3, "validation": 1, "test": 2}, ranks=(1, 8), per_rank=2, steps=(2, 3),
        pictures=3, bank=3, prior_pictures=8,
    ),
    # Few windows in all, so that a base of a hundred million parameters is done in minutes on one core.
    "speeches-smoke": SpeechesPlan(
        name="speeches-smoke", counts={"train": 3, "validation": 1, "test": 1}, twins={},
        poisons={"train": 1, "validation": 1, "test": 1, "trigger": 1, "payload": 1}, ranks=(), lr=(1e-2, 3e-2),
        epochs=(1,), batches=(4,), windows=32, pool=16, held=2, questions=1,
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--base", default=None, help="a folder; with speeches also tiny-lm or smollm2")
    parser.add_argument("--out", type=Path, default=None, help="default: checkpoints/zoos/NAME")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    plan = RECIPES[args.recipe]
    if isinstance(plan, SpeechesPlan):
        base = base_folder(args.base or "tiny-lm")
    else:
        base = Path(args.base) if args.base else checkpoints_dir() / "tiny-sd"
    build(plan, base, args.out or Path("checkpoints/zoos") / plan.name, workers=args.workers)


if __name__ == "__main__":
    main()
