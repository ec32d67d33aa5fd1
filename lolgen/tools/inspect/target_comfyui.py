"""The rules of ComfyUI: `comfy.lora.load_lora`, read from its sources of 2026, which asks the file for every name
that a weight of the model may have."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable

from lolgen.io import common, names, peft
from lolgen.io import safetensors_file as stf
from lolgen.io.raw import METHODS, RawModule
from lolgen.tools.inspect.finding import DROPS, NOTE, REFUSES, SCALES, Finding, how_many, is_language, keys_of
from lolgen.tools.inspect.source import Source

_UNET_ATTENTION = re.compile(r"\.to_(?:q|k|v|out)(?:\.0)?(?:_lora)?\.")
_CLIP = re.compile(
    r"text_encoder(?:_2)?\.text_model\.encoder\.layers\.\d+\.(?:self_attn\.(?:[qkv]|out)_proj|mlp\.fc[12])\."
)
_PREFIXED = ("lora_unet_", "lora_te", "lora_prior_", "lora_transformer_", "lycoris_", "diffusion_model.",
             "text_encoders.")  # fmt: skip
_UNKNOWN_PARTS = ("magnitude", "bias")


def for_comfyui(source: Source, alphas: dict[str, float]) -> list[Finding]:
    """Findings for ComfyUI's LoraLoader."""

    def found(effect: str, text: str, modules: Iterable[str] = ()) -> Finding:
        return Finding("comfyui", effect, text, tuple(modules))

    if is_language(source):
        return [found(REFUSES, "an adapter of a language model: not a matter for ComfyUI")]
    if source.is_model:
        return [found(NOTE, "load it as a checkpoint, not as a LoRA")]
    results = []
    lost = [p for p, m in source.modules.items() if not _comfy_knows(m, source)]
    if lost:
        results.append(found(DROPS, f"{how_many(lost, source)} {_why_lost(lost, source)}", lost))
    gone = set(lost)
    unread = [
        p for p, m in source.modules.items()
        if p not in gone and any(
            part in m.parts and not m.parts[part].endswith(".dora_scale") for part in _UNKNOWN_PARTS
        )
    ]  # fmt: skip
    if unread:
        results.append(
            found(DROPS, f"{len(unread)} modules lose their magnitude (lora_magnitude_vector) or bias: only "
                  "dora_scale is known", unread)
        )  # fmt: skip
    results += _comfy_scales(source, alphas, gone)
    return results


def _comfy_scales(source: Source, alphas: dict[str, float], gone: set[str]) -> list[Finding]:
    """Where the multiplier, alpha / rank or 1 without an alpha, is not the scale that the file means."""
    wrong: dict[str, float] = {}
    for path, m in source.modules.items():
        meant = _meant(source, path, alphas)
        if path in gone or not m.rank or not meant:
            continue
        multiplier = (alphas[path] / m.rank) if path in alphas else 1.0
        if abs(multiplier / meant - 1) > 1e-3:
            wrong[path] = multiplier / meant
    if not wrong:
        return []
    low, high = min(wrong.values()), max(wrong.values())
    factor = f"{low:.4g}" if math.isclose(low, high, rel_tol=1e-3) else f"{low:.4g} to {high:.4g}"
    text = (
        f"{len(wrong)} modules come out {factor} times as strong: the multiplier is alpha / rank of .alpha tensors, "
        "1 without one; adapter_config.json and the header are not read"
    )
    return [Finding("comfyui", SCALES, text, tuple(wrong))]


def _meant(source: Source, path: str, alphas: dict[str, float]) -> float | None:
    """The scale that the file means for a module; None where that is not known."""
    if common.is_kohya_key(f"{path}.x"):
        rank = source.modules[path].rank
        return alphas[path] / rank if rank and alphas.get(path) else 1.0  # 0 means the rank
    name = names.with_component(path)
    return source.lora[name].scale if source.lora is not None and name in source.lora.spec else None


def _comfy_knows(m: RawModule, source: Source) -> bool:
    if (
        m.method in ("unknown", "full", "ia3", "adalora", "vera", "prompt", "tokens", "fourierft")
        or m.embedding
    ):
        return False
    key = next(iter(keys_of(m)))
    if key.startswith(_PREFIXED):
        return True
    if key.startswith(peft.PREFIX):
        return source.family.name == "sd3"
    if key.startswith("text_encoder"):
        return bool(_CLIP.match(key))
    if key.startswith("transformer."):
        return True
    part = names.component(key)
    if part == "unet" or (part is None and names.is_unet_path(key)):
        return not _UNET_ATTENTION.search(key) or ".processor." in key
    return False


def _why_lost(lost: list[str], source: Source) -> str:
    m = source.modules[lost[0]]
    key = next(iter(keys_of(m)))
    only = ", only a log says so"
    if key.startswith(peft.PREFIX):
        return f"have PEFT's keys, which it does not look for{only}; save it as kohya"
    if m.method not in ("lora", "unknown", "full"):
        return f"are {METHODS.get(m.method, m.method)}, which it does not know{only}"
    if _UNET_ATTENTION.search(key) and names.component(key) == "unet":
        return f"are attention layers in diffusers' newer spelling, which it does not look for{only}; save it as kohya"
    return f"have keys that it does not look for ({stf.brief(key, 60)}){only}"
