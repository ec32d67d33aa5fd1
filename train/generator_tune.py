"""Choose the strength, the share of the residual and the gain of a trained generator, on validation requests.

    python -m train.generator_tune                   # about 4 min; rewrites checkpoints/faces/settings.json

Pictures are scored by the second reader (checkpoints/selector.safetensors). The probe, which judges, takes no part;
nor do the test identities. Half of the requests are partial. Among settings that draw equally well (to .002) the one
that keeps most of the flow's residual wins, as it departs least from the LoRAs of the zoo.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path

import torch
from tqdm import tqdm

from lolgen.base import Base
from lolgen.generator import Generator
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.pictures import SUBJECTS
from lolgen.probe import Probe
from lolgen.tasks.generate import draw, make_cases, score, spread, wanted
from lolgen.zoo.zoo import Zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=None)
    parser.add_argument("--zoo", type=Path, default=None)
    parser.add_argument("--requests", type=int, default=60)
    parser.add_argument("--residual", type=float, nargs="*", default=[0.0, 0.2, 0.4, 0.6])
    parser.add_argument("--strength", type=float, nargs="*", default=[0.4, 0.8])
    parser.add_argument("--gain", type=float, nargs="*", default=[1.0, 1.25])
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.model or checkpoints_dir() / "faces"
    generator = Generator.from_pretrained(folder)
    base = Base.load(checkpoints_dir() / "tiny-sd")
    selector = Probe.load(checkpoints_dir() / "selector.safetensors")
    held = Zoo.open(args.zoo or zoos_dir() / "faces").split("validation")
    cases = make_cases(held, args.requests // 2, args.requests // 2, 11)
    labels = wanted(cases)
    pairs = make_cases(held, 0, 12, 12)
    results = []
    grid = list(itertools.product(args.residual, args.strength, args.gain))
    for residual, strength, gain in tqdm(grid, mininterval=5):
        settings = {"residual": residual, "strength": strength, "gain": gain}
        trial = dataclasses.replace(generator, settings=generator.settings | settings)
        loras, _ = trial.generate([c.request for c in cases], [c.seed for c in cases])
        accuracy = score(selector, draw(base, loras, [SUBJECTS[0]] * len(loras), [0, 1]), labels)[0]
        many, _ = trial.generate([p.request for p in pairs for _ in range(3)], range(36))
        images = draw(base, many, [SUBJECTS[0]] * 36, [0])
        diversity = spread(selector, images.unflatten(0, (12, 3)))
        results.append((accuracy, diversity, settings))
        tqdm.write(f"{settings}: accuracy {accuracy:.4f}, diversity {diversity:.3f}")
    top = max(r[0] for r in results)
    accuracy, diversity, settings = max(
        (r for r in results if r[0] >= top - 0.002), key=lambda r: (r[2]["residual"], r[1])
    )
    dataclasses.replace(generator, settings=generator.settings | settings).save_pretrained(folder)
    print(f"chosen: {settings}: accuracy {accuracy:.4f}, diversity {diversity:.3f}")


if __name__ == "__main__":
    main()
