"""Pictures of what adapters do, drawn by one stock pipeline behind a lock and shown as data URIs.

Data URIs leave nothing on the disk and need no route that serves files. The base model draws 32 x 32 pixels, so
pictures are enlarged here, smoothly: blocks of 8 x 8 hide what a face is.
"""

from __future__ import annotations

import base64
import io as stdio
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lolgen import pictures, preview
from lolgen.paths import checkpoints_dir

from .sessions import Item

SIDE = 192
"""Side of a shown picture in pixels."""
SEEDS = (0, 1, 2, 3, 4, 5)


class Painter:
    """The base model. A `StableDiffusionPipeline` holds one adapter at a time, so one thread draws at a time."""

    def __init__(self) -> None:
        self._pipe: Any = None
        self._lock = threading.Lock()

    def warm(self) -> None:
        """Load the base model now rather than at the first request."""
        with self._lock:
            self._load()

    def draw(self, item: Item, prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        """Data URIs, prompt-major; drawn once an item. LolgenError when the adapter is for another base."""
        key = (*prompts, *map(str, seeds))
        if key not in item.pictures:
            item.pictures[key] = self._draw(item.path, prompts, seeds)
        return item.pictures[key]

    def _draw(self, path: Path, prompts: Sequence[str], seeds: Sequence[int]) -> list[str]:
        with self._lock:
            pipe = self._load()
            preview.attach(pipe, path)
            try:
                drawn = preview.draw(pipe, prompts, seeds)
            finally:
                pipe.unload_lora_weights()
        return [data_uri(enlarge(picture_of(x))) for x in drawn]

    def _load(self) -> Any:
        if self._pipe is None:
            self._pipe = preview.load_pipeline(checkpoints_dir() / "tiny-sd")
        return self._pipe


def prompt_of(item: Item) -> str:
    """The prompt that previews are drawn with: the item's own subject."""
    return pictures.caption({}, subject_of(item.prompt))


def subject_of(prompt: str) -> str:
    """The subject that a prompt names, of those that LoRAs here are trained on; the first where it names none."""
    return next((s for s in pictures.SUBJECTS if prompt.endswith(s)), pictures.SUBJECTS[0])


def picture_of(pixels: Any) -> Any:
    """A tensor (3, H, W) in [0, 1] as a PIL image."""
    from PIL import Image

    return Image.fromarray((pixels.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy())


def enlarge(picture: Any, side: int = SIDE) -> Any:
    from PIL import Image

    return picture.resize((side, side), Image.Resampling.BICUBIC)


def data_uri(picture: Any) -> str:
    """A picture as the `src` of an `<img>`."""
    buffer = stdio.BytesIO()
    picture.save(buffer, "WEBP", quality=88)
    return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
