"""Reading a LoRA's CLIP score off its weights against measuring it: drawing 33 prompts and scoring the pictures.

    python -m train.reading_bench                    # 2 min on one core; reports/reading.{json,md}

In one run, on one thread: stock diffusers with the adapter loaded as a file, with the settings of the labels (8 steps,
no guidance) and with those of users (16 steps, guidance 3); lolgen's own bank, many LoRAs in a pass; and the shipped
reader, 240 LoRAs at once, one at a time, and from a file. The paper says "over 50,000 times faster" of SD1.4 with 860M
parameters; the base here has 2.8M, so a picture costs some hundred times less and the ratio is smaller by as much.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from lolgen import clip_score, io, preview
from lolgen.base import Base
from lolgen.clip_score import PROMPTS, Scorer
from lolgen.io.atomic import write_file
from lolgen.lora import Batch
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.precision import bf16_matmuls
from lolgen.tasks import shelf
from lolgen.zoo.zoo import Zoo


def median(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of `run`, the first call left out."""
    found = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        run()
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("reports"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = checkpoints_dir() / "tiny-sd"
    base, clip = Base.load(folder), clip_score.load_clip(folder)
    scorer = Scorer(base, clip)
    test = Zoo.open(zoos_dir() / "faces").split("test")
    loras = test.load().unstack()
    pipe = preview.load_pipeline(folder)

    def stock(steps: int, guidance: float) -> None:
        preview.attach(pipe, loras[0])
        images = preview.draw(pipe, list(PROMPTS), [clip_score.SEED], steps, guidance)
        pipe.unload_lora_weights()
        scorer.of_pictures(images * 2 - 1)

    found = {
        "stock diffusers, 16 steps, guidance 3": median(lambda: stock(16, 3.0), args.repeats),
        "stock diffusers, 8 steps, no guidance": median(
            lambda: stock(clip_score.STEPS, clip_score.GUIDANCE), args.repeats
        ),
    }
    bf16_matmuls(base.unet)
    found["lolgen's bank of 8"] = median(lambda: scorer.score(loras[:8]), 1) / 8
    reader = shelf.load(checkpoints_dir() / "predictors" / "clip_score")
    every, one = Batch.stack(loras), Batch.stack(loras[:1])
    found["read, 240 LoRAs at once"] = median(lambda: reader.predict(every), 2 * args.repeats) / len(loras)
    found["read, one LoRA"] = median(lambda: reader.predict(one), 5 * args.repeats)
    with tempfile.TemporaryDirectory() as temporary:
        path = io.save(loras[0], Path(temporary) / "lora.safetensors", "diffusers")
        found["read, one file"] = median(
            lambda: reader.predict(Batch.stack([io.load(path)])), 5 * args.repeats
        )
    real = found["stock diffusers, 16 steps, guidance 3"]
    report = {
        "command": "python -m train.reading_bench",
        "prompts": len(PROMPTS),
        "seconds": {n: float(f"{s:.4g}") for n, s in found.items()},
        "times_faster": {n: round(real / s, 1) for n, s in found.items()},
    }
    lines = [
        "# Reading against measuring",
        "",
        f"`{report['command']}`, one thread: the CLIP score of one LoRA over {len(PROMPTS)} prompts. The base has 2.8M "
        "parameters; the paper's ratio is for one of 860M.",
        "",
        "| how | seconds a LoRA | times faster than stock diffusers |",
        "| --- | --- | --- |",
        *(f"| {n} | {s:.3g} | {real / s:,.0f} |" for n, s in found.items()),
    ]
    write_file(args.out / "reading.json", (json.dumps(report, indent=1) + "\n").encode())
    write_file(args.out / "reading.md", ("\n".join(lines) + "\n").encode())
    print("\n".join(lines))


if __name__ == "__main__":
    main()
