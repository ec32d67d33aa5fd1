"""Adapter files: `load` any of them, `save` as PEFT, diffusers or kohya, `detect` which one a file is.

The format is found by content, never by name. Scales: what is loaded keeps the file's scale beside the
factors; what is saved has it inside them, with alpha = rank, which every reader understands alike.
Names, see `lolgen.io.names`, and `lolgen.io.families` for those of other programs. Unknown tensors are the LoRA's
`extras`, header strings its `metadata`.
"""

from __future__ import annotations

from pathlib import Path

import torch

from lolgen.errors import FormatError
from lolgen.io import common, diffusers, guess, keys, kohya, lycoris, names, parts, peft
from lolgen.io import safetensors_file as stf
from lolgen.io.families import FAMILIES
from lolgen.io.fused import Fused
from lolgen.io.lycoris import Converted
from lolgen.io.names import clip_modules, sd1_modules, sdxl_modules, unet_modules
from lolgen.io.pairs import Modules
from lolgen.lora import LoRA

FORMATS: tuple[str, ...] = ("peft", "diffusers", "kohya")

__all__ = [
    "FAMILIES", "FORMATS", "Converted", "Fused", "clip_modules", "detect", "load", "save", "sd1_modules",
    "sdxl_modules", "unet_modules",
]  # fmt: skip


def load(
    path: stf.Path_,
    *,
    modules: Modules | None = None,
    base: str | None = None,
    rank: int | None = None,
    report: list[Converted] | None = None,
) -> LoRA:
    """The LoRA of an adapter file, or of a folder with one, on the CPU, in the file's dtype.

    `modules`: what the base model has, as names or as a Spec. It fixes the order of the modules, tells what
    the underscores of kohya's names were, and makes an error of a module (or, with a Spec, a shape) that the
    base does not have. Without it, modules come in the natural order of their names.
    `base`: the family (one of FAMILIES), where the file's names leave it open.
    `rank`: LoHa and LoKr modules, which become LoRAs exactly, get this rank at most; each is listed in `report`.

    Raises FormatError for whatever is wrong with the file; a pickle is never opened.
    """
    guess.check_base(base)
    found, place = _find(path)
    if found == "peft":
        return parts.load(place, modules) if parts.folders(place) else peft.load(place, modules)
    reader = {"diffusers": diffusers.load, "kohya": kohya.load}[found]
    return reader(place, modules, base=base, rank=rank, report=report)


def save(
    lora: LoRA,
    path: stf.Path_,
    format: str,
    *,
    dtype: torch.dtype | None = None,
    companion: bool = True,
    base: str | None = None,
    report: list[Fused] | None = None,
    projected: bool = False,
) -> Path:
    """Write `lora` as "peft" (a folder), "diffusers" or "kohya" (a file); returns what was written.

    `dtype`: float16, bfloat16, float32 or float64; None keeps each module's own. Rounding to half precision
    is done on balanced factors. `companion`: see `lolgen.io.peft.save`. For a single file, `path` ends in
    `.safetensors` or is a folder to put the format's usual name in. Writes are atomic: all or nothing.
    `base`: the family (one of FAMILIES) whose names a kohya file uses; without it, the one that the modules show.
    Modules that a kohya file fuses are appended to `report`. `projected`: see `lolgen.io.peft.save`.

    Raises FormatError when the format cannot hold the LoRA, its numbers are not finite, or the disk refuses.
    """
    if format == "peft":
        return peft.save(lora, path, dtype, companion, projected=projected)
    if format == "diffusers":
        return diffusers.save(lora, path, dtype)
    if format == "kohya":
        return kohya.save(lora, path, dtype, base=base, report=report)
    raise FormatError(
        path, found=f"format {format!r}", wanted=", ".join(FORMATS), remedy="choose one of these"
    )


def detect(path: stf.Path_) -> str:
    """Which of FORMATS a file or folder is, by its content. Raises FormatError when it is none."""
    return _find(path)[0]


def _find(path: stf.Path_) -> tuple[str, Path]:
    """(format, the file or PEFT folder to read)."""
    place = Path(path)
    if place.is_dir() and ((place / peft.CONFIG).exists() or parts.folders(place)):
        return "peft", place
    file = peft.weights_file(place)
    found = stf.read_keys(file)
    if any(k.startswith(peft.PREFIX) for k in found):
        return "peft", file
    if any(common.is_kohya_key(k) for k in found):
        return "kohya", file
    factors = [k for k in found if keys.is_factor(k) or lycoris.tail(k)]
    if not factors:
        raise FormatError(
            file,
            found=f"no key of a LoRA among {len(found)} ({', '.join(map(stf.brief, sorted(found)[:3]))})",
            wanted="lora_A and lora_B, or lora_down and lora_up",
            remedy="check that this is an adapter, not a full model",
        )
    # PEFT's keys have no prefix when the model was not wrapped; then the config beside them tells.
    bare = not any(names.component(k) for k in factors)
    return ("peft" if bare and (file.parent / peft.CONFIG).exists() else "diffusers"), file
