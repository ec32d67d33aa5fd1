"""kohya (sd-scripts) files for Stable Diffusion 1.x.

`lora_unet_..._to_q.lora_down.weight`, `.lora_up.weight` and `.alpha`; no alpha, or 0, means the rank.
The dots of a module's path are underscores here, so the way back needs a table. Diffusers names are read
back by their grammar, or by the module names that the caller gives; a name that neither explains (SDXL's
`lora_unet_input_blocks_4_1_...`, Flux) stays as it is and can be written to a kohya file only.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

from lolgen.errors import FormatError
from lolgen.io import common, diffusers, keys, names, pairs
from lolgen.io import safetensors_file as stf
from lolgen.lora import LoRA

FILE = "lora.safetensors"
NAMES = "lolgen.io.modules"
"""Header entry: module names, JSON, where the grammar would not read them back."""

_PARTS = {"lora_down.weight": "A", "lora_up.weight": "B", "lora_mid.weight": "mid"}
_OTHER = ("hada_", "lokr_", "oft_", "glora", "a1.", "on_input")


def load(path: stf.Path_, modules: pairs.Modules | None = None) -> LoRA:
    """The LoRA of a kohya file. `modules` (names, or a Spec of the base) tells what the underscores were.

    `lora_mid` (Tucker) is folded into A, exactly. Raises FormatError.
    """
    tensors, metadata = stf.read(path)
    if modules is not None and not isinstance(modules, pairs.Spec):
        modules = list(modules)
    known = [m if isinstance(m, str) else m.name for m in modules or ()]
    table = names.kohya_table([*_recorded(path, metadata.pop(NAMES, None)), *known])
    collected = pairs.Collected(path)
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
        elif tail.startswith(_OTHER):
            raise FormatError(
                path,
                key=key,
                found="a factor of LoHa, LoKr or another LyCORIS method",
                wanted="lora_down and lora_up",
                remedy="only LoRA has the factor pairs that lolgen works on",
            )
        elif tail in _PARTS:
            collected.put(names.from_kohya(head, table), _PARTS[tail], key, tensor)
        elif tail == "alpha":
            alphas[names.from_kohya(head, table)] = key, tensor
        elif tail == "dora_scale":
            scales[names.from_kohya(head, table)] = key, tensor
        else:
            extras[key] = tensor
    for name, (key, tensor) in alphas.items():
        common.need_pair(path, key, name, collected, "an alpha")
        rank = _rank(collected[name])
        collected[name].scale = common.alpha_of(path, key, tensor, rank) / rank
    common.need_pairs(path, collected)
    lora = pairs.build(path, collected, metadata, extras, modules)
    for name, (key, tensor) in scales.items():
        common.need_pair(path, key, name, collected, "a dora_scale")
        module = lora.spec[name]
        if tensor.numel() == module.out and tensor.shape[0] == module.out:
            shape = (1, module.out, *[1] * len(module.kernel)) if module.kernel else (module.out,)
            extras[f"{name}.{keys.MAGNITUDE}"] = tensor.reshape(shape)
        else:  # a magnitude per input, which PEFT does not have
            extras[key] = tensor
    return lora


def save(lora: LoRA, path: stf.Path_, dtype: torch.dtype | None = None) -> Path:
    """Write a kohya file at `path` (`....safetensors`), or as `lora.safetensors` in the folder; returns it.

    The scale is in the factors and alpha is the rank; with mixed ranks no alpha is written, which says the
    same. FormatError when a module has no kohya name (a language model's, a transformer's, an embedding), or
    nothing can be written.
    """
    file = common.target(path, FILE)
    factors = pairs.baked(file, lora, dtype)
    sdxl = any(n.startswith(("text_encoder_2.", "lora_te2_", *_sdxl_prefixes)) for n in lora.names)
    # diffusers 0.42 loses the alphas of attention modules where they differ, and puts the commonest there.
    # No alpha at all means a scale of 1 to every reader, ComfyUI and diffusers included.
    one_rank = len({a.shape[0] for _, a in factors.values()}) == 1
    heads: dict[str, str] = {}
    tensors: dict[str, Tensor] = {}
    for module in lora.spec:
        head = names.to_kohya(module.name, "lora_te1_" if sdxl else "lora_te_")
        if head is None or module.kind == "embedding":
            raise FormatError(
                file,
                key=module.name,
                found=f"{module.kind} module that kohya has no name for",
                wanted="linear and conv modules of unet., text_encoder. or text_encoder_2.",
                remedy="save as peft or diffusers instead",
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
    if any(names.from_kohya(heads[n], {}) != n for n in lora.names):
        metadata[NAMES] = json.dumps([n for n in lora.names if "." in n])
    stf.refresh_hashes(tensors, metadata)
    stf.write(file, tensors, metadata)
    return file


_sdxl_prefixes = ("lora_unet_input_blocks", "lora_unet_middle_block", "lora_unet_output_blocks")


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
