"""Do the shipped readers say when they are guessing?  python -m train.strangers_bench  ->  reports/strangers.json, .md

The share of several kinds of LoRAs that each reader calls unlike its zoo: its own test LoRAs (a few by design), other
ranks, another base, and LoRAs that are like nothing in the zoo (`lolgen.tasks.paper.strangers`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch

from lolgen.io.atomic import write_file
from lolgen.paths import checkpoints_dir
from lolgen.tasks.paper.strangers import flagged


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("reports"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = [
        n for n in ("attributes", "clip_score", "styles") if (checkpoints_dir() / "predictors" / n).is_dir()
    ]
    shares = {name: flagged(name) for name in names}
    report = {"command": "python -m train.strangers_bench", "called_unlike_the_zoo": shares}
    lines = ["# What readers call unlike their zoo", "", f"`{report['command']}`", ""]
    for name, found in shares.items():
        lines += [f"## {name}", "", "| LoRAs | called unlike |", "| --- | --- |"]
        lines += [*(f"| {kind} | {share:.3f} |" for kind, share in found.items()), ""]
    write_file(args.out / "strangers.json", (json.dumps(report, indent=1) + "\n").encode())
    write_file(args.out / "strangers.md", ("\n".join(lines)).encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
