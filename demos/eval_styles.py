"""Which of ten styles was a LoRA trained on, and on how many? Read off the weights of 408 LoRAs of unseen subsets.

python -m demos.eval_styles
"""

from __future__ import annotations

from lolgen import pictures
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.tasks import shelf
from lolgen.zoo.zoo import Zoo


def main() -> None:
    test = Zoo.open(zoos_dir() / "styles").split("test")
    loras, bits = test.load(), test.labels()
    which = shelf.load(checkpoints_dir() / "predictors" / "styles").predict(loras)
    for k, name in enumerate(pictures.STYLES):
        print(f"{name}: {(which[name].argmax(1) == bits[:, k]).float().mean():.3f}")
    count = shelf.load(checkpoints_dir() / "predictors" / "dataset_size").predict(loras)["dataset_size"]
    print(f"number of styles: {(count.argmax(1) + 1 == bits.sum(1)).float().mean():.3f}")


if __name__ == "__main__":
    main()
