"""Tune the edits of speeches: how far a source is moved, for lolgen and for its rivals, on validation text.

    python -m train.speeches_edit_tune       # 50 min on one core; editor.json and rivals.json of checkpoints/speeches
    python -m train.speeches_edit_tune --systems ridge --doing add      # a part of it
    python -m train.speeches_edit_tune --recipe smoke --out runs/speeches

Other requests than those of `lolgen eval speeches-edit`, validation windows. An addition: the most drop in
log-perplexity, the mean of the added source and of the rest. A removal: the most drop on the rest less how far the
removed source is from where training anew would leave it. Means over adapters of one, two, and more sources.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lolgen.io.atomic import write_file
from lolgen.lora import Batch
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.speaker import Speaker
from lolgen.speech_editor import FILE, Amounts, SpeechEditor
from lolgen.tasks.respeak import (
    DOINGS,
    FACTORS,
    RIVALS,
    Cases,
    Edit,
    all_cases,
    along,
    by_editor,
    directions_of,
    judged,
    trained,
)
from lolgen.tasks.speak import Judge, at_work
from lolgen.zoo.zoo import Zoo

SEED = 1
SYSTEMS = ("lolgen", *RIVALS)
RECIPES: dict[str, dict[str, Any]] = {
    "full": {
        "count": None, "windows": 40,
        "kept": (0.5, 0.6, 0.7, 0.85, 1.0), "amount": (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0),
        "reach": (0.5, 0.75, 1.0, 1.25), "common": (0.0, 0.25, 0.5), "removed": (1.5, 2.0, 2.5, 3.0, 4.0),
        "deepest": (0.2, 0.4, 0.6, 0.8, 1.0),
    },
    "smoke": {
        "count": 1, "windows": 2, "kept": (0.7,), "amount": (0.5,), "reach": (1.0,), "common": (0.0,),
        "removed": (2.0,), "deepest": (0.5,),
    },
}  # fmt: skip


class Trials:
    """The edits of one doing, and what a way to do them scores."""

    def __init__(self, judge: Judge, every: list[tuple[Cases, Batch, Batch]]) -> None:
        self.judge, self.every = judge, every
        self.targets = [judged(judge, c, again)[0] for c, _, again in every]

    def score(self, edit: Edit) -> float:
        scores = []
        for (cases, before, _), target in zip(self.every, self.targets, strict=True):
            source, rest = judged(self.judge, cases, edit(before, cases.source))
            scores.append((source + rest) / 2 if cases.doing == "add" else rest - abs(source - target))
        return sum(scores) / len(scores)

    def best(self, name: str, tries: Iterable[tuple[Any, Edit]]) -> Any:
        """What scores most."""
        found = [(self.score(edit), what) for what, edit in tqdm(list(tries), desc=name, mininterval=5)]
        most = max(found, key=lambda f: f[0])
        tqdm.write(f"{name}: {most[1]} scores {most[0]:.5f}")
        return most[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--zoo", type=Path, default=None)
    parser.add_argument("--base", default="tiny-lm", help="a folder, tiny-lm or smollm2")
    parser.add_argument("--out", type=Path, default=None, help="folder of the speaker")
    parser.add_argument(
        "--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS, help="what is not named stays as it is"
    )
    parser.add_argument("--doing", nargs="+", choices=DOINGS, default=DOINGS)
    parser.add_argument("--cache", type=Path, default=Path("reports/.cache/speeches"))
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    out = args.out or checkpoints_dir() / "speeches"
    zoo = Zoo.open(args.zoo or zoos_dir() / "speeches")
    plan, tuner = at_work(zoo, args.base)
    every = [(c, *trained(tuner, plan, c, SEED, args.cache)) for c in all_cases(SEED, recipe["count"])]
    speaker = Speaker.from_pretrained(out)
    directions = directions_of(tuner, plan, speaker, zoo, args.cache)
    judge = Judge(tuner, "validation", recipe["windows"])
    trials = {d: Trials(judge, [e for e in every if e[0].doing == d]) for d in args.doing}

    def ours(doing: str, amounts: Iterable[Amounts]) -> Amounts:
        tries = ((a, by_editor(SpeechEditor(speaker, a), doing)) for a in amounts)
        found: Amounts = trials[doing].best(f"lolgen {doing}", tries)
        return found

    if "lolgen" in args.systems:
        amounts = SpeechEditor.from_pretrained(out).amounts if (out / FILE).is_file() else Amounts()
        if "add" in args.doing:
            triples = itertools.product(recipe["kept"], recipe["reach"], recipe["common"])
            amounts = ours("add", [replace(amounts, kept=k, reach=r, common=c) for k, r, c in triples])
        if "remove" in args.doing:
            pairs = itertools.product(recipe["removed"], recipe["deepest"])
            amounts = ours("remove", [replace(amounts, removed=m, deepest=d) for m, d in pairs])
        SpeechEditor(speaker, amounts).save_amounts(out)
    path = out / FACTORS
    for name in (n for n in RIVALS if n in args.systems):
        for doing in args.doing:
            shares = recipe["kept"] if doing == "add" else (1.0,)
            sign = 1 if doing == "add" else -1
            tries = [
                ((k, sign * a), along(directions[name], k, sign * a))
                for k, a in itertools.product(shares, recipe["amount"])
            ]
            best = trials[doing].best(f"{name} {doing}", tries)
            # Read again: another process may tune another system.
            factors = json.loads(path.read_text("utf-8")) if path.is_file() else {}
            factors.setdefault(name, {})[doing] = best
            write_file(path, (json.dumps(factors, indent=1) + "\n").encode())


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
