"""Read the six attributes of 240 unseen LoRAs off their weights, with the shipped reader.

python -m demos.eval_attributes
"""

from __future__ import annotations

import torch

from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.tasks import shelf
from lolgen.zoo.zoo import Zoo


def main() -> None:
    reader = shelf.load(checkpoints_dir() / "predictors" / "attributes")
    test = Zoo.open(zoos_dir() / "faces").split("test")
    loras, labels = test.load(), test.labels()  # -1 where an attribute cannot be seen
    for k, (name, p) in enumerate(reader.predict(loras).items()):
        seen = labels[:, k] >= 0
        right = (p.argmax(1) == labels[:, k])[seen].float().mean()
        print(
            f"{name}: {right:.3f} of {int(seen.sum())} right, mean confidence {p[seen].max(1).values.mean():.3f}"
        )
    odd = loras.map(lambda U, V: (torch.randn_like(U) * U.std(), torch.randn_like(V) * V.std()))
    print(f"called unlike the zoo: {1 - reader.familiar(loras).float().mean():.3f} of these, "
          f"{1 - reader.familiar(odd).float().mean():.3f} of noise of the same size")  # fmt: skip


if __name__ == "__main__":
    main()
