"""`lolgen eval invert`: a picture of somebody never seen to a LoRA, against training a LoRA on that picture.

What comes out is judged by what the base draws with it: the probe reads the attributes, and its features are compared
with those of other rendered pictures of the same person. A LoRA trained on 21 pictures of the person is the ceiling.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import normalize
from tqdm import tqdm

from lolgen import pictures, preview
from lolgen.base import Base
from lolgen.generator import Generator
from lolgen.imager import Imager
from lolgen.io import atomic
from lolgen.lora import LoRA
from lolgen.paths import checkpoints_dir
from lolgen.precision import bf16_matmuls
from lolgen.probe import Probe
from lolgen.tasks.generate import draw, score
from lolgen.zoo.plan import Plan
from lolgen.zoo.training import Recipe, Task, make_prior, train_bank
from lolgen.zoo.zoo import Zoo

SUBJECT = pictures.SUBJECTS[0]
RECIPE = Recipe(lr=6e-3, steps=50, subject=SUBJECT)
"""The middle of the zoo's recipes that draw their identity well (train/LOG.md)."""
SEEDS = (0, 1, 2, 3)
INTRO = """\
`{command}` writes this page, `invert.json` and `invert.png`. Read by the probe off pictures drawn with each LoRA;
identity: cosine of the probe's features with other pictures of the same person. Seconds on one core, models loaded;
training runs in banks of 40, so that alone a LoRA takes longer.
"""


def evaluate(
    zoo: str | Path, out: str | Path = "reports", *, quick: bool = False, model: str = "faces"
) -> str:
    """Write invert.json, invert.md and the contact sheet invert.png to `out`; the Markdown table."""
    torch.set_num_threads(1)
    count = 4 if quick else 60
    folder, out = checkpoints_dir(), Path(out)
    base = Base.load(folder / "tiny-sd")
    bf16_matmuls(base.unet)
    probe = Probe.load(folder / "probe.safetensors")
    test = Zoo.open(zoo).split("test")
    persons = [pictures.Identity.from_json(r["identity"]) for r in test.rows[:count]]
    labels = test.labels()[:count]
    rng = np.random.default_rng(43)
    # The first picture is what is inverted, the last four are what identity is measured on: nobody trains on those.
    shown = torch.from_numpy(
        np.stack([[pictures.draw_portrait(p, rng) for _ in range(21 + len(SEEDS))] for p in persons])
    )
    systems: dict[str, Callable[[], list[LoRA]]] = {
        "lolgen": lambda: _inverted(shown[:, 0], folder / model),
        "trained on 1": lambda: _trained(base, test, shown[:, :1]),
        "trained on 21": lambda: _trained(base, test, shown[:, :21]),
    }
    rows: dict[str, Any] = {}
    sheet = [shown[:16, 0].float() / 255]
    for name, make in tqdm(systems.items(), desc="eval invert", mininterval=1):
        start = time.perf_counter()
        loras = make()
        seconds = (time.perf_counter() - start) / count
        images = draw(base, loras, [SUBJECT] * count, SEEDS)
        accuracy, each = score(probe, images, labels)
        rows[name] = {
            "attributes": round(accuracy, 4),
            "identity": round(likeness(probe, images, shown[:, -len(SEEDS) :].float() / 127.5 - 1), 4),
            "each": {n: round(float(v), 4) for n, v in zip(pictures.ATTRIBUTES, each, strict=True)},
            "seconds": round(seconds, 4),
        }
        sheet.append(images[:16, 0] / 2 + 0.5)
    command = "lolgen eval invert" + (" --quick" if quick else "")
    report = {"command": command, "pictures": count, "systems": rows}
    atomic.write_file(out / "invert.json", (json.dumps(report, indent=1) + "\n").encode())
    text = markdown(report)
    atomic.write_file(out / "invert.md", text.encode())
    preview.save_image(preview.grid(torch.cat(sheet), len(sheet[0]), 2), out / "invert.png")
    return text


def _inverted(pixels: Tensor, folder: Path) -> list[LoRA]:
    imager, generator = Imager.load(folder / "imager.safetensors"), Generator.from_pretrained(folder)
    rows, parts, _ = imager.describe(pixels.float() / 127.5 - 1)
    loras = []
    for i, row in enumerate(rows):
        values = {n: pictures.ATTRIBUTES[n][int(p.argmax())] for n, p in row.items()}
        loras.append(
            generator.person(values, parts[i].tolist(), torch.Generator().manual_seed(i), subject=SUBJECT)
        )
    return loras


def _trained(base: Base, zoo: Zoo, pixels: Tensor) -> list[LoRA]:
    """LoRAs trained on these pictures (N, n, 3, H, W), in banks, by the zoo's own trainer."""
    plan = Plan()
    prior = make_prior(base, plan.prior_pictures, plan.seed)
    recipe = replace(RECIPE, pictures=pixels.shape[1])
    loras: list[LoRA] = []
    for start in range(0, len(pixels), plan.bank):
        tasks = [Task(recipe, p) for p in pixels[start : start + plan.bank]]
        loras += train_bank(
            base, zoo.spec, tasks, prior, 9_000 + start,
            batch=plan.batch, prior_batch=plan.prior_batch, prior_weight=plan.prior_weight,
        )  # fmt: skip
    return loras


@torch.no_grad()
def likeness(probe: Probe, drawn: Tensor, shown: Tensor) -> float:
    """Mean cosine of the probe's features between drawn and rendered pictures of one person, both (N, n, 3, H, W),
    each centred on its own mean over persons: what they share as pictures is no likeness."""

    def features(x: Tensor) -> Tensor:
        f = torch.cat([probe.features(c) for c in x.flatten(0, 1).split(256)])
        return normalize((f - f.mean(0)).unflatten(0, x.shape[:2]), dim=-1)

    return float(torch.einsum("nik,njk->nij", features(drawn), features(shown)).mean())


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# A picture to a LoRA ({report['pictures']} persons never seen)",
        "",
        INTRO.format(command=report["command"]),
        "| system | attributes read back | identity | seconds a LoRA |",
        "| --- | --- | --- | --- |",
    ]
    for name, f in report["systems"].items():
        lines.append(f"| {name} | {f['attributes']:.3f} | {f['identity']:.3f} | {f['seconds']:.3g} |")
    lines += ["", f"Rows of `invert.png`: the picture, then {', '.join(report['systems'])}.", ""]
    return "\n".join(lines)
