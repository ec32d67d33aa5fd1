"""What an adapter file's metadata claims of its base model: never proof, only what its writer put there."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

Claim = tuple[str, frozenset[str]]
"""A sentence that cites an entry, and the families (of `lolgen.io.bases.LABELS`) that it names."""

_NAMES: tuple[tuple[str, re.Pattern[str]], ...] = tuple(
    (family, re.compile(pattern))
    for family, pattern in (
        ("tiny-sd", r"tiny-sd"),
        ("tiny-lm", r"tiny-lm"),
        ("sdxl", r"sdxl|sd_xl|stable-diffusion-xl|pony|illustrious"),
        ("sd3", r"sd3|sd_3|stable-diffusion-3"),
        ("sd2", r"sd_v2|sd2|stable-diffusion-(?:v)?2"),
        ("sd1", r"sd_v1|sd1|sd_1|stable-diffusion-(?:v)?1"),
        ("qwen-image", r"qwen-?image"),
        ("hunyuan-video", r"hunyuan-?video"),
        ("flux", r"flux"),
        ("mistral", r"mistral|mixtral|ministral"),
        ("qwen", r"qwen(?!-?image)"),
        ("gemma", r"gemma"),
        ("gpt2", r"gpt-?2"),
        ("llama", r"llama|vicuna|alpaca|smollm"),
    )
)
_FIELDS = ("base_model_name_or_path", "ss_base_model_version", "modelspec.architecture", "ss_sd_model_name")


def of(metadata: Mapping[str, str]) -> list[Claim]:
    """A claim for each entry that speaks of the base: header strings, and fields of `adapter_config.json`."""
    found = [(name, metadata[name]) for name in _FIELDS if metadata.get(name)]
    for key in ("adapter_config", "lora_adapter_metadata"):
        try:
            config = json.loads(metadata.get(key) or "{}")
        except (ValueError, RecursionError):
            continue
        if isinstance(config, dict):
            found += [(k, v) for k, v in config.items() if k.endswith("base_model_name_or_path") and v]
    claims = []
    for name, value in found:
        text = str(value)
        families = frozenset(f for f, pattern in _NAMES if pattern.search(text.lower()))
        claims.append((f"the file claims {name} = {text[:120]!r}", families))
    return claims
