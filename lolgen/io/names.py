"""What modules are called: one name each, whatever the file.

A module of a diffusers pipeline is its component and its diffusers path,
`unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q`; CLIP text encoders keep the `text_model.`
that transformers 5 dropped from the path. A module of a language model is its path in the model,
`model.layers.0.self_attn.q_proj`. A kohya name that no table explains stays as it is,
`lora_unet_input_blocks_4_1_proj_in`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache

_COMPONENT = re.compile(r"unet|text_encoder(?:_\d)?|prior|transformer(?:_\d)?|controlnet")
_UNET = {
    "conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out",
}  # fmt: skip
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
_KOHYA_PREFIXES = (("lora_unet_", "unet"), ("lora_te_", "text_encoder"), ("lora_te1_", "text_encoder"),
                   ("lora_te2_", "text_encoder_2"))  # fmt: skip


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
        if top in _UNET:
            default = "unet"
        elif top in _TRANSFORMER:
            default = "transformer"
        elif path.startswith("text_model.encoder."):
            default = "text_encoder"
    name = f"{default}.{path}" if default else path
    return _CLIP_FLAT.sub(r"\1.text_model.\2", name)


def is_unet_path(path: str) -> bool:
    """Whether a path without component is one of a diffusers UNet."""
    return path.partition(".")[0] in _UNET


def suffix_path(name: str) -> str:
    """The shortest path by which PEFT finds the module in old and new transformers: without `text_model.`."""
    part = component(name)
    path = name[len(part) + 1 :] if part else name
    return path.removeprefix("text_model.") if part and part.startswith("text_encoder") else path


def unet_modules(
    down: Sequence[bool] = (True, True, True, False),
    layers: int = 2,
    depth: int = 1,
    widths: Sequence[int] = (320, 640, 1280, 1280),
) -> tuple[str, ...]:
    """Every linear and conv module of a diffusers UNet2DConditionModel, named from its structure.

    `down`: whether each down block attends (the up blocks mirror them); `layers` per down block, one more per
    up block; `depth` transformer blocks each; `widths` of the blocks, which decide where shortcuts are.
    The defaults are Stable Diffusion 1.x.
    """
    names = ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2"]

    def resnet(at: str, shortcut: bool) -> None:
        parts = ["conv1", "time_emb_proj", "conv2"] + (["conv_shortcut"] if shortcut else [])
        names.extend(f"{at}.{p}" for p in parts)

    def attention(at: str) -> None:
        names.append(f"{at}.proj_in")
        for i in range(depth):
            block = f"{at}.transformer_blocks.{i}"
            for a in ("attn1", "attn2"):
                names.extend(f"{block}.{a}.{p}" for p in ("to_q", "to_k", "to_v", "to_out.0"))
            names.extend((f"{block}.ff.net.0.proj", f"{block}.ff.net.2"))
        names.append(f"{at}.proj_out")

    last = len(widths) - 1
    for i, attends in enumerate(down):
        for j in range(layers):
            resnet(f"down_blocks.{i}.resnets.{j}", j == 0 and i > 0 and widths[i] != widths[i - 1])
            if attends:
                attention(f"down_blocks.{i}.attentions.{j}")
        if i < last:
            names.append(f"down_blocks.{i}.downsamplers.0.conv")
    resnet("mid_block.resnets.0", False)
    attention("mid_block.attentions.0")
    resnet("mid_block.resnets.1", False)
    for i, attends in enumerate(reversed(down)):
        for j in range(layers + 1):
            resnet(f"up_blocks.{i}.resnets.{j}", True)  # the skip connection always widens the input
            if attends:
                attention(f"up_blocks.{i}.attentions.{j}")
        if i < last:
            names.append(f"up_blocks.{i}.upsamplers.0.conv")
    return tuple(f"unet.{n}" for n in (*names, "conv_out"))


def clip_modules(layers: int = 12) -> tuple[str, ...]:
    """Every linear module of a CLIP text encoder's layers; 12 are the CLIP-L of Stable Diffusion 1.x."""
    parts = (*(f"self_attn.{p}_proj" for p in ("q", "k", "v", "out")), "mlp.fc1", "mlp.fc2")
    at = "text_encoder.text_model.encoder.layers"
    return tuple(f"{at}.{i}.{p}" for i in range(layers) for p in parts)


def sd1_modules() -> tuple[str, ...]:
    """The module table of Stable Diffusion 1.x, UNet and text encoder: what kohya's names refer to."""
    return (*unet_modules(), *clip_modules())


def to_kohya(name: str, te: str = "lora_te_") -> str | None:
    """kohya's name of a module; None for one that has none (a language model's, a transformer's)."""
    if name.startswith("lora_") and "." not in name:
        return name
    part = component(name)
    prefix = {"unet": "lora_unet_", "text_encoder": te, "text_encoder_2": "lora_te2_"}.get(part or "")
    return None if prefix is None or part is None else prefix + name[len(part) + 1 :].replace(".", "_")


def from_kohya(name: str, table: dict[str, str]) -> str:
    """Our name of kohya's: by `table` (of `kohya_table`), or the grammar of diffusers paths, or unchanged."""
    if name in table:
        return table[name]
    for prefix, part in _KOHYA_PREFIXES:
        if name.startswith(prefix):
            path = _dotted(name[len(prefix) :])
            return name if path is None else f"{part}.{path}"
    return name


def kohya_table(modules: Iterable[str]) -> dict[str, str]:
    """kohya name -> our name, for every module that has a kohya name; names without component get theirs."""
    table = {}
    for module in modules:
        name = with_component(module)
        for te in ("lora_te_", "lora_te1_"):
            key = to_kohya(name, te)
            if key:
                table[key] = name
    return table


_SEGMENTS = {name for module in sd1_modules() for name in module.split(".") if not name.isdigit()} | {
    "add_embedding", "text_projection", "embeddings", "token_embedding", "position_embedding",
}  # fmt: skip
_TOPS = _UNET | {"text_model", "text_projection"}


@lru_cache(maxsize=65536)
def _dotted(name: str) -> str | None:
    """The one way to cut an underscored path into segments that occur in diffusers UNets and CLIP, or None.

    One grammar serves every depth, width and number of blocks: SD 1.x, SD 2.x, and the small ones.
    """
    words = name.split("_")
    ends: list[list[str]] = [[""]] + [[] for _ in words]  # ends[i]: the dotted readings of the first i words
    for i in range(len(words)):
        for reading in ends[i][:2]:
            for j in range(i + 1, min(i + 3, len(words)) + 1):
                segment = "_".join(words[i:j])
                known = segment in (_SEGMENTS if reading else _TOPS) or (bool(reading) and segment.isdigit())
                if known:
                    ends[j].append(f"{reading}.{segment}" if reading else segment)
    return ends[-1][0] if len(ends[-1]) == 1 else None
