"""What PEFT's config, in a folder or a diffusers header, says of a module's scale, or against its factors."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

from lolgen.errors import FormatError
from lolgen.io.safetensors_file import Path_, brief

_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_NOT_BA = ("target_parameters", "use_qalora", "use_bdlora", "kasa_config", "arrow_config")


def check_config(file: Path_, config: Mapping[str, Any]) -> None:
    """FormatError where the factors alone are not the adapter's delta W, or the adapter is no LoRA."""
    kind = config.get("peft_type", "LORA")
    if kind != "LORA":
        raise FormatError(
            file,
            key="peft_type",
            found=brief(kind),
            wanted="LORA",
            remedy="only LoRA adapters have factor pairs",
        )
    init = config.get("init_lora_weights")
    if isinstance(init, str) and init.lower().startswith(_MOVES_BASE):
        raise FormatError(
            file,
            key="init_lora_weights",
            found=f"{brief(init)}, which also changes the base model's weights",
            wanted="an adapter whose delta W is in its own file",
            remedy="convert it with PEFT's save_pretrained(path_initial_model_for_weight_conversion=...)",
        )
    for key in _NOT_BA:
        if config.get(key):
            raise FormatError(
                file,
                key=key,
                found=f"{brief(config[key])}, whose delta W is not scale * B @ A",
                wanted="an ordinary LoRA",
                remedy="merge it into its base with PEFT, or train without this option",
            )


def scale_of(file: Path_, config: Mapping[str, Any], path: str, rank: int) -> float:
    """The scale PEFT gives the module at `path`: alpha / rank, or alpha / sqrt(rank) with `use_rslora`.

    The alpha is the first hit in `alpha_pattern`, else `lora_alpha`; the rank that the config gives, found in
    the same way, must be the tensor's.
    """
    alpha = _resolve(file, config, "alpha_pattern", path, config.get("lora_alpha", 8))
    wanted = _resolve(file, config, "rank_pattern", path, config.get("r", rank))
    if wanted != rank:
        raise FormatError(
            file,
            key=path,
            found=f"rank {rank}",
            wanted=f"rank {wanted:g}, as r and rank_pattern of its config say",
            remedy="the config is of other weights: correct r and rank_pattern, or save the adapter again",
        )
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _resolve(file: Path_, config: Mapping[str, Any], name: str, path: str, default: Any) -> float:
    patterns = config.get(name) or {}
    field_name, value = name, default
    if not isinstance(patterns, dict):
        raise _config_error(file, name, patterns, "an object of numbers")
    for pattern, number in patterns.items():
        if hits(file, pattern, path):
            field_name, value = f"{name}[{brief(pattern)}]", number
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _config_error(file, field_name, value, "a finite number")
    return float(value)


def _config_error(file: Path_, key: str, found: object, wanted: str) -> FormatError:
    return FormatError(
        file, key=key, found=brief(found), wanted=wanted, remedy="correct the config or save it again"
    )


def hits(file: Path_, pattern: str, path: str) -> bool:
    """PEFT's `re.match(rf"(.*\\.)?({pattern})$", path)`; a plain path is matched without the regex engine."""
    anchored = pattern.startswith("^")
    plain = pattern[1:] if anchored else pattern
    if re.fullmatch(r"[\w.\-]+", plain):
        tail = path[-len(plain) :]
        before = path[: -len(plain)]
        if len(tail) != len(plain) or (before and (anchored or not before.endswith("."))):
            return False
        # A dot of a pattern is any character, as PEFT has it.
        return tail == plain or all(p in (".", c) for p, c in zip(plain, tail, strict=True))
    if len(path) > 300:
        raise _config_error(
            file, "rank_pattern or alpha_pattern", pattern, "shorter module paths, or plain keys"
        )
    return _compiled(os.fspath(file), pattern).match(path) is not None


@lru_cache(maxsize=4096)
def _compiled(file: str, pattern: str) -> re.Pattern[str]:
    # A repeated group, or many wildcards, can take the regex engine years, and the file is a stranger's.
    if len(pattern) > 500 or re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4:
        raise _config_error(file, "rank_pattern or alpha_pattern", pattern, "a simple pattern")
    try:
        return re.compile(rf"(.*\.)?({pattern})$")
    except re.error as error:
        raise _config_error(file, "rank_pattern or alpha_pattern", pattern, f"a regex ({error})") from None


def ranks_config(ranks: Mapping[str, int]) -> dict[str, Any]:
    """`r`, `lora_alpha`, `rank_pattern`, `alpha_pattern` that give each path its rank and a scale of 1."""
    r = Counter(ranks.values()).most_common(1)[0][0]
    # Longest first: a path that ends like another's is hit by its own pattern.
    rare = {p: k for p, k in sorted(ranks.items(), key=lambda i: (-len(i[0]), i[0])) if k != r}

    def given(path: str) -> int:
        return next((k for p, k in rare.items() if hits("", p, path)), r)

    if any(given(p) != k for p, k in ranks.items()):
        rare = {f"^{p}": k for p, k in rare.items()}
    return {"r": r, "lora_alpha": r, "rank_pattern": rare, "alpha_pattern": dict(rare)}
