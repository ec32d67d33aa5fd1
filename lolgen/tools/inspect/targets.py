"""What diffusers, PEFT and ComfyUI would refuse, drop or mis-scale of a file, by the rules of their loaders.

Read from the sources of diffusers 0.42, peft 0.21 and ComfyUI (2026). The rules for UNets are complete; for
transformers they are those that hold for every pipeline. What a loader does depends on the model as well: a
module that the model does not have is dropped by all three with a line in a log at most.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from lolgen.io import common, names, peft
from lolgen.io import safetensors_file as stf
from lolgen.io.raw import METHODS, RawModule
from lolgen.tools.inspect.source import Source

REFUSES, DROPS, SCALES, NOTE = "refuses", "drops", "mis-scales", "note"
TARGETS = ("diffusers", "peft", "comfyui")
LANGUAGE = ("llama", "mistral", "qwen", "gemma", "gpt2", "tiny-lm")


@dataclass(frozen=True)
class Finding:
    """`effect`: "refuses" (the whole file), "drops", "mis-scales" or "note"; `modules`: paths as in the file."""

    target: str
    effect: str
    text: str
    modules: tuple[str, ...] = ()


def findings(source: Source) -> list[Finding]:
    """What each target would do that a user should know; none for a target that takes the file as it is."""
    alphas = alphas_of(source)
    return [*for_diffusers(source, alphas), *for_peft(source, alphas), *for_comfyui(source, alphas)]


def alphas_of(source: Source) -> dict[str, float]:
    """Path -> what the file's `.alpha` tensors say, where it is one finite number."""
    wanted = {
        m.parts["alpha"]: path for path, m in source.modules.items() if m.shapes.get("alpha") in ((), (1,))
    }
    tensors = stf.read_raw(source.file, wanted)
    return {wanted[k]: float(t) for k, t in tensors.items() if math.isfinite(float(t))}


def _is_language(source: Source) -> bool:
    return any(f in LANGUAGE for f in source.family.candidates)


def _keys(m: RawModule) -> Iterable[str]:
    return m.parts.values()


# diffusers: load_lora_weights of the pipelines.

_NAMES_PASSED_OVER = ("checkpoint", "scheduler", "optimizer")
_KOHYA_UNET = ("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")
_ATTENTION = re.compile(r"_(?:to_[qkv]|to_out_0)$|_self_attn_(?:[qkv]|out)_proj$")


def for_diffusers(source: Source, alphas: dict[str, float]) -> list[Finding]:
    """Findings for `pipeline.load_lora_weights`."""

    def found(effect: str, text: str, modules: Iterable[str] = ()) -> Finding:
        return Finding("diffusers", effect, text, tuple(modules))

    if _is_language(source):
        return [found(REFUSES, "an adapter of a language model: no diffusers pipeline has a place for it")]
    results = []
    if any(word in source.file.name for word in _NAMES_PASSED_OVER):
        results.append(
            found(NOTE, f"passes over {source.file.name} when given its folder; give the name as weight_name")
        )
    if source.format == "peft":
        return [*results, *_diffusers_peft(source)]
    scales = [p for p, m in source.modules.items() if any(k.endswith(".dora_scale") for k in _keys(m))]
    if scales:
        results.append(
            found(DROPS, f"the DoRA magnitudes (dora_scale) of {len(scales)} modules are left out: the rest is "
                  "applied as a plain LoRA", scales)
        )  # fmt: skip
    left = [k for k in source.rows if "dora_scale" not in k]
    flux = source.family.name in ("flux", "hunyuan-video", "sd3", "qwen-image")
    if left and all(k.startswith(_KOHYA_UNET) for k in left):
        return results if flux else [*results, *_diffusers_kohya(source, alphas)]
    wrong = [k for k in left if "lora" not in k]
    if wrong and not flux:
        results.append(found(REFUSES, f"every key must hold 'lora', and {stf.brief(wrong[0])} does not"))
        return results
    lost = [
        p for p, m in source.modules.items()
        if m.method == "lora" and not flux and names.component(next(iter(_keys(m)))) is None
    ]  # fmt: skip
    if lost:
        results.append(
            found(DROPS, f"{_how_many(lost, source)} without unet. or text_encoder. before the path: nothing of "
                  "them is applied, and only a log says so", lost)
        )  # fmt: skip
    return results


def _diffusers_peft(source: Source) -> list[Finding]:
    companion = source.file.parent / "pytorch_lora_weights.safetensors"
    if companion.is_file() and source.file.name != companion.name:
        text = f"takes {companion.name} beside it when given the folder; the PEFT file itself would apply nothing"
        return [Finding("diffusers", NOTE, text)]
    text = (
        "PEFT's keys start with base_model.model.: load_lora_weights applies none of them, and only a log says "
        "so; load it with PEFT, or convert it"
    )
    return [Finding("diffusers", DROPS, text, tuple(source.modules))]


def _diffusers_kohya(source: Source, alphas: dict[str, float]) -> list[Finding]:
    results = []
    known = (".lora_down.weight", ".lora_up.weight", ".alpha", ".dora_scale")
    wrong = [k for k in source.rows if not k.endswith(known)]
    if wrong:
        text = f"a key that its conversion does not know stops the load: {stf.brief(wrong[0])}"
        return [Finding("diffusers", REFUSES, text)]
    pairs = {p: m for p, m in source.modules.items() if m.method == "lora" and m.rank}
    if alphas and pairs:
        # One alpha for all is taken for all. Of several, the commonest is, and those of attention layers
        # are put under a name that no layer has.
        values = [alphas[p] for p in pairs if p in alphas]
        usual = Counter(values).most_common(1)[0][0]
        lost = [p for p in pairs if p in alphas and alphas[p] != usual and _ATTENTION.search(p)]
        lost += [p for p, m in pairs.items() if p not in alphas and m.rank != usual]
        if lost:
            text = (
                f"{len(lost)} of {len(pairs)} modules get the commonest alpha, {usual:g}, in place of their own: "
                "bake the scale into the factors"
            )
            results.append(Finding("diffusers", SCALES, text, tuple(lost)))
    return results


# PEFT: PeftModel.from_pretrained of a folder.


def for_peft(source: Source, alphas: dict[str, float]) -> list[Finding]:
    """Findings for `PeftModel.from_pretrained`."""

    def found(effect: str, text: str, modules: Iterable[str] = ()) -> Finding:
        return Finding("peft", effect, text, tuple(modules))

    if not source.config:
        return [found(REFUSES, f"there is no {peft.CONFIG} beside it, which PEFT needs")]
    if source.file.name != peft.WEIGHTS:
        return [found(REFUSES, f"PEFT looks for {peft.WEIGHTS}, and the file is called {source.file.name}")]
    results = []
    lost = [p for p, m in source.modules.items() if not next(iter(_keys(m))).startswith("base_model.")]
    if lost:
        results.append(
            found(DROPS, f"{_how_many(lost, source)} without base_model.model. before the path: nothing of them "
                  "is applied, at most with a warning of missing keys", lost)
        )  # fmt: skip
    if alphas:
        results.append(
            found(SCALES, f"the .alpha tensors of {len(alphas)} modules are not read: lora_alpha and alpha_pattern "
                  "of the config alone give the scale", alphas)
        )  # fmt: skip
    mids = [p for p, m in source.modules.items() if "mid" in m.parts]
    if mids:
        results.append(
            found(DROPS, f"the Tucker cores (lora_mid) of {len(mids)} modules are not known", mids)
        )
    return results


# ComfyUI: comfy.lora.load_lora, which asks the file for every name that a weight of the model may have.

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

    if _is_language(source):
        return [found(REFUSES, "an adapter of a language model: not a matter for ComfyUI")]
    if source.is_model:
        return [found(NOTE, "load it as a checkpoint, not as a LoRA")]
    results = []
    lost = [p for p, m in source.modules.items() if not _comfy_knows(m, source)]
    if lost:
        results.append(found(DROPS, f"{_how_many(lost, source)} {_why_lost(lost, source)}", lost))
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
    if source.lora is None:
        return []
    wrong: dict[str, float] = {}
    for path, m in source.modules.items():
        name = path if common.is_kohya_key(f"{path}.") else names.with_component(path)
        name = name if name in source.lora.spec else path.removeprefix(peft.PREFIX)
        if path in gone or not m.rank or name not in source.lora.spec:
            continue
        multiplier = (alphas[path] / m.rank) if path in alphas else 1.0
        meant = source.lora[name].scale
        if meant and abs(multiplier / meant - 1) > 1e-3:
            wrong[path] = multiplier / meant
    if not wrong:
        return []
    low, high = min(wrong.values()), max(wrong.values())
    factor = f"{low:.4g}" if math.isclose(low, high, rel_tol=1e-3) else f"{low:.4g} to {high:.4g}"
    text = (
        f"{len(wrong)} modules come out {factor} times as strong: without .alpha tensors the multiplier is 1, and "
        "adapter_config.json and the header are not read"
    )
    return [Finding("comfyui", SCALES, text, tuple(wrong))]


def _comfy_knows(m: RawModule, source: Source) -> bool:
    if (
        m.method in ("unknown", "full", "ia3", "adalora", "vera", "prompt", "tokens", "fourierft")
        or m.embedding
    ):
        return False
    key = next(iter(_keys(m)))
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
    key = next(iter(_keys(m)))
    only = ", only a log says so"
    if key.startswith(peft.PREFIX):
        return f"have PEFT's keys, which it does not look for{only}; save it as kohya"
    if m.method not in ("lora", "unknown", "full"):
        return f"are {METHODS.get(m.method, m.method)}, which it does not know{only}"
    if _UNET_ATTENTION.search(key) and names.component(key) == "unet":
        return f"are attention layers in diffusers' newer spelling, which it does not look for{only}; save it as kohya"
    return f"have keys that it does not look for ({stf.brief(key, 60)}){only}"


def _how_many(some: list[str], source: Source) -> str:
    total = len(source.modules)
    return f"all {total} modules" if len(some) == total else f"{len(some)} of {total} modules"
