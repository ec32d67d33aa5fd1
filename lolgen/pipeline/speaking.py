"""New adapters for the language model: from sources, or from a line of text."""

from __future__ import annotations

import time
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from lolgen import io
from lolgen.paths import checkpoints_dir
from lolgen.pipeline.signature import sign
from lolgen.speaker import Speaker, shares_of

ZOO = "speeches"
"""The zoo whose generator serves: folder in checkpoints/."""


@cache
def load_speaker(model: str = ZOO) -> Speaker:
    """The shipped generator of a language zoo, loaded once a process."""
    return Speaker.from_pretrained(checkpoints_dir() / model)


def sources_in(text: str, model: str = ZOO) -> dict[str, float]:
    """Source -> share that a line of text asks for; LolgenError when it fits none, or without the sentence encoder."""
    from lolgen.language.sentences import TextMap

    return TextMap.load(checkpoints_dir() / model / "text.safetensors").shares(text)


def speak(
    request: Mapping[str, float],
    out: str | Path,
    *,
    rank: int = 4,
    format: str = "peft",
    model: str = ZOO,
) -> dict[str, Any]:
    """Write an adapter for `checkpoints/tiny-lm` that speaks like the sources asked for; what was done.

    `request`: source -> weight. The same request and rank give the same file. LolgenError names the valid sources.
    """
    shares_of(request)
    speaker = load_speaker(model)
    start = time.perf_counter()
    lora = speaker.generate([request], rank)[0]
    total = sum(request.values())
    asked = {s: round(w / total, 4) for s, w in request.items() if w > 0}
    sign(lora, request=" ".join(f"source={s}:{w:g}" for s, w in asked.items()))
    written = io.save(lora, out, format)
    return {
        "adapter": str(written), "format": format, "rank": rank, "sources": asked, "base": "tiny-lm",
        "modules": len(lora.spec), "seconds": round(time.perf_counter() - start, 4),
    }  # fmt: skip
