"""What the formats share besides factor pairs: the header, alpha, extras, and where a file goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from lolgen.errors import FormatError
from lolgen.io import keys, pairs
from lolgen.io.names import KOHYA_PREFIXES
from lolgen.io.safetensors_file import Path_


def is_kohya_key(key: str) -> bool:
    """`lora_unet_..._to_q.lora_down.weight`: underscores up to the first dot."""
    head, _, tail = key.partition(".")
    return head.startswith(KOHYA_PREFIXES) and bool(tail)


def target(path: Path_, default: str) -> Path:
    """The file to write: `path` itself when it ends in .safetensors, else `default` in the folder `path`."""
    file = Path(path)
    if file.suffix == ".safetensors" and not file.is_dir():
        return file
    if file.is_file():
        raise FormatError(
            path,
            found="a file whose name does not end in .safetensors",
            wanted="a .safetensors file or a folder",
            remedy="choose another path",
        )
    return file / default


def carried(metadata: Mapping[str, str], drop: tuple[str, ...] = ()) -> dict[str, str]:
    """A header to write: what was there, less what the format says in its own way, and the usual `format`."""
    return {k: v for k, v in metadata.items() if k not in drop and not k.startswith("lolgen.io.")} | {
        "format": "pt"
    }


def alpha_of(file: Path_, key: str, tensor: Tensor, rank: int) -> float:
    """The number in an alpha tensor; 0 means that alpha is the rank."""
    if tensor.numel() != 1 or tensor.dtype == torch.bool:
        raise FormatError(
            file,
            key=key,
            found=f"shape {tuple(tensor.shape)}, {tensor.dtype}".replace("torch.", ""),
            wanted="one number",
            remedy="the file is damaged: save it again",
        )
    return float(tensor.double()) or float(rank)


def fold_biases(
    file: Path_, extras: dict[str, Tensor], biases: list[tuple[str, str]], collected: pairs.Collected
) -> None:
    """Put the scale into the biases of B, which are scaled with their pairs: saved files have alpha = r."""
    for name, key in biases:
        need_pair(file, key, name, collected, "a bias")
        bias = extras[f"{name}.{keys.BIAS}"]
        extras[f"{name}.{keys.BIAS}"] = (bias.double() * collected[name].scale).to(bias.dtype)


def add_extras(file: Path_, tensors: dict[str, Tensor], extras: Mapping[str, Tensor], fmt: str) -> None:
    """Extras into a file without folders: under their own names, but never a PEFT model's full weights."""
    for key, tensor in extras.items():
        if key.startswith("base_model.") or ".base_model." in key:
            raise FormatError(
                file,
                key=key,
                found="a full tensor of the base model (modules_to_save)",
                wanted=f"what a {fmt} file can hold",
                remedy="save as peft, or take it out of the LoRA's extras",
            )
        if key in tensors:
            raise FormatError(
                file,
                key=key,
                found="an extra tensor with a factor's key",
                wanted="keys of their own",
                remedy="take it out of the LoRA's extras",
            )
        tensors[key] = tensor


def need_pair(file: Path_, key: str, name: str, collected: pairs.Collected, what: str) -> None:
    """FormatError when `key` is of a module that has no factor pair."""
    if name not in collected:
        raise FormatError(
            file,
            key=key,
            found=f"{what} without a factor pair",
            wanted="both halves of its module",
            remedy="the file is incomplete: download or save it again",
        )


def need_pairs(file: Path_, collected: pairs.Collected) -> None:
    """FormatError when there is no factor pair at all."""
    if not collected:
        raise FormatError(
            file,
            found="no factor pair",
            wanted="a LoRA",
            remedy="check that this is an adapter, not a full model",
        )
