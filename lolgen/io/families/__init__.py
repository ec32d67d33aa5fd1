"""What the modules of each base family are called in other programs' files, one small file a family.

`unet`: Stable Diffusion 1, 2 and XL; `text`: their text encoders and T5; `flux`, `sd3`: transformers whose original
layout fuses what diffusers splits; `underscores`: the way back from a path whose dots became underscores.
Nothing here knows tensors: names in, names out.
"""

from __future__ import annotations

from lolgen.io.families import flux, sd3
from lolgen.io.families.layout import Layout

DIFFUSION: tuple[str, ...] = ("sd1", "sd2", "sdxl", "sd3", "flux")
LANGUAGE: tuple[str, ...] = ("llama", "qwen", "mistral", "gemma", "gpt2")
FAMILIES: tuple[str, ...] = DIFFUSION + LANGUAGE
"""The names that `base=` takes."""

LAYOUTS: dict[str, Layout] = {"flux": flux.LAYOUT, "sd3": sd3.LAYOUT}
"""Families whose original modules are not one to one with diffusers' own."""
