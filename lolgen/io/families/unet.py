"""UNets of Stable Diffusion 1, 2 and XL: diffusers' module names, the original (LDM) ones, and the way between.

The original UNet numbers its blocks in one row, `input_blocks.4.1.transformer_blocks.0.attn1.to_q`; diffusers
groups them by resolution, `down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q`. Which is which follows
from the number of layers a block alone. sd-scripts uses the original names for SDXL and diffusers' for SD 1 and 2.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from lolgen.io.families.underscores import dotted

TOPS = frozenset(
    {"conv_in", "time_embedding", "add_embedding", "down_blocks", "mid_block", "up_blocks", "conv_out"}
)
"""What a diffusers UNet's paths start with."""

_ATTENTION = {
    "proj_in", "proj_out", "transformer_blocks", "attn1", "attn2", "to_q", "to_k", "to_v", "to_out", "ff", "net",
    "proj",
}  # fmt: skip
SEGMENTS = frozenset(
    _ATTENTION
    | TOPS
    | {"resnets", "attentions", "downsamplers", "upsamplers", "conv", "conv1", "conv2", "conv_shortcut"}
    | {"time_emb_proj", "linear_1", "linear_2"}
)
_LDM_TOPS = frozenset({"input_blocks", "middle_block", "output_blocks", "time_embed", "label_emb", "out"})
_LDM_SEGMENTS = frozenset(
    _ATTENTION | {"in_layers", "out_layers", "emb_layers", "skip_connection", "op", "conv"}
)

_OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_out": "out.2",
}
_RESNET = {
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
_FROM_OUTSIDE = {v: k for k, v in _OUTSIDE.items()}
_FROM_RESNET = {v: k for k, v in _RESNET.items()}
_MIDDLE = {"resnets.0": "0", "attentions.0": "1", "resnets.1": "2"}
_FROM_MIDDLE = {v: k for k, v in _MIDDLE.items()}
_BLOCK = re.compile(r"(down|up)_blocks\.(\d+)\.(resnets|attentions|downsamplers|upsamplers)\.(\d+)\.(.+)")
_LDM_BLOCK = re.compile(r"(input|output)_blocks\.(\d+)\.(\d+)\.(.+)")

SDXL_UP = (True, True, False)
"""Which up blocks of SDXL attend."""


def modules(
    down: Sequence[bool] = (True, True, True, False),
    layers: int = 2,
    depth: int | Sequence[int] = 1,
    widths: Sequence[int] = (320, 640, 1280, 1280),
    added: bool = False,
) -> tuple[str, ...]:
    """Every linear and conv module of a diffusers UNet2DConditionModel, named from its structure.

    `down`: whether each down block attends (the up blocks mirror them); `layers` per down block, one more per
    up block; `depth` transformer blocks each, or one number a down block (the middle has the last one's);
    `widths` of the blocks, which decide where shortcuts are; `added`: whether there is an `add_embedding`.
    The defaults are Stable Diffusion 1.x.
    """
    depths = [depth] * len(down) if isinstance(depth, int) else list(depth)
    names = ["conv_in", "time_embedding.linear_1", "time_embedding.linear_2"]
    names += ["add_embedding.linear_1", "add_embedding.linear_2"] * added

    def resnet(at: str, shortcut: bool) -> None:
        parts = ["conv1", "time_emb_proj", "conv2"] + (["conv_shortcut"] if shortcut else [])
        names.extend(f"{at}.{p}" for p in parts)

    def attention(at: str, deep: int) -> None:
        names.append(f"{at}.proj_in")
        for i in range(deep):
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
                attention(f"down_blocks.{i}.attentions.{j}", depths[i])
        if i < last:
            names.append(f"down_blocks.{i}.downsamplers.0.conv")
    resnet("mid_block.resnets.0", False)
    attention("mid_block.attentions.0", depths[-1])
    resnet("mid_block.resnets.1", False)
    for i, (attends, deep) in enumerate(zip(reversed(down), reversed(depths), strict=True)):
        for j in range(layers + 1):
            resnet(f"up_blocks.{i}.resnets.{j}", True)  # the skip connection always widens the input
            if attends:
                attention(f"up_blocks.{i}.attentions.{j}", deep)
        if i < last:
            names.append(f"up_blocks.{i}.upsamplers.0.conv")
    return tuple(f"unet.{n}" for n in (*names, "conv_out"))


def sdxl() -> tuple[str, ...]:
    """Every linear and conv module of the SDXL UNet."""
    return modules((False, True, True), 2, (0, 2, 10), (320, 640, 1280), added=True)


def to_ldm(path: str, layers: int = 2, up: Sequence[bool] = SDXL_UP) -> str | None:
    """The original name of a diffusers path (without `unet.`), or None when this structure has none.

    `layers`: per down block. `up`: which up blocks attend, which decides where their upsampler stands.
    """
    if path in _OUTSIDE:
        return _OUTSIDE[path]
    if path.startswith("mid_block."):
        _, what, at, inside = path.split(".", 3) if path.count(".") > 2 else ("", "", "", "")
        place, inner = _MIDDLE.get(f"{what}.{at}"), _RESNET.get(inside) if what == "resnets" else inside
        return f"middle_block.{place}.{inner}" if place and inner else None
    match = _BLOCK.fullmatch(path)
    if not match:
        return None
    side, block, kind, index, rest = match[1], int(match[2]), match[3], int(match[4]), match[5]
    row = "input_blocks" if side == "down" else "output_blocks"
    first = 1 + block * (layers + 1) if side == "down" else block * (layers + 1)
    if kind in ("downsamplers", "upsamplers"):
        if rest != "conv" or index or (kind == "downsamplers") != (side == "down"):
            return None
        if side == "down":
            return f"{row}.{first + layers}.0.op"
        return f"{row}.{first + layers}.{1 + (block < len(up) and up[block])}.conv"
    if index >= layers + (side == "up"):
        return None
    if kind == "attentions":
        return f"{row}.{first + index}.1.{rest}"
    return f"{row}.{first + index}.0.{_RESNET[rest]}" if rest in _RESNET else None


def from_ldm(path: str, layers: int = 2) -> str | None:
    """The diffusers path of an original one, or None when it is none of a UNet with that many layers a block."""
    if path in _FROM_OUTSIDE:
        return _FROM_OUTSIDE[path]
    if path.startswith("middle_block."):
        _, place, rest = path.split(".", 2) if path.count(".") > 1 else ("", "", "")
        inner = rest if place == "1" else _FROM_RESNET.get(rest)
        return f"mid_block.{_FROM_MIDDLE[place]}.{inner}" if place in _FROM_MIDDLE and inner else None
    match = _LDM_BLOCK.fullmatch(path)
    if not match:
        return None
    row, number, place, rest = match[1], int(match[2]), match[3], match[4]
    if row == "input":
        if number == 0:
            return None
        number, side = number - 1, "down"
    else:
        side = "up"
    block, index = divmod(number, layers + 1)
    at = f"{side}_blocks.{block}"
    if side == "down" and index == layers:
        return f"{at}.downsamplers.0.conv" if (place, rest) == ("0", "op") else None
    if side == "up" and index == layers and place in "12" and rest == "conv":
        return f"{at}.upsamplers.0.conv"
    if place == "0":
        return f"{at}.resnets.{index}.{_FROM_RESNET[rest]}" if rest in _FROM_RESNET else None
    attends = place == "1" and rest.split(".")[0] in ("proj_in", "proj_out", "transformer_blocks")
    return f"{at}.attentions.{index}.{rest}" if attends else None


def from_ldm_underscores(name: str) -> str | None:
    """The diffusers path of `input_blocks_4_1_proj_in` and its like, or None."""
    path = dotted(name, _LDM_TOPS, _LDM_SEGMENTS)
    return None if path is None else from_ldm(path)


def kernel(path: str, convolved: bool) -> tuple[int, ...]:
    """The kernel of a module by its name, for files that do not tell (LyCORIS flattens it); () for a linear one.

    `convolved`: whether the attention's projections are 1x1 convolutions, as in SD 1, not in 2 and XL.
    """
    leaf = path.rpartition(".")[2]
    if leaf in ("conv", "conv1", "conv2", "conv_in", "conv_out"):
        return (3, 3)
    if leaf == "conv_shortcut":
        return (1, 1)
    outer = leaf in ("proj_in", "proj_out") and ".attentions." in path
    return (1, 1) if convolved and outer else ()
