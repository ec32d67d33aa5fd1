"""PEFT folders of an adapter that spans several models: one folder a component, `unet/`, `text_encoder/`, ...

PEFT loads a folder into one model, so an adapter of a pipeline is as many folders side by side, each of which
`PeftModel.from_pretrained(pipe.unet, "out/unet")` takes as it is.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path

import torch

from lolgen.errors import FormatError
from lolgen.io import atomic, guess, names, pairs, peft
from lolgen.io import safetensors_file as stf
from lolgen.lora import LoRA, Spec


def folders(path: stf.Path_) -> list[Path]:
    """The components' folders in a folder without a config of its own; [] when it has none."""
    place = Path(path)
    if not place.is_dir() or (place / peft.CONFIG).exists():
        return []
    return sorted(
        f for f in place.iterdir() if names.component(f"{f.name}.x") and (f / peft.CONFIG).is_file()
    )


def load(path: stf.Path_, modules: pairs.Modules | None = None) -> LoRA:
    """The LoRA of all components' folders under `path`, in the natural order of its names. Raises FormatError.

    Header entries and extras of the first folder that has them are kept.
    """
    specs, factors, extras = {}, {}, {}
    metadata: dict[str, str] = {}
    for folder in folders(path):
        lora = peft.load(folder, component=folder.name)
        specs.update({m.name: m for m in lora.spec})
        factors.update(lora.factors)
        # Full tensors are called alike in every folder.
        extras.update({k if names.component(k) else f"{folder.name}.{k}": v for k, v in lora.extras.items()})
        metadata = {k: v for k, v in lora.metadata.items() if k != "adapter_config"} | metadata
    ordered = {name: specs[name] for name in sorted(specs, key=names.natural)}
    if modules is not None:
        ordered = pairs.on_base(path, {n: n for n in ordered}, ordered, modules)
    return LoRA(Spec(tuple(ordered.values())), factors, metadata, extras)


def split(lora: LoRA) -> dict[str, LoRA]:
    """The LoRA's part in each component ("" for modules of none), with the extras whose names are of it."""
    found: dict[str, list[str]] = {}
    for name in lora.names:
        found.setdefault(names.component(name) or "", []).append(name)
    parts = {}
    for part, members in found.items():
        mine = {k: v for k, v in lora.extras.items() if (names.component(k) or "") == part}
        full = f"{part}.{peft.PREFIX}"
        extras = {k[len(part) + 1 :] if part and k.startswith(full) else k: v for k, v in mine.items()}
        spec = Spec(tuple(lora.spec[n] for n in members))
        parts[part] = LoRA(spec, {n: lora[n] for n in members}, dict(lora.metadata), extras)
    return parts


def save(lora: LoRA, path: stf.Path_, dtype: torch.dtype | None = None, *, base: str | None = None) -> Path:
    """Write a PEFT folder for each component under the folder `path`; returns it. Raises FormatError.

    `base`: the family; SD3's first text encoder keeps the `text_model.` in its paths, as its class does.
    A folder that is not there yet appears whole; in one that is there, each component's files are replaced in turn,
    once all of them are known to be good, and other files are left alone.
    """
    folder = Path(os.path.realpath(path))
    parts = split(lora)
    if folder.is_file() or folder.suffix == ".safetensors" or (folder / peft.CONFIG).exists():
        raise FormatError(
            path,
            found="a PEFT folder of one model" if folder.is_dir() else "the path of a file",
            wanted="a folder to put the components' folders in",
            remedy="choose another path",
        )
    if "" in parts:
        raise FormatError(
            path,
            key=parts[""].names[0],
            found=f"a module of no component beside modules of {', '.join(p for p in parts if p)}",
            wanted="modules of one model, or of a pipeline's components",
            remedy="save what belongs together",
        )
    lost = [k for k in lora.extras if (names.component(k) or "") not in parts]
    if lost:
        raise FormatError(
            path,
            key=lost[0],
            found="a tensor of none of the components",
            wanted="tensors whose names start with their component",
            remedy="take it out of the LoRA's extras",
        )
    projected = base == "sd3" if base else guess.is_sd3(lora)
    staged = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}.tmp")
    try:
        for part, one in parts.items():
            peft.save(one, staged / part, dtype, companion=False, projected=projected)
        if not folder.exists():
            os.rename(staged, folder)
        else:
            for part in parts:
                files = {f.name: f.read_bytes() for f in (staged / part).iterdir()}
                atomic.write_folder(folder / part, files, last=peft.CONFIG)
    except OSError as error:
        raise stf.cannot_write(path, error) from error
    finally:
        shutil.rmtree(staged, ignore_errors=True)
    return Path(path)
