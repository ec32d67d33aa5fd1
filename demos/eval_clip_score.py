"""Read the CLIP score of 240 unseen LoRAs off their weights instead of drawing 33 prompts with each.

python -m demos.eval_clip_score
"""

from __future__ import annotations

import time

from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.tasks import shelf
from lolgen.tasks.paper.clip_score import load
from lolgen.tasks.paper.figures import kendall_tau


def main() -> None:
    reader = shelf.load(checkpoints_dir() / "predictors" / "clip_score")
    loras, drawn = load(zoos_dir()).tests["clip_score"]  # drawn: (240, 1), measured by drawing
    started = time.perf_counter()
    read = reader.predict(loras)["clip_score"][:, 0]
    seconds = (time.perf_counter() - started) / len(loras)
    low, high = reader.interval(loras)["clip_score"].T
    inside = ((low <= drawn[:, 0]) & (drawn[:, 0] <= high)).float().mean()
    print(f"Kendall's tau {kendall_tau(read, drawn[:, 0]):.3f}, {seconds * 1e3:.2f} ms a LoRA")
    print(f"95 % intervals of width {(high - low).mean():.3f} hold {inside:.3f} of the scores, "
          f"which range from {drawn.min():.3f} to {drawn.max():.3f}")  # fmt: skip


if __name__ == "__main__":
    main()
