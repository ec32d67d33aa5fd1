"""A header's metadata in a few readable lines: kohya's `ss_*`, Stability's `modelspec.*`, lolgen's own."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

_LINES: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("title", ("modelspec.title", "ss_output_name")),
    ("author", ("modelspec.author",)),
    ("licence", ("modelspec.license",)),
    ("description", ("modelspec.description",)),
    ("trigger", ("modelspec.trigger_phrase", "ss_trigger_words")),
    ("usage", ("modelspec.usage_hint",)),
    ("architecture", ("modelspec.architecture",)),
    ("trained on", ("ss_sd_model_name", "ss_base_model_version")),
    ("resolution", ("modelspec.resolution", "ss_resolution")),
    ("network", ("ss_network_module",)),
    ("network rank", ("ss_network_dim",)),
    ("network alpha", ("ss_network_alpha",)),
    ("network arguments", ("ss_network_args",)),
    ("steps", ("ss_steps", "ss_max_train_steps")),
    ("epochs", ("ss_epoch", "ss_num_epochs")),
    ("pictures", ("ss_num_train_images",)),
    ("learning rate", ("ss_learning_rate",)),
    ("UNet learning rate", ("ss_unet_lr",)),
    ("text encoder learning rate", ("ss_text_encoder_lr",)),
    ("optimizer", ("ss_optimizer",)),
    ("noise offset", ("ss_noise_offset",)),
    ("clip skip", ("ss_clip_skip",)),
    ("seed", ("ss_seed",)),
    ("comment", ("ss_training_comment",)),
    ("generated for", ("lolgen.request",)),
    ("prompt", ("lolgen.prompt",)),
)
_LONGEST = 200


def summary(metadata: Mapping[str, str]) -> dict[str, str]:
    """What -> value, each one line; entries that say nothing ("None", "") left out."""
    found = {}
    for label, keys in _LINES:
        value = next((metadata[k] for k in keys if metadata.get(k) not in (None, "", "None", "null")), None)
        if value is not None:
            found[label] = one_line(value)
    started = _date(metadata.get("ss_training_started_at"))
    if started:
        found["trained at"] = started
    tags = _tags(metadata.get("ss_tag_frequency"))
    if tags:
        found["commonest tags"] = one_line(", ".join(f"{t} ({n})" for t, n in tags))
    return found


def others(metadata: Mapping[str, str]) -> dict[str, int]:
    """Entries that `summary` does not use -> their length in characters."""
    used = {k for _, keys in _LINES for k in keys} | {"ss_tag_frequency", "ss_training_started_at"}
    return {k: len(v) for k, v in metadata.items() if k not in used}


def one_line(text: str) -> str:
    """Without breaks or control characters, which a terminal would obey, and not too long."""
    plain = "".join(c if c.isprintable() else " " for c in text[: 4 * _LONGEST])
    plain = " ".join(plain.split())
    return plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST]}..."


def _date(text: str | None) -> str | None:
    try:
        return datetime.fromtimestamp(float(text or "nan"), UTC).strftime("%Y-%m-%d %H:%M UTC")
    except (ValueError, OverflowError, OSError):
        return None


def _tags(text: str | None, most: int = 8) -> list[tuple[str, int]]:
    """The commonest tags of kohya's `{folder: {tag: count}}`."""
    try:
        folders: Any = json.loads(text or "{}")
    except (ValueError, RecursionError):
        return []
    count: Counter[str] = Counter()
    for tags in folders.values() if isinstance(folders, dict) else ():
        if isinstance(tags, dict):
            for tag, n in tags.items():
                if isinstance(n, int) and not isinstance(n, bool):
                    count[tag.strip()[:80]] += n
    return count.most_common(most)
