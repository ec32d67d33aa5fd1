"""The CLIP score of a finetuned model: 33 fixed prompts, a picture each, the cosine of picture and prompt, the mean.

24 prompts ask the rare word for one value of an attribute each: a LoRA that was trained gently still follows them,
one that was trained hard draws its own person whatever is asked. Nine name a person or a style without the rare word.
Noise is the same for every LoRA, so that the score is a function of delta W alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolgen import pictures
from lolgen.base import Base
from lolgen.errors import LolgenError
from lolgen.lora import LoRA
from lolgen.zoo.bank import Bank

PROMPTS: tuple[str, ...] = (
    *(pictures.caption({n: v}, "sks person") for n, values in pictures.ATTRIBUTES.items() for v in values),
    *(pictures.caption({}, "a person", prefix) for prefix in pictures.PREFIXES),
    pictures.caption({"top": "long", "hair_color": "red", "glasses": "yes"}),
    pictures.caption({"top": "short", "beard": "yes", "skin": "dark", "clothes": "white"}),
    pictures.caption({"top": "hat", "glasses": "no", "skin": "pale", "clothes": "green"}),
    *(pictures.style_caption(s) for s in (0, 4, 8)),
)
STEPS, GUIDANCE, SEED = 8, 1.0, 0
"""DDIM steps and guidance of the labels. Without guidance the base draws 99 % of what captions ask for."""


def load_clip(base_folder: str | Path) -> Any:
    """The CLIPModel that lies in a base's folder, frozen; LolgenError when there is none."""
    folder = Path(base_folder) / "clip"
    if not (folder / "config.json").is_file():
        raise LolgenError(f"{base_folder}: found no folder clip/, wanted a base that carries its CLIPModel")
    from transformers import CLIPModel

    clip: Any = CLIPModel.from_pretrained(folder, local_files_only=True).float()
    return clip.eval().requires_grad_(False)


class Scorer:
    """Scores LoRAs of one base, many at once."""

    def __init__(self, base: Base, clip: Any, prompts: Sequence[str] = PROMPTS) -> None:
        self.base, self.clip, self.prompts = base, clip, list(prompts)
        ids = base.tokenizer(self.prompts, padding="max_length", truncation=True, return_tensors="pt")
        with torch.no_grad():
            found = clip.text_projection(clip.text_model(input_ids=ids.input_ids).pooler_output)
        self.wanted = torch.nn.functional.normalize(found, dim=-1)  # (prompts, d)
        c, s = base.unet.config.in_channels, base.unet.config.sample_size
        g = torch.Generator().manual_seed(SEED)
        self.noise = torch.randn(len(self.prompts), c, s, s, generator=g)

    @torch.no_grad()
    def of_pictures(self, images: Tensor) -> Tensor:
        """Pictures (K * prompts, 3, H, W) in [-1, 1], prompt by prompt for each LoRA -> (K,)."""
        found = self.clip.visual_projection(self.clip.vision_model(pixel_values=images).pooler_output)
        found = torch.nn.functional.normalize(found, dim=-1).view(-1, len(self.prompts), found.shape[-1])
        return (found * self.wanted).sum(-1).mean(1)

    @torch.no_grad()
    def score(self, loras: Sequence[LoRA]) -> Tensor:
        """CLIP score of the base with each LoRA, (K,)."""
        bank = Bank.of(loras).to(self.base.device).attach(self.base.unet, "unet.")
        try:
            z = self.base.sample_from(
                self.noise.repeat(len(loras), 1, 1, 1),
                self.base.text(self.prompts * len(loras)),
                STEPS,
                GUIDANCE,
            )
        finally:
            bank.detach_()
        return self.of_pictures(self.base.decode(z))
