"""kohya (sd-scripts) files, and the LyCORIS ones that share their names.

`lora_unet_..._to_q.lora_down.weight`, `.lora_up.weight` and `.alpha`; no alpha, or 0, means the rank.
The dots of a module's path are underscores here, so the way back needs a grammar a family (`lolgen.io.families`),
or the module names that the caller gives; a name that neither explains stays as it is and can be written to a
kohya file only. SDXL's UNet, Flux and SD3 have their original names here; what those fuse is taken apart on
reading and put together on writing (`lolgen.io.fused`).
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from lolgen.errors import FormatError
from lolgen.io import common, diffusers, fused, guess, keys, lycoris, names, pairs
from lolgen.io import safetensors_file as stf
from lolgen.lora import LoRA

FILE = "lora.safetensors"
NAMES = "lolgen.io.modules"
"""Header entry: module names, JSON, where the grammar would not read them back."""

_PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "lora_mid.weight": "mid"}
# ComfyUI and some trainers put diffusers' words behind kohya's names.
_PARTS |= {"lora_A.weight": "A", "lora_B.weight": "B"}


def load(
    path: stf.Path_,
    modules: pairs.Modules | None = None,
    *,
    base: str | None = None,
    rank: int | None = None,
    report: list[lycoris.Converted] | None = None,
) -> LoRA:
    """The LoRA of a kohya file. `modules` (names, or a Spec of the base) tells what the underscores were.

    `lora_mid` (Tucker) is folded into A, exactly; LoHa and LoKr become LoRAs (`lolgen.io.lycoris`), at `rank` at
    most, and are listed in `report`. `base`: the family, where names leave it open. Raises FormatError.
    """
    tensors, metadata = stf.read(path)
    if modules is not None and not isinstance(modules, pairs.Spec):
        modules = list(modules)
    known = [m if isinstance(m, str) else m.name for m in modules or ()]
    table = names.kohya_table([*_recorded(path, metadata.pop(NAMES, None)), *known])
    t5 = guess.t5_component(tensors, base)
    collected = pairs.Collected(path)
    others = lycoris.Modules(path)
    alphas: dict[str, pairs.Keyed] = {}
    extras: dict[str, Tensor] = {}
    scales: dict[str, pairs.Keyed] = {}
    for key, tensor in tensors.items():
        head, _, tail = key.partition(".")
        if not common.is_kohya_key(key):
            if keys.is_factor(key):
                raise FormatError(
                    path,
                    key=key,
                    found="a diffusers or PEFT key among kohya keys",
                    wanted="one format in a file",
                    remedy="save each adapter to its own file",
                )
            extras[key] = tensor
            continue
        name = names.from_kohya(head, table, t5)
        if lycoris.PART.fullmatch(tail):
            others.put(name, tail, key, tensor)
        elif tail.startswith(lycoris.OTHER):
            raise FormatError(
                path,
                key=key,
                found="a factor of another LyCORIS method",
                wanted="LoRA, LoCon, LoHa or LoKr",
                remedy="only these have the factor pairs that lolgen works on",
            )
        elif tail in _PARTS:
            collected.put(name, _PARTS[tail], key, tensor)
        elif tail == "alpha":
            alphas[name] = key, tensor
        elif tail == "dora_scale":
            scales[name] = key, tensor
        else:
            extras[key] = tensor
    others.into(collected, alphas, rank, base, report)
    for name, (key, tensor) in alphas.items():
        common.need_pair(path, key, name, collected, "an alpha")
        rank_ = _rank(collected[name])
        collected[name].scale = common.alpha_of(path, key, tensor, rank_) / rank_
    common.need_pairs(path, collected)
    for name, (key, tensor) in scales.items():
        common.need_pair(path, key, name, collected, "a dora_scale")
        magnitude = _magnitude(collected[name], tensor)
        extras[key if magnitude is None else f"{name}.{keys.MAGNITUDE}"] = (
            tensor if magnitude is None else magnitude
        )
    return pairs.build(path, collected, metadata, extras, modules)


def _magnitude(halves: pairs.Halves, tensor: Tensor) -> Tensor | None:
    """A `dora_scale` in PEFT's shape; None for a magnitude per input, which PEFT does not have."""
    if not {"A", "B"} <= halves.parts.keys():
        return None  # `pairs.build` says so
    out, spatial = halves.parts["B"][1].shape[0], halves.parts["A"][1].ndim - 2
    if tensor.ndim < 1 or tensor.numel() != out or tensor.shape[0] != out:
        return None
    return tensor.reshape((1, out, *[1] * spatial) if spatial > 0 else (out,))


def save(
    lora: LoRA,
    path: stf.Path_,
    dtype: torch.dtype | None = None,
    *,
    base: str | None = None,
    report: list[fused.Fused] | None = None,
) -> Path:
    """Write a kohya file at `path` (`....safetensors`), or as `lora.safetensors` in the folder; returns it.

    The scale is in the factors and alpha is the rank; with mixed ranks no alpha is written, which says the
    same. `base`: the family whose names to use; without it, the one that the modules show. What was fused is
    appended to `report`. FormatError when a module has no kohya name (a language model's, an embedding), or nothing
    can be written.
    """
    file = common.target(path, FILE)
    style, te = guess.kohya_style(file, lora, base)
    if style in fused.LAYOUTS:
        lora, found = fused.fuse(file, lora, style)
        (report if report is not None else []).extend(found)
    factors = pairs.baked(file, lora, dtype)
    # diffusers 0.42 loses the alphas of attention modules where they differ, and puts the commonest there.
    # No alpha at all means a scale of 1 to every reader, ComfyUI and diffusers included.
    one_rank = len({a.shape[0] for _, a in factors.values()}) == 1
    heads: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for module in lora.spec:
        head = names.to_kohya(module.name, te, style)
        if head is None or module.kind == "embedding":
            language = names.component(module.name) is None
            raise FormatError(
                file,
                key=module.name,
                found=f"{module.kind} module that kohya has no name for",
                wanted="linear and conv modules of unet., text_encoder. or transformer.",
                remedy="save as peft instead" if language else "save as peft or diffusers instead",
            )
        if f"{head}.lora_down.weight" in tensors:
            raise FormatError(
                file,
                key=module.name,
                found=f"a second module called {head}",
                wanted="names that differ in kohya's form",
                remedy="save as diffusers instead",
            )
        heads[module.name] = head
        B, A = factors[module.name]
        tensors[f"{head}.lora_down.weight"], tensors[f"{head}.lora_up.weight"] = A, B
        if one_rank:
            tensors[f"{head}.alpha"] = torch.tensor(float(A.shape[0]))
    extras = {}
    for key, tensor in lora.extras.items():
        name = key.removesuffix(f".{keys.MAGNITUDE}")
        if key.endswith(f".{keys.BIAS}"):
            raise FormatError(
                file,
                key=key,
                found="a bias beside lora_B",
                wanted="factor pairs alone, all that kohya knows",
                remedy="save as peft or diffusers instead",
            )
        if name != key and name in heads:
            kernel = lora.spec[name].kernel
            extras[f"{heads[name]}.dora_scale"] = tensor.reshape(-1, 1, *[1] * len(kernel))
        else:
            extras[key] = tensor
    common.add_extras(file, tensors, extras, "kohya")
    metadata = common.carried(lora.metadata, drop=("adapter_config", diffusers.HEADER, "format"))
    t5 = guess.t5_component(tensors, base)
    if any(names.from_kohya(heads[n], {}, t5) != n for n in lora.names):
        metadata[NAMES] = json.dumps([n for n in lora.names if "." in n and not names.pending(n)])
    stf.refresh_hashes(tensors, metadata)
    stf.write(file, tensors, metadata)
    return file


def _rank(halves: pairs.Halves) -> int:
    """The rank that alpha is divided by: the up half's, which with a Tucker core is not the down half's."""
    if "mid" in halves.parts and halves.parts["mid"][1].ndim:
        return int(halves.parts["mid"][1].shape[0]) or 1
    return halves.rank or 1


def _recorded(file: stf.Path_, text: str | None) -> list[str]:
    if text is None:
        return []
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, list) or not all(isinstance(n, str) for n in found):
        raise FormatError(
            file, key=NAMES, found="something else", wanted="a JSON list of names", remedy=stf.AGAIN
        )
    return found
