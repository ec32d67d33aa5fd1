"""What modules are called: one name each, whatever the file.

A module of a diffusers pipeline is its component and its diffusers path,
`unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`; CLIP text encoders keep the `text_model.`
that transformers 5 dropped from the path. A module of a language model is its path in the model,
`model.layers.0.self_attn.q_proj`. A kohya name that no table explains stays as it is, `lora_unet_own_layer`.

While a file is read, a module whose rows are several of ours, or ours in another order, is called by its family
and its original path, `flux:double_blocks.0.img_attn.qkv`, until `lolgen.io.fused` has taken it apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from lolgen.io.families import LAYOUTS, text, unet
from lolgen.io.families.underscores import dotted

_COMPONENT = re.compile(r"unet|text_encoder(?:_\d)?|prior|transformer(?:_\d)?|controlnet")
_CLIP_FLAT = re.compile(r"^(text_encoder(?:_\d)?)\.(encoder\.layers\.|embeddings\.|final_layer_norm)")
_TRANSFORMER = {"transformer_blocks", "single_transformer_blocks"}
# What follows `transformer.` in language models (GPT-2, Falcon, Bloom, ChatGLM, XLNet); and what
# tells the blocks of diffusers' transformers from MPT's, which are also called `blocks`.
_LANGUAGE = {
    "h", "wte", "wpe", "ln_f", "embd", "embedding", "word_embedding", "word_embeddings", "encoder", "layer",
    "output_layer", "norm_f",
}  # fmt: skip
_DIFFUSION = {
    "attn1",
    "attn2",
    "to_q",
    "to_k",
    "to_v",
    "to_out",
    "add_q_proj",
    "add_k_proj",
    "add_v_proj",
    "net",
}


def natural(name: str) -> list[tuple[int, int, str]]:
    """Sort key: numbers by value, `blocks.2` before `blocks.10`. The order of a loaded spec."""
    return [
        (0, int(part), "") if part.isdigit() else (1, 0, part) for part in re.split(r"(\d+)", name) if part
    ]


def component(name: str) -> str | None:
    """The diffusers component that a name starts with; None for a name that has none.

    `transformer.` also starts the paths of GPT-2 and its like; there it is none.
    """
    first, _, rest = name.partition(".")
    if not rest or not _COMPONENT.fullmatch(first):
        return None
    if first.startswith("transformer"):
        segments = rest.split(".")
        unlike = not _DIFFUSION & set(segments) if segments[0] == "blocks" else segments[0] in _LANGUAGE
        return None if unlike else first
    return first


def with_component(path: str, default: str | None = None) -> str:
    """Our name of a path found in a diffusers file, or in a PEFT folder of a component (`default`)."""
    if default is None and component(path) is None:
        top, _, rest = path.partition(".")
        if top in unet.TOPS:
            default = "unet"
        elif top in _TRANSFORMER:
            default = "transformer"
        elif path.startswith("text_model.encoder."):
            default = "text_encoder"
    name = f"{default}.{path}" if default else path
    return _CLIP_FLAT.sub(r"\1.text_model.\2", name)


def is_unet_path(path: str) -> bool:
    """Whether a path without component is one of a diffusers UNet."""
    return path.partition(".")[0] in unet.TOPS


def suffix_path(name: str) -> str:
    """The shortest path by which PEFT finds the module in old and new transformers: without `text_model.`."""
    part = component(name)
    path = name[len(part) + 1 :] if part else name
    return path.removeprefix("text_model.") if part and part.startswith("text_encoder") else path


def sd1_modules() -> tuple[str, ...]:
    """The module table of Stable Diffusion 1.x, UNet and text encoder: what kohya's names refer to."""
    return (*unet.modules(), *text.clip_modules())


def sdxl_modules() -> tuple[str, ...]:
    """The module table of SDXL: UNet and both text encoders."""
    second = text.clip_modules(32, "text_encoder_2")
    return (*unet.sdxl(), *text.clip_modules(), *second, "text_encoder_2.text_projection")


unet_modules = unet.modules
clip_modules = text.clip_modules


def pending(name: str) -> tuple[str, str] | None:
    """(family, original path) of a module that is still to be taken apart; None for any other name."""
    family, colon, path = name.partition(":")
    return (family, path) if colon and family in LAYOUTS else None


def from_original(path: str) -> str | None:
    """Our name of a path in an original layout (Flux, SD3, the LDM UNet); None for one that is none.

    A pending name (see the module's text) where it is not one of our modules, row by row.
    """
    for family, layout in LAYOUTS.items():
        parts = layout.parts(path)
        if parts:
            return f"transformer.{parts[0]}" if layout.plain(path) else f"{family}:{path}"
    found = unet.from_ldm(path)
    return None if found is None else f"unet.{found}"


_OTHER_PREFIXES = (
    ("text_encoders.clip_l.transformer.", "text_encoder."),
    ("text_encoders.clip_g.transformer.", "text_encoder_2."),
    ("model.diffusion_model.", ""),
    ("diffusion_model.", ""),
)


def from_other(path: str) -> str | None:
    """Our name of a path as ComfyUI, ai-toolkit and the original repositories write it; None when it is none."""
    for prefix, ours in _OTHER_PREFIXES:
        if path.startswith(prefix):
            rest = path[len(prefix) :]
            return ours + rest if ours else from_original(rest)
    return from_original(path)


_KOHYA_PREFIXES = (
    ("lora_unet_", "unet"),
    ("lora_transformer_", "unet"),
    ("lycoris_", "unet"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "t5"),
)
KOHYA_PREFIXES = tuple(prefix for prefix, _ in _KOHYA_PREFIXES)
STYLES = ("diffusers", "sdxl", *LAYOUTS)
"""Whose names a kohya file uses: diffusers' own (SD 1 and 2), or the original ones of a family."""


def to_kohya(name: str, te: str = "lora_te_", style: str = "diffusers") -> str | None:
    """kohya's name of a module; None for one that has none (a language model's).

    `te`: what the first text encoder is called. `style`: one of STYLES; a transformer has names in its own only.
    """
    if name.startswith(KOHYA_PREFIXES) and "." not in name:
        return name
    waiting = pending(name)
    part = component(name) or ""
    path: str | None = name[len(part) + 1 :]
    prefix = {
        "unet": "lora_unet_",
        "text_encoder": te,
        "text_encoder_2": "lora_te3_" if text.t5_path(path or "") else "lora_te2_",
        "text_encoder_3": "lora_te3_",
        "transformer": "lora_unet_",
    }.get(part)
    if waiting:
        prefix, path = "lora_unet_", waiting[1]
    elif part == "unet" and style == "sdxl":
        path = unet.to_ldm(path or "")
    elif part == "transformer":
        found = LAYOUTS[style].original(path or "") if style in LAYOUTS else None
        path = found[0] if found else None
    return None if prefix is None or path is None else prefix + path.replace(".", "_")


def from_kohya(name: str, table: dict[str, str], t5: str = "text_encoder_3") -> str:
    """Our name of kohya's: by `table` (of `kohya_table`), or the grammars of the families, or unchanged.

    `t5`: the component that `lora_te3_` is; Flux has T5 as its second text encoder, SD3 as its third.
    """
    if name in table:
        return table[name]
    for prefix, part in _KOHYA_PREFIXES:
        if name.startswith(prefix):
            rest = name[len(prefix) :]
            if part == "t5":
                path = text.t5_path(rest)
                return name if path is None else f"{t5}.{path}"
            if part == "unet":
                return _denoiser(rest) or name
            path = dotted(rest, text.CLIP_TOPS, text.CLIP_SEGMENTS) or text.t5_path(rest)
            return name if path is None else f"{part}.{path}"
    return name


def _denoiser(name: str) -> str | None:
    """Our name of a UNet's or transformer's module whose path has underscores, in any spelling."""
    path = dotted(name, unet.TOPS, unet.SEGMENTS) or unet.from_ldm_underscores(name)
    if path is not None:
        return f"unet.{path}"
    for layout in LAYOUTS.values():
        path = layout.dotted(name)
        if path is not None:
            return from_original(path) if layout.parts(path) else f"transformer.{path}"
    return None


def kohya_table(modules: Iterable[str]) -> dict[str, str]:
    """kohya name -> our name, for every module that has a kohya name; names without component get theirs."""
    table = {}
    for module in modules:
        name = with_component(module)
        for te in ("lora_te_", "lora_te1_"):
            for style in ("diffusers", "sdxl"):
                key = to_kohya(name, te, style)
                if key:
                    table[key] = name
    return table
