"""Pictures of what adapters do, drawn by stock diffusers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from lolgen import pictures
from lolgen.lora import LoRA
from lolgen.paths import checkpoints_dir


def draw_preview(
    adapter: str | Path,
    out: str | Path,
    *,
    subject: str = pictures.SUBJECTS[0],
    base: str | Path | None = None,
) -> dict[str, Any]:
    """A small grid over prompts (rows) and seeds (columns), the last row without the trigger, drawn by stock
    diffusers; the picture's path and the number of modules that the load hit."""
    from lolgen import preview as drawing

    pipe = drawing.load_pipeline(base or checkpoints_dir() / "tiny-sd")
    hit = drawing.attach(pipe, adapter)
    prompts = [pictures.caption({}, subject, p) for p in pictures.PREFIXES] + [
        pictures.caption({}, "a person")
    ]
    images = drawing.draw(pipe, prompts, range(6))
    path = drawing.save_image(drawing.grid(images, 6), out)
    return {"preview": str(path), "modules_hit": hit, "preview_prompts": prompts}


def draw_rows(
    loras: Sequence[str | Path | LoRA], out: str | Path, *, prompt: str, base: str | Path | None = None
) -> dict[str, Any]:
    """A row of pictures for each adapter, the same seeds in every row, drawn by stock diffusers."""
    from lolgen import preview as drawing

    pipe = drawing.load_pipeline(base or checkpoints_dir() / "tiny-sd")
    rows = []
    for lora in loras:
        hit = drawing.attach(pipe, lora)
        rows.append(drawing.draw(pipe, [prompt], range(6)))
        pipe.unload_lora_weights()
    path = drawing.save_image(drawing.grid(torch.cat(rows), 6), out)
    return {"preview": str(path), "modules_hit": hit, "preview_prompts": [prompt]}


def draw_change(
    before: str | Path | LoRA,
    after: str | Path,
    out: str | Path,
    *,
    prompt: str,
    base: str | Path | None = None,
) -> dict[str, Any]:
    """Before (first row) and after (second row) under the same seeds and prompt."""
    return draw_rows([before, after], out, prompt=prompt, base=base)
