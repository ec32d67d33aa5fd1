"""PEFT folders: `adapter_model.safetensors` and `adapter_config.json`.

A folder of a diffusers component (a UNet trained with PEFT alone) holds paths without the component, as the
component is the model there. The name of the component stands in the weights' header; a folder that PEFT
wrote itself is recognised by `auto_mapping` or by the paths of a UNet.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolgen.errors import FormatError
from lolgen.io import atomic, common, diffusers, keys, names, pairs
from lolgen.io import safetensors_file as stf
from lolgen.io.families import language
from lolgen.io.peft_config import check_config, ranks_config, scale_of
from lolgen.lora import LoRA

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
PREFIX = "base_model.model."
COMPONENT = "lolgen.io.component"
"""Header entry of the weights: the diffusers component that the paths are of, empty for none."""


def load(path: stf.Path_, modules: pairs.Modules | None = None, *, component: str | None = None) -> LoRA:
    """The LoRA of a PEFT folder (or of the weights in one). Raises FormatError.

    `component`: the diffusers component of the paths, where neither the file nor its config tells.
    The config is kept as metadata `adapter_config`; biases of B are kept with the scale inside.
    """
    file = weights_file(path)
    config = _config(file.parent / CONFIG)
    check_config(file.parent / CONFIG, config)
    tensors, metadata = stf.read(file)
    parsed = {key: keys.parse(key.removeprefix(PREFIX)) for key in tensors}
    told = _component(metadata.pop(COMPONENT, None), config, [k.path for k in parsed.values() if k])
    component = told or component
    collected = pairs.Collected(file)
    paths: dict[str, str] = {}
    extras: dict[str, Tensor] = {}
    biases: list[tuple[str, str]] = []
    for key, tensor in tensors.items():
        meaning = parsed[key]
        if meaning is None or meaning.part in ("alpha", "mid"):
            extras[key] = tensor
            continue
        name = names.with_component(meaning.path, component) if component else meaning.path
        if component == "transformer":
            name = names.from_original(meaning.path) or name
        paths[name] = meaning.path
        if meaning.part == "magnitude":
            extras[f"{name}.{keys.MAGNITUDE}"] = tensor
        elif meaning.part == "bias":
            extras[f"{name}.{keys.BIAS}"] = tensor
            biases.append((name, key))
        else:
            collected.put(name, meaning.part, key, tensor, meaning.embedding)
    for name, halves in collected.items():
        halves.scale = scale_of(file.parent / CONFIG, config, paths[name], halves.rank)
    common.need_pairs(file, collected)
    common.fold_biases(file, extras, biases, collected)
    metadata["adapter_config"] = json.dumps(config, sort_keys=True)
    return pairs.build(file, collected, metadata, extras, modules)


def save(
    lora: LoRA,
    path: stf.Path_,
    dtype: torch.dtype | None = None,
    companion: bool = True,
    *,
    projected: bool = False,
) -> Path:
    """Write a PEFT folder at `path`; returns the folder.

    PEFT loads it as it is: `PeftModel.from_pretrained(pipe.unet, path)`. In PEFT's keys diffusers finds none
    of its own: `pipe.load_lora_weights(path)` would load nothing, without an error. So a folder of a
    diffusers component also gets `pytorch_lora_weights.safetensors`, unless `companion` is false.
    `projected`: the first text encoder is a CLIPTextModelWithProjection, which keeps `text_model.` in its paths.
    FormatError when the LoRA is of several components (a folder is for one model), or cannot be written.
    """
    folder = Path(path)
    if folder.is_file() or folder.suffix == ".safetensors":
        raise FormatError(
            path,
            found="the path of a file",
            wanted="a folder, which is what PEFT loads",
            remedy="choose a folder, or a format that is one file (diffusers, kohya)",
        )
    component = _one_component(folder, lora)
    factors = pairs.baked(folder, lora, dtype)
    tensors: dict[str, Tensor] = {}
    paths = {}
    for module in lora.spec:
        # transformers 5 has no `text_model.` in CLIPTextModel, which is what a text_encoder mostly is.
        flat = component == "text_encoder" and not projected
        at = names.suffix_path(module.name) if flat else module.name.removeprefix(f"{component}.")
        paths[module.name] = at
        A_key, B_key = (
            ("lora_embedding_A", "lora_embedding_B")
            if module.kind == "embedding"
            else ("lora_A.weight", "lora_B.weight")
        )
        B, A = factors[module.name]
        tensors[f"{PREFIX}{at}.{A_key}"], tensors[f"{PREFIX}{at}.{B_key}"] = A, B
    for key, tensor in lora.extras.items():
        name = key.removesuffix(f".{keys.MAGNITUDE}").removesuffix(f".{keys.BIAS}")
        key = f"{PREFIX}{paths[name]}{key[len(name) :]}" if name in paths and name != key else key
        if key in tensors:
            raise FormatError(
                folder,
                key=key,
                found="an extra tensor with a factor's key",
                wanted="keys of their own",
                remedy="take it out of the LoRA's extras",
            )
        tensors[key] = tensor
    metadata = common.carried(lora.metadata, drop=("adapter_config", diffusers.HEADER))
    metadata[COMPONENT] = component
    stf.refresh_hashes(tensors, metadata)
    files = {WEIGHTS: stf.serialize(tensors, metadata)}
    if component and companion and not any(k.startswith(PREFIX) for k in lora.extras):
        files[diffusers.FILE] = stf.serialize(*diffusers.content(folder, lora, factors))
    config = _new_config(folder, lora)
    files[CONFIG] = (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
    try:
        atomic.write_folder(folder, files, last=CONFIG)
    except OSError as error:
        raise stf.cannot_write(folder, error) from error
    return folder


def weights_file(path: stf.Path_) -> Path:
    """The weights of a folder; `path` itself when it is a file. FormatError when there are none to read."""
    place = Path(path)
    if not place.is_dir():
        return place
    if (place / WEIGHTS).exists():
        return place / WEIGHTS
    found = sorted(place.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    pickled = sorted(f.name for f in place.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt"))
    if pickled and not found:
        raise FormatError(place / pickled[0], found="a pickle", wanted=WEIGHTS, remedy=stf.NO_PICKLE)
    raise FormatError(
        path,
        found=", ".join(f.name for f in found) or f"a folder without {WEIGHTS}",
        wanted=WEIGHTS if not found else "one adapter",
        remedy="name the file you mean" if found else "check the path: this is no adapter's folder",
    )


def _config(file: Path) -> dict[str, Any]:
    try:
        text = file.read_bytes()
    except FileNotFoundError:
        raise FormatError(
            file,
            found="no such file",
            wanted="the config of the adapter, which alone tells its scale",
            remedy=f"get {CONFIG} from where the weights came from",
        ) from None
    except OSError as error:
        raise FormatError(
            file,
            found=error.strerror or str(error),
            wanted="a file that can be read",
            remedy="check its permissions",
        ) from error
    try:
        config = json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise FormatError(
            file, found=f"something that is not JSON ({error})", wanted="a JSON object", remedy=stf.AGAIN
        ) from None
    if not isinstance(config, dict):
        raise FormatError(file, found=type(config).__name__, wanted="a JSON object", remedy=stf.AGAIN)
    return config


def _component(recorded: str | None, config: dict[str, Any], paths: list[str]) -> str:
    """The diffusers component that a folder's paths are of, or ""."""
    if recorded is not None:
        return recorded
    mapping = config.get("auto_mapping")
    model = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if isinstance(model, str):
        if model.startswith("UNet2DCondition"):
            return "unet"
        if model in ("CLIPTextModel", "CLIPTextModelWithProjection"):
            return "text_encoder"
        library = mapping.get("parent_library") if isinstance(mapping, dict) else None
        in_diffusers = isinstance(library, str) and library.startswith("diffusers.")
        return "transformer" if in_diffusers and "Transformer" in model else ""
    if paths and all(names.is_unet_path(p) for p in paths):
        return "unet"
    # A Flux or SD3 in its original layout, or diffusers', wrapped by PEFT alone.
    tops = ("transformer_blocks.", "single_transformer_blocks.")
    ours = paths and all(names.from_original(p) or p.startswith(tops) for p in paths)
    return "transformer" if ours and any(".attn" in p or "_attn" in p for p in paths) else ""


def _one_component(folder: Path, lora: LoRA) -> str:
    found = {names.component(n) or "" for n in lora.names}
    if len(found) > 1:
        raise FormatError(
            folder,
            found=f"modules of {', '.join(sorted(c or 'no component' for c in found))}",
            wanted="modules of one model: a PEFT folder is loaded into one",
            remedy="save as diffusers, or save each component's part to a folder of its own",
        )
    part = found.pop() if found else ""
    raw = next((n for n in lora.names if n.startswith("lora_") and "." not in n), None)
    if raw:
        raise FormatError(
            folder,
            key=raw,
            found="a kohya name that no module table explains",
            wanted="the module's path in its model",
            remedy="load the file with modules=..., the module names of its base",
        )
    return part


def _new_config(folder: Path, lora: LoRA) -> dict[str, Any]:
    try:
        old = json.loads(lora.metadata.get("adapter_config") or "{}")
    except ValueError:
        old = {}
    config: dict[str, Any] = {
        "peft_type": "LORA", "task_type": None, "base_model_name_or_path": None, "inference_mode": True,
        "bias": "none", "fan_in_fan_out": False, "lora_dropout": 0.0, "modules_to_save": None,
    }  # fmt: skip
    config.update(old if isinstance(old, dict) else {})
    if all(language.is_gpt2(name) for name in lora.names):
        config["fan_in_fan_out"] = True
    ranks = {names.suffix_path(m.name): lora[m.name].rank for m in lora.spec}
    config.update(ranks_config(ranks))
    config.update(
        init_lora_weights=True,
        use_rslora=False,
        use_dora=any(k.endswith(f".{keys.MAGNITUDE}") for k in lora.extras),
        target_modules=sorted(ranks),
        layers_to_transform=None,
        layers_pattern=None,
    )
    if any(k.endswith(f".{keys.BIAS}") for k in lora.extras) or "lora_bias" in config:
        config["lora_bias"] = any(k.endswith(f".{keys.BIAS}") for k in lora.extras)
    if not any(k.startswith(PREFIX) for k in lora.extras):
        # PEFT fails on a config that promises full weights which are not there.
        config["modules_to_save"] = None
    return config
