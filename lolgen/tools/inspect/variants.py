"""What kind of LoRA a file is beyond the plain one, and what its numbers mean then."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from lolgen.io import diffusers
from lolgen.io.raw import METHODS
from lolgen.tools.inspect.source import Source

_INIT = {
    "pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA", "eva": "EVA",
    "gaussian": "Gaussian initialisation", "orthogonal": "orthogonal initialisation",
}  # fmt: skip
_MOVES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
_FIELDS = {
    "use_rslora": "rsLoRA: the scale is alpha / sqrt(rank)",
    "use_dora": "DoRA: a magnitude per output beside the factors",
    "lora_bias": "LoRA with biases",
    "modules_to_save": "full weights of some modules are saved with it (modules_to_save)",
    "layer_replication": "layers of the base are repeated (layer_replication)",
    "target_parameters": "adapts bare parameters (target_parameters): delta W is not B @ A per module",
    "trainable_token_indices": "some tokens' embeddings are trained",
    "use_qalora": "QA-LoRA: delta W is not B @ A",
    "use_bdlora": "block-diagonal LoRA: delta W is not B @ A",
    "alora_invocation_tokens": "aLoRA: at work only behind its invocation tokens",
    "fan_in_fan_out": "the base keeps its weights as (in, out) (fan_in_fan_out)",
}


def variants(source: Source) -> list[str]:
    """Sentences, most telling first; empty for a plain LoRA."""
    found = []
    if source.method not in ("lora", "full", "unknown"):
        what = (
            "looked at as the LoRA, of a higher rank, that it is exactly"
            if source.lora is not None
            else "not a LoRA, its delta W is no product of two factors"
        )
        found.append(f"{METHODS[source.method]}: {what}")
    config = _config(source)
    kind = config.get("peft_type")
    if isinstance(kind, str) and kind not in ("LORA", source.method.upper()):
        found.append(f"peft_type {kind[:40]}: not a LoRA")
    init = str(config.get("init_lora_weights") or "").lower()
    for start, name in _INIT.items():
        if init.startswith(start):
            moves = ": it also changed the base's weights, so its file alone does not give delta W"
            found.append(name + (moves if start in _MOVES_BASE else ""))
    found += [text for field, text in _FIELDS.items() if config.get(field)]
    parts = {part for m in source.modules.values() for part in m.parts}
    if "magnitude" in parts and not config.get("use_dora"):
        found.append(_FIELDS["use_dora"])
    if "mid" in parts:
        found.append("LoCon with Tucker cores (lora_mid)")
    elif any(len(m.shapes.get("A", ())) > 2 and max(m.shapes["A"][2:]) > 1 for m in source.modules.values()):
        found.append("LoCon: convolutions are adapted too")
    if any(m.embedding for m in source.modules.values()):
        found.append("embeddings are adapted too")
    if source.method == "lora":
        mixed = sorted({m.method for m in source.modules.values()} - {"lora", "full", "norm", "unknown"})
        found += [f"some modules are {METHODS[m]}" for m in mixed]
    return list(dict.fromkeys(found))


def _config(source: Source) -> Mapping[str, Any]:
    """The PEFT config, or the fields of the diffusers header without their component."""
    if source.config:
        return source.config
    try:
        header = json.loads(source.metadata.get(diffusers.HEADER) or "{}")
    except (ValueError, RecursionError):  # what is wrong with it is the reader's to say
        return {}
    return {k.rpartition(".")[2]: v for k, v in header.items()} if isinstance(header, dict) else {}
