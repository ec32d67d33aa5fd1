"""Adapters for the language model: new ones from sources or from a line of text, and edits of those that exist."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch

from lolgen import io, metrics
from lolgen.errors import LolgenError
from lolgen.lora import Batch, LoRA
from lolgen.paths import checkpoints_dir
from lolgen.pipeline.opening import carried, open_adapter
from lolgen.pipeline.signature import sign
from lolgen.speaker import Speaker, shares_of
from lolgen.speech_editor import NAMES, SpeechEditor

ZOO = "speeches"
"""The zoo whose generator serves by default: folder in checkpoints/."""
BASE = "tiny-lm"
"""What an adapter is for where its generator does not say."""
BARELY = 0.15
"""Adapters that never saw a source read -.06 +- .11 of it (`train/LOG.md`): below this its presence cannot be told."""


def folder_of(model: str | Path) -> Path:
    """The folder of a shipped model by its name, a str; a Path is the folder itself."""
    return model if isinstance(model, Path) else checkpoints_dir() / model


@cache
def load_speaker(model: str | Path = ZOO) -> Speaker:
    """The generator of a language zoo, shipped or in a folder, loaded once a process."""
    return Speaker.from_pretrained(folder_of(model))


@cache
def load_speech_editor(model: str | Path = ZOO) -> SpeechEditor:
    """The editor of a language zoo, shipped or in a folder, loaded once a process."""
    return SpeechEditor.from_pretrained(folder_of(model))


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
    model: str | Path = ZOO,
) -> dict[str, Any]:
    """Write an adapter for `checkpoints/tiny-lm` that speaks like the sources asked for; what was done.

    `request`: source -> weight; `model`: name of a shipped generator, or the folder of another base's. The same request
    and rank give the same file. LolgenError names the valid sources.
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
        "adapter": str(written), "format": format, "rank": rank, "sources": asked,
        "base": speaker.settings.get("base", BASE),
        "modules": len(lora.spec), "seconds": round(time.perf_counter() - start, 4),
    }  # fmt: skip


def read_sources(paths: Sequence[str | Path | LoRA], *, model: str | Path = ZOO) -> list[dict[str, Any]]:
    """How much of every source adapters of `checkpoints/tiny-lm` have, a row per path, in order: `sources`, name ->
    reading, most first, in units of the generator's direction (what it makes of one source at rank 4 reads about .8).

    Adapters that never saw a source read -.06 +- .11 of it. FormatError for a bad file; SpecError for another base.
    """
    editor = load_speech_editor(model)
    loras = [open_adapter(p, "peft", editor.speaker.encoder.spec)[0] for p in paths]
    found = editor.read(Batch.stack(loras, torch.float64)).tolist()
    return [
        {
            "path": str(p) if isinstance(p, str | Path) else "",
            "sources": {s: round(v, 3) for v, s in sorted(zip(row, NAMES, strict=True), reverse=True)},
        }
        for p, row in zip(paths, found, strict=True)
    ]


def edit_sources(
    path: str | Path | LoRA,
    out: str | Path,
    *,
    add: Sequence[str] = (),
    remove: Sequence[str] = (),
    strength: float = 1.0,
    rank: int | None = None,
    format: str | None = None,
    model: str | Path = ZOO,
) -> dict[str, Any]:
    """Add sources to what an adapter of `checkpoints/tiny-lm` speaks like, remove others; what was done.

    Rank and gauge are the adapter's own unless `rank` is given, the format the one it came in unless `format` is.
    `sources` of the report: how much of every source is read before and after, see `read_sources`; `kept`: the share of
    delta W that made room for what was added. FormatError, SpecError, LolgenError; nothing is written then.
    """
    if not add and not remove:
        raise LolgenError(f"nothing is asked for: name a source to add or to remove, of {', '.join(NAMES)}")
    add, remove = list(dict.fromkeys(add)), list(dict.fromkeys(remove))
    editor = load_speech_editor(model)
    start = time.perf_counter()
    lora, format = open_adapter(path, format, editor.speaker.encoder.spec)
    one = Batch.stack([lora], torch.float64)
    edited = editor.edit(one, [add], [remove], strength=strength, rank=rank)
    before, after = editor.read(one)[0], editor.read(edited)[0]
    made = edited.to(torch.promote_types(lora.dtype, torch.float32)).unstack()[0]
    made = LoRA(made.spec, made.factors, dict(lora.metadata), dict(lora.extras))
    asked = [*(f"+{s}" for s in add), *(f"-{s}" for s in remove)]
    sign(made, request=" ".join(asked), strength=f"{strength:g}")
    written = io.save(made, out, format, dtype=lora.dtype)
    has = dict(zip(NAMES, before.tolist(), strict=True))
    return {
        "adapter": str(written), "format": format, "rank": max(made.ranks.values()), "strength": strength,
        "added": add, "removed": remove,
        "base": editor.speaker.settings.get("base", BASE),
        "sources": {
            s: {"before": round(has[s], 3), "after": round(a, 3)} for s, a in zip(NAMES, after.tolist(), strict=True)
        },
        "kept": round(float(editor.kept(torch.tensor(len(add)), strength)), 4),
        "moved": round(float(metrics.relative_distance(one, edited)), 4),
        "warnings": [
            f"{s} is barely read in it ({has[s]:.2f}): little to remove, or too little to be told"
            for s in remove if has[s] < BARELY
        ] + carried(lora),
        "seconds": round(time.perf_counter() - start, 4),
    }  # fmt: skip
