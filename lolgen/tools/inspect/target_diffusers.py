"""The rules of diffusers: `load_lora_weights` of its pipelines, read from the sources of 0.42."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

from lolgen.io import common, names
from lolgen.io import safetensors_file as stf
from lolgen.tools.inspect.finding import DROPS, NOTE, REFUSES, SCALES, Finding, how_many, is_language, keys_of
from lolgen.tools.inspect.source import Source

_NAMES_PASSED_OVER = ("checkpoint", "scheduler", "optimizer")
_KOHYA_UNET = ("lora_te_", "lora_unet_", "lora_te1_", "lora_te2_")
_ATTENTION = re.compile(r"_(?:to_[qkv]|to_out_0)$|_self_attn_(?:[qkv]|out)_proj$")


def for_diffusers(source: Source, alphas: dict[str, float]) -> list[Finding]:
    """Findings for `pipeline.load_lora_weights`."""

    def found(effect: str, text: str, modules: Iterable[str] = ()) -> Finding:
        return Finding("diffusers", effect, text, tuple(modules))

    if is_language(source):
        return [found(REFUSES, "an adapter of a language model: no diffusers pipeline has a place for it")]
    results = []
    if any(word in source.file.name for word in _NAMES_PASSED_OVER):
        results.append(
            found(NOTE, f"passes over {source.file.name} when given its folder; give the name as weight_name")
        )
    if source.is_model:
        return [*results, found(NOTE, "load it with from_pretrained or from_single_file, not as a LoRA")]
    # The transformers' pipelines convert kohya's and PEFT's keys, each in its own way.
    flux = source.family.name in ("flux", "hunyuan-video", "sd3", "qwen-image")
    if source.format == "peft":
        return results if flux else [*results, *_diffusers_peft(source)]
    scales = [p for p, m in source.modules.items() if any(k.endswith(".dora_scale") for k in keys_of(m))]
    if scales:
        results.append(
            found(DROPS, f"the DoRA magnitudes (dora_scale) of {len(scales)} modules are left out: the rest is "
                  "applied as a plain LoRA", scales)
        )  # fmt: skip
    results += _diffusers_encoders(source)
    left = [k for k in source.rows if "dora_scale" not in k]
    if left and all(k.startswith(_KOHYA_UNET) for k in left):
        return results if flux else [*results, *_diffusers_kohya(source, alphas)]
    wrong = [k for k in left if "lora" not in k]
    if wrong and not flux:
        results.append(found(REFUSES, f"every key must hold 'lora', and {stf.brief(wrong[0])} does not"))
        return results
    lost = [
        p for p, m in source.modules.items()
        if m.method == "lora" and not flux and names.component(next(iter(keys_of(m)))) is None
    ]  # fmt: skip
    if lost:
        results.append(
            found(DROPS, f"{how_many(lost, source)} without unet. or text_encoder. before the path: nothing of "
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
    components: dict[str, list[str]] = {}
    for path, m in source.modules.items():
        if m.method == "lora" and m.rank:
            components.setdefault(_component(path), []).append(path)
    for paths in components.values():
        values = [alphas[p] for p in paths if p in alphas]
        if not values:
            continue
        # One alpha for all is taken for all. Of several, the commonest is, and those of attention layers are put
        # under a name that no layer has.
        usual = Counter(values).most_common(1)[0][0]
        lost = [p for p in paths if p in alphas and alphas[p] != usual and _ATTENTION.search(p)]
        lost += [p for p in paths if p not in alphas and source.modules[p].rank != usual]
        if lost:
            text = (
                f"{len(lost)} of {len(paths)} modules get the commonest alpha, {usual:g}, in place of their own: "
                "bake the scale into the factors"
            )
            results.append(Finding("diffusers", SCALES, text, tuple(lost)))
    return results


def _component(path: str) -> str:
    match = _ENCODER.match(path)
    return "unet" if match is None else ("second" if "2" in match[1] else "first")


_ENCODER = re.compile(r"(lora_te1?_|lora_te2_|text_encoder\.|text_encoder_2\.)")


def _diffusers_encoders(source: Source) -> list[Finding]:
    """What becomes of CLIP's layers: the spelling of all is told from that of some."""
    encoders: dict[str, dict[str, str]] = {}
    for path, m in source.modules.items():
        match = _ENCODER.match(path)
        key = m.parts.get("A") or m.parts.get("B")
        if match and key and m.method == "lora" and re.search(r"encoder.layers", path):
            encoders.setdefault(_component(path), {})[path] = _spelling(path, key)
    results = []
    for spelled in encoders.values():
        found = set(spelled.values())
        if "out" in found:
            continue
        lost = [p for p, s in spelled.items() if s == "old"]
        if (found == {"old"}) or found == {"peft, MLP"}:
            text = "the text encoder's layers are of a spelling that it cannot tell by these alone"
            results.append(Finding("diffusers", REFUSES, text, tuple(spelled)))
        elif lost and "peft" not in found:
            text = (
                f"{len(lost)} attention layers of the text encoder are passed over, because no out_proj among them "
                "tells how they are spelled; save it as a diffusers file"
            )
            results.append(Finding("diffusers", DROPS, text, tuple(lost)))
    return results


def _spelling(path: str, key: str) -> str:
    """ "out" (an old-style output layer), "old", "linear", "peft" or "peft, MLP"."""
    attention = "self_attn" in path
    if "_lora." in key or common.is_kohya_key(key):
        if not attention:
            return "linear"
        return "out" if "out_" in key.partition("self_attn")[2] else "old"
    if "lora_linear_layer" in key:
        return "linear"
    return "peft" if attention else "peft, MLP"
