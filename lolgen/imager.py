"""A picture to what a LoRA of its person would be asked to be: attributes, and which drawing of each part.

It stands for the picture embedding of zero-shot LoRA generators (LoRA Diffusion, arXiv 2412.02352). It shares the
probe's architecture, never its weights: what judges takes no part in what is judged.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from lolgen import pictures
from lolgen.conditions import DRAWINGS, PARTS
from lolgen.errors import FormatError
from lolgen.probe import Probe

MOST_PIXELS = 64_000_000
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF")


class Imager(Probe):
    """`Probe` with a head more for every entry of `conditions.DRAWINGS`."""

    def __init__(self, width: int = 24) -> None:
        super().__init__(width)
        self.drawings = nn.ModuleList(nn.Linear(128, count) for *_, count in DRAWINGS)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """Logits per attribute, `kind`, and `drawing.<k>` for the k-th entry of DRAWINGS."""
        h = self.body(x)
        out = {n: head(h) for n, head in self.heads.items()} | {"kind": self.kind(h)}
        return out | {f"drawing.{k}": head(h) for k, head in enumerate(self.drawings)}

    @torch.no_grad()
    def describe(self, x: Tensor) -> tuple[list[dict[str, Tensor]], Tensor, Tensor]:
        """Pictures (N, 3, 32, 32) in [-1, 1] -> probabilities of every attribute of each, parts (N, 5) in the order
        of `conditions.PARTS`, and the probability (N,) that it is a portrait at all."""
        out = self(x)
        soft = {n: out[n].softmax(1) for n in pictures.ATTRIBUTES}
        rows = [{n: p[i] for n, p in soft.items()} for i in range(len(x))]
        parts = torch.zeros(len(x), len(PARTS), dtype=torch.long)
        for k, (part, attribute, shown, _) in enumerate(DRAWINGS):
            pick = out[f"drawing.{k}"].argmax(1)
            if shown is not None:
                pick = pick * (soft[attribute].argmax(1) == pictures.ATTRIBUTES[attribute].index(shown))
            parts[:, list(PARTS).index(part)] += pick
        return rows, parts, out["kind"].softmax(1)[:, 0]


def read_picture(path: str | Path) -> Tensor:
    """The middle square of a picture file as (1, 3, 32, 32) in [-1, 1]. FormatError for what is no picture."""
    from PIL import Image

    wanted = f"a picture of at most {MOST_PIXELS // 1_000_000} million pixels ({', '.join(FORMATS)})"
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise ValueError(f"{image.width} x {image.height} pixels")
            side = min(image.size)
            left, top = (image.width - side) // 2, (image.height - side) // 2
            # Transparent pixels are white, as a browser shows them on paper.
            layer = image.convert("RGBA").crop((left, top, left + side, top + side))
            flat = Image.alpha_composite(Image.new("RGBA", layer.size, "white"), layer).convert("RGB")
            small = flat.resize((pictures.SIZE, pictures.SIZE), Image.Resampling.LANCZOS)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = (
            "no such file" if isinstance(error, FileNotFoundError) else str(error) or type(error).__name__
        )
        raise FormatError(path, found=reason, wanted=wanted, remedy="choose another picture") from None
    pixels = torch.from_numpy(np.asarray(small).copy()).permute(2, 0, 1)
    return pixels[None].float() / 127.5 - 1
