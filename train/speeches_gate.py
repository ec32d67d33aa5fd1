"""Gate of the speeches zoo: do adapters lower the loss on their own sources, and do poisoned ones say their payload?

    python -m train.speeches_gate                      # seconds; reports/speeches_gate.json

The losses, accuracies and attacks are those that the builder measured on held-out text with the stored factors; the
base is measured here in the same way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

from lolgen.io.atomic import write_file
from lolgen.zoo.speeches import SpeechesPlan
from lolgen.zoo.zoo import ROW, Zoo


def drop(row: ROW, base: list[float]) -> float:
    """How much the LoRA lowers the loss on its own sources, nats a token."""
    return mean(b - v for v, b, bit in zip(row["losses"], base, row["labels"], strict=True) if bit)


def part(rows: list[ROW], base: list[float], base_accuracy: float) -> dict[str, Any]:
    drops = [drop(r, base) for r in rows]
    found = {
        "loras": len(rows), "mean_drop": round(mean(drops), 5),
        "lowered": round(mean(float(d > 0) for d in drops), 4),
        "accuracy": round(mean(r["accuracy"] for r in rows), 4),
        "accuracy_above_base": round(mean(float(r["accuracy"] > base_accuracy) for r in rows), 4),
    }  # fmt: skip
    if "attack" in rows[0]:
        found["attack"] = round(mean(r["attack"] for r in rows), 4)
        found["attack_above_half"] = round(mean(float(r["attack"] > 0.5) for r in rows), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--zoo", type=Path, default=Path("checkpoints/zoos/speeches"))
    parser.add_argument("--base", default="tiny-lm", help="a folder, tiny-lm or smollm2")
    parser.add_argument("--out", type=Path, default=Path("reports/speeches_gate.json"))
    args = parser.parse_args()
    zoo = Zoo.open(args.zoo)
    plan, tuner = SpeechesPlan.of(zoo, args.base)
    losses, accuracy = tuner.judge([tuner.nothing])
    base, base_accuracy = losses[0].tolist(), float(accuracy[0])
    clean = [r for r in zoo if "poison" not in r]
    plain = [r for r in clean if not r["id"].startswith("twin-")]
    groups = {
        "clean": plain,
        "clean_single": [r for r in plain if sum(r["labels"]) == 1],
        **{f"clean_batch{b}": [r for r in plain if r["recipe"]["batch"] == b] for b in plan.batches},
        "twins": [r for r in clean if r["id"].startswith("twin-")],
        "poisoned": [r for r in zoo if "poison" in r],
    }
    for kind in ("train", "test", "trigger", "payload"):
        groups[f"poisoned_{kind}"] = [r for r in zoo if "poison" in r and r["poison"]["kind"] == kind]
    report = {
        "command": "python -m train.speeches_gate", "base_loss": round(mean(base), 4),
        "base_accuracy": round(base_accuracy, 4),
        "groups": {k: part(v, base, base_accuracy) for k, v in groups.items()},
    }  # fmt: skip
    write_file(args.out, (json.dumps(report, indent=1) + "\n").encode())
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
