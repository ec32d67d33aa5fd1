"""Reading a LoRA's CLIP score off its weights against measuring it: drawing 33 prompts and scoring the pictures.

    python -m train.reading_bench                    # 2 min on one core; reports/reading.{json,md}

In one run, on one thread. Measuring: stock diffusers with the adapter loaded from a file, with the settings of the
labels (8 steps, no guidance) and with those of users (16 steps, guidance 3); and lolgen's own bank, the labels'
settings, many LoRAs in a pass. Reading: the shipped reader, 256 LoRAs at once, one at a time, and one from its file.
The reader predicts the score at the labels' settings, so those are what it saves; the other is a dearer drawing of
another quantity. Every reading is set against every measuring.

The paper says "over 50,000 times faster" of a base with 860M parameters; the UNet here has 4.2M. How much more a pass
of the larger UNet computes is counted, not timed: `unet_flops`. No ratio of reading is made of it, for a reader of the
larger base's LoRAs would cost more too.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from lolgen import clip_score, io, preview
from lolgen.base import Base
from lolgen.clip_score import PROMPTS, Scorer
from lolgen.io.atomic import write_file
from lolgen.lora import Batch
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.precision import bf16_matmuls
from lolgen.tasks import shelf
from lolgen.zoo.zoo import Zoo

LABELS, USERS = "stock diffusers, 8 steps, no guidance (the labels)", "stock diffusers, 16 steps, guidance 3"
BANK = "lolgen's bank of 8, 8 steps, no guidance (the labels)"
TOGETHER = 256
SD15_UNET: dict[str, Any] = {"sample_size": 64, "cross_attention_dim": 768}
"""Stable Diffusion 1.x in terms of the defaults of diffusers: 859,520,964 parameters."""


def median(run: Callable[[Any], Any], inputs: Iterable[Any], repeats: int) -> float:
    """Seconds of `run` on one input after another, the first call left out."""
    found = []
    for _, x in zip(range(repeats + 1), inputs, strict=False):
        start = time.perf_counter()
        run(x)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def unet_flops(config: Mapping[str, Any], tokens: int) -> tuple[int, int]:
    """Of one pass for one picture, multiplications and additions, counted by torch; and the parameters.

    Built on `meta`, which holds no memory, and where attention is counted: its kernel for the CPU is not.
    """
    from diffusers import UNet2DConditionModel

    with torch.no_grad(), torch.device("meta"):
        unet: Any = UNet2DConditionModel.from_config(dict(config))
        c = unet.config
        size = c.in_channels, c.sample_size, c.sample_size
        with FlopCounterMode(display=False) as counter:
            unet(torch.zeros(1, *size), torch.tensor(1), torch.zeros(1, tokens, c.cross_attention_dim))
    return int(counter.get_total_flops()), sum(p.numel() for p in unet.parameters())


def ratios(measuring: dict[str, float], reading: dict[str, float]) -> dict[str, dict[str, float]]:
    """Way of reading -> way of measuring -> how many times faster it is."""
    return {r: {m: round(real / s, 1) for m, real in measuring.items()} for r, s in reading.items()}


def markdown(report: dict[str, Any]) -> str:
    measuring, reading, flops = report["measuring_seconds"], report["reading_seconds"], report["unet_flops"]
    times = ratios(measuring, reading)
    growth = flops["sd15"] / flops["embedded"]
    return "\n".join(
        [
            "# Reading against measuring",
            "",
            f"`{report['command']}`, one thread, one run: the CLIP score of one LoRA over {report['prompts']} prompts. "
            "The reader predicts the score at the labels' settings, so the columns of the labels compare like with "
            "like. The UNet has 4.2M parameters; the paper's ratio is for one of 860M.",
            "",
            "| measured by drawing | seconds a LoRA |",
            "| --- | --- |",
            *(f"| {m} | {s:.3g} |" for m, s in measuring.items()),
            "",
            "| read off the weights | seconds a LoRA | "
            + " | ".join(f"times faster than {m}" for m in measuring)
            + " |",
            "| --- | --- |" + " --- |" * len(measuring),
            *(
                f"| {r} | {s:.3g} | " + " | ".join(f"{x:,.0f}" for x in times[r].values()) + " |"
                for r, s in reading.items()
            ),
            "",
            f"Counted, not timed: one pass of the UNet for one picture takes {flops['embedded'] / 1e9:.3g} GFLOP here "
            f"and {flops['sd15'] / 1e9:.3g} GFLOP in Stable Diffusion 1.5, {growth:,.0f} times as many. No ratio of "
            "reading is made of that: a reader of the larger base's LoRAs would cost more too, and was not measured.",
        ]
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("reports"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = checkpoints_dir() / "tiny-sd"
    base, clip = Base.load(folder), clip_score.load_clip(folder)
    scorer = Scorer(base, clip)
    zoo = Zoo.open(zoos_dir() / "faces")
    batch = Batch.cat([zoo.split("test").load(), zoo.split("validation").load()])[:TOGETHER]
    if len(batch) < TOGETHER:
        parser.error(f"found {len(batch)} LoRAs in the zoo's test and validation splits, wanted {TOGETHER}")
    loras = batch.unstack()
    pipe = preview.load_pipeline(folder)
    preview.attach(pipe, loras[0])  # raises if a module is not hit; below nothing is checked
    pipe.unload_lora_weights()
    repeats = args.repeats
    with tempfile.TemporaryDirectory() as temporary:
        files = [io.save(x, Path(temporary) / f"{k}.safetensors", "diffusers") for k, x in enumerate(loras)]

        def stock(steps: int, guidance: float) -> Callable[[Path], None]:
            def run(file: Path) -> None:
                pipe.load_lora_weights(temporary, weight_name=file.name, adapter_name="lolgen")
                images = preview.draw(pipe, list(PROMPTS), [clip_score.SEED], steps, guidance)
                pipe.unload_lora_weights()
                scorer.of_pictures(images * 2 - 1)

            return run

        measuring = {
            LABELS: median(stock(clip_score.STEPS, clip_score.GUIDANCE), cycle(files), repeats),
            USERS: median(stock(preview.STEPS, preview.GUIDANCE), cycle(files), repeats),
        }
        bf16_matmuls(base.unet)
        eights = [loras[k : k + 8] for k in range(0, len(loras), 8)]
        measuring[BANK] = median(scorer.score, eights, repeats) / 8
        reader = shelf.load(checkpoints_dir() / "predictors" / "clip_score")
        # A batch of its own for every reading: what a reader may remember of a batch helps nobody.
        every = (Batch.stack(loras) for _ in cycle([0]))
        one = (Batch.stack([x]) for x in cycle(loras))
        reading = {
            f"{TOGETHER} LoRAs at once": median(reader.predict, every, 3 * repeats) / TOGETHER,
            "one LoRA": median(reader.predict, one, 20 * repeats),
            "one file": median(
                lambda file: reader.predict(Batch.stack([io.load(file)])), cycle(files), 20 * repeats
            ),
        }
    nets = {
        "embedded": unet_flops(base.unet.config, base.tokenizer.model_max_length),
        "sd15": unet_flops(SD15_UNET, 77),
    }
    report = {
        "command": "python -m train.reading_bench",
        "prompts": len(PROMPTS),
        "measuring_seconds": {n: float(f"{s:.4g}") for n, s in measuring.items()},
        "reading_seconds": {n: float(f"{s:.4g}") for n, s in reading.items()},
        "times_faster": ratios(measuring, reading),
        "unet_flops": {n: flops for n, (flops, _) in nets.items()},
        "unet_parameters": {n: parameters for n, (_, parameters) in nets.items()},
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_file(args.out / "reading.json", (json.dumps(report, indent=1) + "\n").encode())
    write_file(args.out / "reading.md", (markdown(report) + "\n").encode())
    print(markdown(report))


if __name__ == "__main__":
    main()
