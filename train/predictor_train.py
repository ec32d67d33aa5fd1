"""Train the attribute predictor of a zoo.

python -m train.predictor_train                  # seconds; checkpoints/faces/predictor
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from lolgen import pictures
from lolgen.base import Base
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.predictor import Predictor, PredictorConfig
from lolgen.probe import mean_accuracy
from lolgen.tasks.directions import directions_of
from lolgen.zoo.zoo import Zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--zoo", type=Path, default=None)
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/faces/predictor"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = Base.load(args.base or checkpoints_dir() / "tiny-sd")
    zoo = Zoo.open(args.zoo or zoos_dir() / "faces")
    train, held, test = (zoo.split(s) for s in ("train", "validation", "test"))
    directions: Tensor = directions_of(base)
    config = PredictorConfig(
        pictures.ATTRIBUTES, words=len(directions), tokens=directions.shape[1], inputs=directions.shape[2]
    )
    model = Predictor.train_on(
        train.load(), train.labels(), held.load(), held.labels(), directions, config, seed=args.seed
    )
    model.half().save_pretrained(args.out)
    model = Predictor.from_pretrained(args.out, dtype=torch.float32)
    read = model.probabilities(test.load())
    found = torch.stack([read[n].argmax(1) for n in pictures.ATTRIBUTES], 1)
    print(f"test identities: mean accuracy {mean_accuracy(found, test.labels()):.4f}")


if __name__ == "__main__":
    main()
