"""Fit and tune the editor of a zoo: what is like the zoo, and how far an edit moves each attribute.

    python -m train.editor_train                     # 5 min on one core; familiarity and editor.json of the model
    python -m train.editor_train --rivals lolgen/tasks/rivals.json     # 15 min; the factors of the rivals
    python -m train.editor_train --recipe smoke --model ...

Everything is chosen on validation LoRAs by the second reader (checkpoints/selector.safetensors): the probe and the
test LoRAs take no part. For every attribute the smallest reach is kept that succeeds in 95 of 100 pictures, or the one
with the most success minus collateral where none does. The rivals of `lolgen eval edit` are tuned in the same way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lolgen.base import Base
from lolgen.editor import Editor
from lolgen.generator import Generator
from lolgen.io import atomic
from lolgen.lora import Batch
from lolgen.nn import Familiarity
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.precision import bf16_matmuls
from lolgen.predictor import Predictor
from lolgen.probe import Probe
from lolgen.tasks.editing import NAMES, EditSystem, at, judge, make_edit_cases, pictures_of
from lolgen.tasks.editors import RIVALS, along
from lolgen.zoo.zoo import Zoo
from train.generator_train import moments_of

RECIPES: dict[str, dict[str, Any]] = {
    "full": {
        "loras": 100,
        "seeds": [0],
        "reach": [1.0, 1.25, 1.5, 1.75],
        "rivals": [0.75, 1.0, 1.25, 1.5, 2.0],
    },
    "smoke": {"loras": 2, "seeds": [0], "reach": [1.0], "rivals": [1.0]},
}
SUCCESS = 0.95


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--zoo", type=Path, default=None)
    parser.add_argument(
        "--rivals", type=Path, help="tune the rivals instead, and write their factors to this file"
    )
    args = parser.parse_args()
    torch.set_num_threads(1)
    recipe = RECIPES[args.recipe]
    folder = args.model or checkpoints_dir() / "faces"
    base = Base.load(args.base or checkpoints_dir() / "tiny-sd")
    selector = Probe.load(checkpoints_dir() / "selector.safetensors")
    zoo = Zoo.open(args.zoo or zoos_dir() / "faces")
    train, held = zoo.split("train"), zoo.split("validation")
    familiarity = Familiarity.from_moments(zoo.spec, moments_of(base, zoo.spec.names))
    bf16_matmuls(base.unet)

    def editor(reach: float) -> Editor:
        own = Generator.from_pretrained(folder), Predictor.from_pretrained(folder / "predictor")
        return Editor(*own, familiarity, {n: reach for n in NAMES})

    seen = train.load()
    plain = editor(1.0)
    familiarity.fit(plain.facts(seen, plain.read(seen)))

    count = min(recipe["loras"], len(held))
    cases, loras = make_edit_cases(held, count, 1), held.load()
    subjects = [r["recipe"]["subject"] for r in held]
    before = pictures_of(base, loras[list(range(count))], subjects[:count], recipe["seeds"])

    def lolgen(reach: float) -> EditSystem:
        made = editor(reach)
        return lambda batch, some, strength: made.edit(
            batch, [c.request for c in some], [c.seed for c in some], strength=strength
        )[0]

    def tuned(make: EditSystem | None, grid: list[float], label: str) -> dict[str, float]:
        """Attribute -> the least factor of the grid that succeeds, or the best of them."""
        scores: dict[str, list[tuple[float, float, float]]] = {n: [] for n in NAMES}
        for value in tqdm(grid, desc=label, mininterval=1):
            system, strength = (lolgen(value), 1.0) if make is None else (make, value)
            edited: Batch = system(at(loras, cases), cases, strength)
            after = pictures_of(base, edited, [subjects[c.row] for c in cases], recipe["seeds"])
            judged = judge(selector, held, cases, before, after)
            tqdm.write(f"{label} {value}: {judged.figures()}")
            for name in NAMES:
                part = judged[torch.tensor([c.attribute == name for c in cases])]
                if not len(part.success):
                    continue
                success = float(part.success.mean())
                tqdm.write(f"  {name}: {part.figures()}")
                scores[name].append((success, success - float(part.collateral.mean()), value))
        chosen = {}
        for name, found in scores.items():
            enough = [value for success, _, value in found if success >= SUCCESS - 1e-6]
            best = max(((score, value) for _, score, value in found), default=(0.0, grid[0]))[1]
            chosen[name] = min(enough) if enough else best
        return chosen

    if args.rivals:
        factors = {
            n: tuned(along(w, train, held, familiarity), recipe["rivals"], n) for n, w in RIVALS.items()
        }
        atomic.write_file(args.rivals, (json.dumps(factors, indent=1) + "\n").encode())
        return
    settings = {"reach": tuned(None, recipe["reach"], "lolgen"), "noise": 0.5}
    familiarity.save_pretrained(folder / "familiarity")
    atomic.write_file(folder / "editor.json", (json.dumps(settings, indent=1) + "\n").encode())
    print(settings)


if __name__ == "__main__":
    main()
