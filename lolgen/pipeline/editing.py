"""Adapters from adapters: edits, and walks between two."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lolgen import io, metrics, pictures
from lolgen.errors import LolgenError
from lolgen.lora import Batch, LoRA
from lolgen.pipeline.drawing import draw_change, draw_rows
from lolgen.pipeline.models import MODEL, load_editor
from lolgen.pipeline.opening import carried, open_adapter
from lolgen.pipeline.signature import sign, words

if TYPE_CHECKING:
    from lolgen.editor import Editor, Reading


def edit(
    path: str | Path | LoRA,
    request: Mapping[str, str],
    out: str | Path,
    *,
    strength: float = 1.0,
    keep: str = "all",
    rank: int | None = None,
    format: str | None = None,
    seed: int = 0,
    preview: str | Path | None = None,
    base: str | Path | None = None,
    model: str = MODEL,
) -> dict[str, Any]:
    """Change what an adapter draws: `request` says which attributes become what, the person stays.

    See `lolgen.editor.Editor.edit` for `strength`, `keep` and `seed`. Rank and gauge are the adapter's own, unless
    `rank` is given; the format is the one it came in, unless `format` is. The report says, per attribute, what the
    heads read before and after, which attributes moved unasked, how far delta W moved, and warns of an adapter
    unlike the zoo. `seconds`: from reading the file to having written one, once models are loaded.
    FormatError, SpecError, AttributeValueError, LolgenError; nothing is written then.
    """
    from lolgen.editor import changes

    request = pictures.check_attributes(request)
    if not request:
        raise LolgenError(
            f"nothing is asked for: name an attribute (--set NAME=VALUE), of {', '.join(pictures.ATTRIBUTES)}"
        )
    editor = load_editor(model)
    start = time.perf_counter()
    lora, format = open_adapter(path, format, editor.generator.encoder.spec)
    one = Batch.stack([lora], torch.float64)
    edited, asked = editor.edit(one, [request], [seed], strength=strength, keep=keep, rank=rank)
    before, after = editor.read(one), editor.read(edited)
    made = edited.to(torch.promote_types(lora.dtype, torch.float32)).unstack()[0]
    made = LoRA(made.spec, made.factors, dict(lora.metadata), dict(lora.extras))
    prompt = _prompt(editor, before)
    sign(made, request=words(request), seed=seed, prompt=prompt, strength=f"{strength:g}", keep=keep)
    written = io.save(made, out, format, dtype=lora.dtype)
    attributes = changes(before, after)[0]
    moved = [
        n for n, c in attributes.items() if n not in asked[0] and c["before"]["value"] != c["after"]["value"]
    ]
    values = {n: c["after"]["value"] for n, c in attributes.items()}
    report: dict[str, Any] = {
        "adapter": str(written),
        "format": format,
        "rank": max(made.ranks.values()),
        "strength": strength,
        "keep": keep,
        "seed": seed,
        "prompt": prompt,
        "requested": dict(request),
        "also_set": {n: v for n, v in asked[0].items() if n not in request},
        "attributes": attributes,
        "hidden": [n for n in values if not pictures.visible(values, n)],
        "moved_unasked": [n for n in moved if pictures.visible(values, n)],
        "moved": round(float(metrics.relative_distance(one, edited)), 4),
        "warnings": _warnings(editor, one, before) + carried(lora),
        "seconds": round(time.perf_counter() - start, 4),
    }
    if preview is not None:
        report |= draw_change(path, written, preview, prompt=prompt, base=base)
    return report


def mix(
    a: str | Path | LoRA,
    b: str | Path | LoRA,
    out: str | Path,
    *,
    t: float = 0.5,
    format: str | None = None,
    preview: str | Path | None = None,
    base: str | Path | None = None,
    model: str = MODEL,
) -> dict[str, Any]:
    """A person on the way from adapter a (t = 0) to adapter b (t = 1), through the latents; see `Editor.mix`.

    Written in the format of a unless `format` is given, at the larger rank, called by the word of a. The preview is
    the whole walk, in five steps, under the same seeds.
    """
    from lolgen.editor import changes

    if not 0 <= t <= 1:
        raise LolgenError(f"t: found {t:g}, wanted 0 to 1")
    editor = load_editor(model)
    start = time.perf_counter()
    first, format = open_adapter(a, format, editor.generator.encoder.spec)
    second, _ = open_adapter(b, format, editor.generator.encoder.spec)
    x, y = Batch.stack([first], torch.float64), Batch.stack([second], torch.float64)
    mixed = editor.mix(x, y, torch.tensor([t]))
    before, after = editor.read(x), editor.read(mixed)
    made = mixed.to(torch.float32).unstack()[0]
    prompt = _prompt(editor, before)
    sign(made, request=f"mix {t:g}", prompt=prompt)
    written = io.save(made, out, format)
    report: dict[str, Any] = {
        "adapter": str(written),
        "format": format,
        "rank": max(made.ranks.values()),
        "t": t,
        "prompt": prompt,
        "attributes": {n: c["after"] for n, c in changes(before, after)[0].items()},
        "warnings": [
            f"{name}: {text}"
            for name, batch in (("the first", x), ("the second", y))
            for text in _warnings(editor, batch, editor.read(batch))
        ],
        "seconds": round(time.perf_counter() - start, 4),
    }
    if preview is not None:
        walk = editor.mix(x, y, torch.linspace(0, 1, 5)).to(torch.float32).unstack()
        report |= draw_rows(walk, preview, prompt=prompt, base=base)
    return report


def _prompt(editor: Editor, reading: Reading) -> str:
    """The prompt that calls the person of a LoRA, by the word that it answers to."""
    word = pictures.RARE_WORDS[int(reading.words[0])]
    return pictures.caption({}, next(s for s in pictures.SUBJECTS if word in s.split()))


def _warnings(editor: Editor, batch: Batch, reading: Reading) -> list[str]:
    strange = editor.familiarity.strange(editor.facts(batch, reading))[0]
    return [
        f"unlike the zoo that the models know: {text}; what is read and edited may mean little"
        for text in strange
    ]
