"""diffusers files: one safetensors file, `unet.<path>.lora_A.weight`, alpha in the header if anywhere.

Written with the scale inside the factors, alpha = rank, and the metadata that says so as well. UNets and
transformers get `lora_A`/`lora_B`; text encoders `lora_linear_layer.down`/`.up`, the only spelling with
which diffusers loads a text encoder whose MLP alone is adapted.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolgen.errors import FormatError
from lolgen.io import common, keys, lycoris, names, pairs
from lolgen.io import safetensors_file as stf
from lolgen.io.peft_config import check_config, ranks_config, scale_of
from lolgen.lora import LoRA

FILE = "pytorch_lora_weights.safetensors"
HEADER = "lora_adapter_metadata"
_SKIPPED = ("checkpoint", "scheduler", "optimizer")


def load(
    path: stf.Path_,
    modules: pairs.Modules | None = None,
    *,
    base: str | None = None,
    rank: int | None = None,
    report: list[lycoris.Converted] | None = None,
) -> LoRA:
    """The LoRA of a diffusers file, or of one with the dotted names of ComfyUI and the original repositories
    (`diffusion_model.double_blocks.0.img_attn.qkv`). Raises FormatError.

    `base`, `rank`, `report`: as in `lolgen.io.kohya.load`.
    """
    tensors, metadata = stf.read(path)
    config = _header_config(path, metadata)
    collected = pairs.Collected(path)
    others = lycoris.Modules(path)
    alphas: dict[str, pairs.Keyed] = {}
    paths: dict[str, str] = {}  # as in the file, component and all
    extras: dict[str, Tensor] = {}
    biases: list[tuple[str, str]] = []
    for key, tensor in tensors.items():
        if common.is_kohya_key(key):
            raise FormatError(
                path,
                key=key,
                found="a kohya key among diffusers keys",
                wanted="one format in a file",
                remedy="save each adapter to its own file",
            )
        other = lycoris.tail(key)
        if other:
            others.put(_name(other[0]), other[1], key, tensor)
            continue
        parsed = keys.parse(key)
        if parsed is None:
            extras[key] = tensor
            continue
        name = _name(parsed.path)
        paths[name] = parsed.path
        if parsed.part == "alpha":
            alphas[name] = key, tensor
        elif parsed.part == "magnitude":
            extras[f"{name}.{keys.MAGNITUDE}"] = tensor
        elif parsed.part == "bias":
            extras[f"{name}.{keys.BIAS}"] = tensor
            biases.append((name, key))
        else:
            collected.put(name, parsed.part, key, tensor, parsed.embedding)
    done = set(others)
    others.into(collected, alphas, rank, base, report)
    for name, halves in collected.items():
        if name in done:
            continue
        part = names.component(name) or ""
        fields = _of_component(config, part)
        check_config(path, fields)
        if name in alphas:
            halves.scale = common.alpha_of(path, *alphas[name], halves.rank) / halves.rank
        elif fields:
            at = paths[name].removeprefix(f"{part}.")
            halves.scale = scale_of(path, fields, at, halves.rank)
    for name, (key, _) in alphas.items():
        common.need_pair(path, key, name, collected, "an alpha")
    common.need_pairs(path, collected)
    common.fold_biases(path, extras, biases, collected)
    return pairs.build(path, collected, metadata, extras, modules)


def _name(path: str) -> str:
    """Our name, or a pending one, of a path in a diffusers file or one of its relatives."""
    return names.from_other(path) or names.with_component(path)


def save(lora: LoRA, path: stf.Path_, dtype: torch.dtype | None = None) -> Path:
    """Write a diffusers file at `path` (`....safetensors`), or `pytorch_lora_weights.safetensors` in the
    folder `path`; returns the file.

    FormatError when a module has no diffusers component, or nothing can be written.
    """
    file = common.target(path, FILE)
    if any(word in file.name for word in _SKIPPED):
        warnings.warn(
            f"diffusers passes over {file.name} when it looks for an adapter in a folder: its name "
            f"holds one of {', '.join(_SKIPPED)}; give the name as weight_name",
            stacklevel=3,
        )
    tensors, metadata = content(file, lora, pairs.baked(file, lora, dtype))
    stf.write(file, tensors, metadata)
    return file


def content(
    file: stf.Path_, lora: LoRA, factors: Mapping[str, tuple[Tensor, Tensor]]
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of the file."""
    tensors: dict[str, Tensor] = {}
    ranks: dict[str, dict[str, int]] = {}
    for module in lora.spec:
        part = names.component(module.name)
        if part is None:
            raise FormatError(
                file,
                key=module.name,
                found="a module of no diffusers component",
                wanted="unet., text_encoder. or transformer. before its path",
                remedy="save as peft instead",
            )
        down, up = (
            ("lora_embedding_A", "lora_embedding_B") if module.kind == "embedding"
            else ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight") if "text" in part
            else ("lora_A.weight", "lora_B.weight")
        )  # fmt: skip
        B, A = factors[module.name]
        tensors[f"{module.name}.{down}"], tensors[f"{module.name}.{up}"] = A, B
        ranks.setdefault(part, {})[names.suffix_path(module.name)] = A.shape[0]
    common.add_extras(file, tensors, lora.extras, "diffusers")
    metadata = common.carried(lora.metadata, drop=(HEADER,))
    old = _header_config(file, lora.metadata)
    config: dict[str, Any] = {}
    for part, found in ranks.items():
        before = _of_component(old, part)
        mine = [k for k in lora.extras if k.startswith(f"{part}.")]
        fields = before | {
            **ranks_config(found),
            "target_modules": sorted(found),
            "use_rslora": False,
            "use_dora": any(k.endswith(f".{keys.MAGNITUDE}") for k in mine),
            "init_lora_weights": True,
        }
        if any(k.endswith(f".{keys.BIAS}") for k in mine):
            fields["lora_bias"] = True
        config.update({f"{part}.{k}": v for k, v in fields.items()})
    metadata[HEADER] = json.dumps(config, sort_keys=False)
    stf.refresh_hashes(tensors, metadata)
    return tensors, metadata


def _header_config(file: stf.Path_, metadata: Mapping[str, str]) -> dict[str, Any]:
    text = metadata.get(HEADER)
    if not text:
        return {}
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            file,
            key=HEADER,
            found=f"something that is not JSON ({error})",
            wanted="a JSON object",
            remedy=stf.AGAIN,
        ) from None
    if not isinstance(config, dict):
        raise FormatError(
            file, key=HEADER, found=type(config).__name__, wanted="a JSON object", remedy=stf.AGAIN
        )
    return config


def _of_component(config: Mapping[str, Any], part: str) -> dict[str, Any]:
    """The fields of one component; those without a prefix when the file was saved from one model alone."""
    fields = {k[len(part) + 1 :]: v for k, v in config.items() if k.startswith(f"{part}.")}
    if not fields and "lora_alpha" in config:
        return dict(config)
    return fields
