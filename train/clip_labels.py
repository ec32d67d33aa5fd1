"""Label a zoo: the CLIP score of the base with each of its LoRAs, by really drawing the 33 prompts.

    python -m train.clip_labels                      # faces; 30 min on one core, two workers; resumable

Writes clip_scores.json beside the zoo's index; killed, it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lolgen import clip_score
from lolgen.base import Base
from lolgen.clip_score import Scorer
from lolgen.io.atomic import write_file
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.precision import bf16_matmuls
from lolgen.zoo.zoo import Zoo

_worker: tuple[Scorer, Zoo] | None = None


def key_of(row: dict[str, Any]) -> str:
    return f"{row['id']}@{row['rank']}"


def _start(zoo: Path, base_folder: Path) -> None:
    global _worker
    torch.set_num_threads(1)
    base = Base.load(base_folder)
    bf16_matmuls(base.unet)
    _worker = Scorer(base, clip_score.load_clip(base_folder)), Zoo.open(zoo)


def _score(places: list[int]) -> list[tuple[str, float]]:
    assert _worker is not None
    scorer, zoo = _worker
    rows = [zoo.rows[i] for i in places]
    loras = Zoo(zoo.folder, zoo.info, rows).load().unstack()
    return [(key_of(r), round(float(s), 6)) for r, s in zip(rows, scorer.score(loras), strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--zoo", type=Path, default=None)
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--bank", type=int, default=8, help="LoRAs in one pass")
    args = parser.parse_args()
    folder = args.zoo or zoos_dir() / "faces"
    zoo, out = Zoo.open(folder), Path(folder) / "clip_scores.json"
    report: dict[str, Any] = {
        "command": "python -m train.clip_labels",
        "prompts": list(clip_score.PROMPTS),
        "steps": clip_score.STEPS,
        "guidance": clip_score.GUIDANCE,
        "seed": clip_score.SEED,
        "scores": {},
    }
    if out.is_file():
        found = json.loads(out.read_text("utf-8"))
        if {k: found[k] for k in report if k != "scores"} == {k: report[k] for k in report if k != "scores"}:
            report = found
    scores: dict[str, float] = report["scores"]
    todo = [i for i, r in enumerate(zoo.rows) if key_of(r) not in scores]
    # Train LoRAs come last and in no order of their recipes, so that a build cut short is an unbiased sample of them.
    todo.sort(key=lambda i: (zoo.rows[i]["split"] == "train", zoo.rows[i]["rank"], zoo.rows[i]["id"]))
    # Rows of one rank share a pass: a bank pads to its largest.
    chunks: list[list[int]] = []
    for i in todo:
        if (
            not chunks
            or len(chunks[-1]) == args.bank
            or zoo.rows[chunks[-1][0]]["rank"] != zoo.rows[i]["rank"]
        ):
            chunks.append([])
        chunks[-1].append(i)
    context = multiprocessing.get_context("spawn")
    bar = tqdm(total=len(zoo), initial=len(zoo) - len(todo), unit="LoRA", mininterval=5)
    base_folder = args.base or checkpoints_dir() / "tiny-sd"
    with context.Pool(args.workers, _start, (Path(folder), base_folder)) as pool:
        for done, found_scores in enumerate(pool.imap_unordered(_score, chunks), 1):
            scores.update(found_scores)
            bar.update(len(found_scores))
            if done % 10 == 0 or done == len(chunks):
                report["scores"] = scores = dict(sorted(scores.items()))
                write_file(out, (json.dumps(report, indent=0) + "\n").encode())
    bar.close()


if __name__ == "__main__":
    main()
