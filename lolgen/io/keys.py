"""The spellings of a tensor's key in PEFT folders and diffusers files, old and new."""

from __future__ import annotations

import re
from dataclasses import dataclass

MAGNITUDE = "lora_magnitude_vector"
BIAS = "lora_B.bias"

_LETTER = {"down": "A", "up": "B", "mid": "mid", "A": "A", "B": "B"}
# `path` + suffix; an adapter's name may stand before the last word where PEFT did not strip it.
_SUFFIXES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (what, re.compile(pattern))
    for what, pattern in (
        ("factor", r"(?P<path>.+)\.lora_(?P<letter>[AB])(?:\.[^.]+)?\.weight"),
        ("embedding", r"(?P<path>.+)\.lora_embedding_(?P<letter>[AB])(?:\.[^.]+)?"),
        ("factor", r"(?P<path>.+)\.(?:lora|lora_linear_layer|lora_layer)\.(?P<letter>down|up)\.weight"),
        ("factor", r"(?P<path>.+_lora)\.(?P<letter>down|up)\.weight"),
        ("factor", r"(?P<path>.+)\.lora_(?P<letter>down|up|mid)\.weight"),
        ("alpha", r"(?P<path>.+)\.alpha"),
        ("magnitude", r"(?P<path>.+)\.(?:lora_magnitude_vector(?:\.[^.]+)?(?:\.weight)?|dora_scale)"),
        ("bias", r"(?P<path>.+)\.(?:lora_B(?:\.[^.]+)?|lora_up)\.bias"),
    )
)
_FUSED_LEAF = re.compile(r"(?P<parent>.+)\.(?P<leaf>to_[qkv]|to_out|add_[qkv]_proj|to_add_out)_lora")
# XLabs' Flux: `double_blocks.0.processor.qkv_lora1.down.weight`, 1 for the image, 2 for the text.
_XLABS = re.compile(
    r"(?P<at>(?:.+\.)?(?P<row>double|single)_blocks\.\d+)\.(?P<what>qkv|proj)_lora(?P<side>[12]?)"
    r"\.(?P<letter>down|up)\.weight"
)
_XLABS_SINGLE = {"qkv": "linear1_qkv", "proj": "linear2"}
_CLIP_LEAF = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


@dataclass(frozen=True)
class Key:
    """What a key is of: the module's path and "A", "B", "mid", "alpha", "magnitude" or "bias"."""

    path: str
    part: str
    embedding: bool = False


def parse(key: str) -> Key | None:
    """The meaning of a key, without any prefix taken off; None for one that is no LoRA tensor's."""
    key = key.replace(".processor.", ".")
    match = _XLABS.fullmatch(key)
    if match and (match["row"] == "single") == (not match["side"]):
        image = "img" if match["side"] == "1" else "txt"
        inner = f"{image}_attn.{match['what']}" if match["side"] else _XLABS_SINGLE[match["what"]]
        return Key(f"{match['at']}.{inner}", _LETTER[match["letter"]])
    for what, pattern in _SUFFIXES:
        match = pattern.fullmatch(key)
        if match:
            part = _LETTER[match["letter"]] if what in ("factor", "embedding") else what
            return Key(_module_path(match["path"], what), part, what == "embedding")
    return None


def _module_path(path: str, what: str) -> str:
    """`attn1.to_q_lora` of the attention processors is `attn1.to_q`; in CLIP, `self_attn.q_proj`."""
    match = _FUSED_LEAF.fullmatch(path)
    parent, leaf = (match["parent"], match["leaf"]) if match else path.rpartition(".")[::2]
    if match and parent.endswith("self_attn"):
        return f"{parent}.{_CLIP_LEAF.get(leaf, leaf)}"
    if leaf == "to_out" and (match or what == "magnitude"):
        return f"{parent}.to_out.0"
    return f"{parent}.{leaf}" if match else path


def is_factor(key: str) -> bool:
    """Whether the key is one of a factor pair."""
    parsed = parse(key)
    return parsed is not None and parsed.part in ("A", "B")
