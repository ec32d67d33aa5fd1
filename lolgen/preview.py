"""Draw with an adapter as a user would: stock `diffusers.StableDiffusionPipeline` and `load_lora_weights`.

A load can succeed with no key applied, so after each one the adapted layers are counted.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lolgen import io
from lolgen.errors import LolgenError
from lolgen.lora import LoRA
from lolgen.quiet import load_stock_pipeline

STEPS = 16
GUIDANCE = 3.0


def load_pipeline(base: str | Path) -> Any:
    """The stock pipeline of a folder, silent, on the CPU; what is no folder is taken for a hub id.

    LolgenError when it cannot be loaded.
    """
    if Path(base).is_dir() and not (Path(base) / "model_index.json").is_file():
        raise LolgenError(f"{base}: no model_index.json; expected a diffusers StableDiffusionPipeline folder")
    try:
        return load_stock_pipeline(str(base))
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LolgenError(f"{base}: no StableDiffusionPipeline could be loaded ({reason})") from error


def attach(pipe: Any, adapter: str | Path | LoRA) -> int:
    """Load an adapter (a file, a folder or a LoRA) with `load_lora_weights`; the number of modules hit.

    LolgenError when any module of the file was not applied: it is for another base.
    """
    lora = adapter if isinstance(adapter, LoRA) else io.load(adapter)
    with tempfile.TemporaryDirectory() as folder:
        file = io.save(lora, Path(folder) / "pytorch_lora_weights.safetensors", "diffusers")
        try:
            pipe.load_lora_weights(folder, weight_name=Path(file).name, adapter_name="lolgen")
        except (ValueError, RuntimeError, KeyError) as error:
            reason = str(error).strip().splitlines()[0][:200]
            raise LolgenError(
                f"the adapter does not fit the base model: {reason}; name its own base"
            ) from error
    hit = {
        f"{part}.{name}"
        for part in ("unet", "text_encoder")
        for name, module in getattr(pipe, part).named_modules()
        if "lolgen" in getattr(module, "lora_A", {})
    }
    missed = [name for name in lora.names if name not in hit]
    if missed:
        pipe.unload_lora_weights()
        raise LolgenError(
            f"{len(missed)} of {len(lora.names)} modules were not applied, the first is {missed[0]!r}: "
            "the adapter is for another base model; name its base"
        )
    return len(hit)


@torch.no_grad()
def draw(
    pipe: Any, prompts: Sequence[str], seeds: Sequence[int], steps: int = STEPS, guidance: float = GUIDANCE
) -> Tensor:
    """One picture per prompt and seed, in [0, 1], (prompts * seeds, 3, H, W); prompt-major.

    Noise depends on the seed alone: the same seeds under two adapters are comparable.
    """
    names = [p for p in prompts for _ in seeds]
    generators = [torch.Generator().manual_seed(int(s)) for _ in prompts for s in seeds]
    out = pipe(
        names, generator=generators, num_inference_steps=steps, guidance_scale=guidance, output_type="np"
    )
    return torch.from_numpy(np.asarray(out.images)).permute(0, 3, 1, 2).contiguous()


def grid(images: Tensor, columns: int, scale: int = 4) -> Any:
    """Pictures (N, 3, H, W) in [0, 1] as one PIL image, `columns` a row, each pixel `scale` times as large."""
    from PIL import Image

    n, _, h, w = images.shape
    rows = -(-n // columns)
    sheet = torch.ones(3, rows * (h * scale + 4) + 4, columns * (w * scale + 4) + 4)
    for i, image in enumerate(images):
        top, left = 4 + i // columns * (h * scale + 4), 4 + i % columns * (w * scale + 4)
        big = image.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
        sheet[:, top : top + h * scale, left : left + w * scale] = big
    return Image.fromarray((sheet.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def save_image(image: Any, path: str | Path) -> Path:
    """Write a PNG atomically."""
    import io as stdio

    from lolgen.io import atomic

    buffer = stdio.BytesIO()
    image.save(buffer, "PNG")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic.write_file(path, buffer.getvalue())
    return path
