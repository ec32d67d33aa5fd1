"""New adapters: from attributes, from nothing, from a picture."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lolgen import io, pictures
from lolgen.pipeline.drawing import draw_preview
from lolgen.pipeline.models import MODEL, load_generator, load_imager
from lolgen.pipeline.signature import seen, sign, words


def generate(
    request: Mapping[str, str],
    out: str | Path,
    *,
    seed: int = 0,
    rank: int = 4,
    format: str = "peft",
    subject: str = pictures.SUBJECTS[0],
    preview: str | Path | None = None,
    base: str | Path | None = None,
    model: str = MODEL,
) -> dict[str, Any]:
    """Write one generated adapter to `out` and, if asked, a preview picture; what was done, for people and JSON.

    `request`: attribute -> value, any part of them; the rest is sampled by `seed`. AttributeValueError names the
    valid attributes or values. `seconds` covers the way from request to file, once models are loaded.
    """
    request = pictures.check_attributes(request)
    generator = load_generator(model)
    start = time.perf_counter()
    loras, full = generator.generate([request], [seed], rank=rank, subject=subject)
    lora, prompt = loras[0], pictures.caption({}, subject)
    sign(lora, request=words(request), seed=seed, prompt=prompt)
    written = io.save(lora, out, format)
    report: dict[str, Any] = {
        "adapter": str(written),
        "format": format,
        "rank": rank,
        "seed": seed,
        "prompt": prompt,
        "requested": dict(request),
        "attributes": seen(full[0]),
        "modules": len(lora.spec),
        "seconds": round(time.perf_counter() - start, 4),
    }
    if preview is not None:
        report |= draw_preview(written, preview, subject=subject, base=base)
    return report


def sample(out: str | Path, **options: Any) -> dict[str, Any]:
    """A new identity, every attribute drawn by the seed: `generate` with nothing asked for."""
    return generate({}, out, **options)


def invert(
    picture: str | Path,
    out: str | Path,
    *,
    rank: int = 4,
    format: str = "peft",
    seed: int = 0,
    subject: str = pictures.SUBJECTS[0],
    preview: str | Path | None = None,
    base: str | Path | None = None,
    model: str = MODEL,
) -> dict[str, Any]:
    """A picture of somebody to an adapter that draws them, without training: see `lolgen.imager`.

    The middle square of the picture is read. FormatError when the file is no picture; a picture that is not of the
    kind that the base draws is read all the same, with a warning.
    """
    from lolgen.imager import read_picture

    imager, generator = load_imager(model), load_generator(model)
    start = time.perf_counter()
    rows, parts, portrait = imager.describe(read_picture(picture))
    values = {n: pictures.ATTRIBUTES[n][int(p.argmax())] for n, p in rows[0].items()}
    probability = {n: round(float(p.max()), 4) for n, p in rows[0].items()}
    g = torch.Generator().manual_seed(seed)
    lora = generator.person(values, parts[0].tolist(), g, rank=rank, subject=subject)
    prompt = pictures.caption({}, subject)
    sign(lora, request=f"invert {words(seen(values))}", seed=seed, prompt=prompt)
    written = io.save(lora, out, format)
    warnings = []
    if float(portrait[0]) < 0.9:
        warnings.append(
            "the picture does not look like the portraits that the base draws: the reading may mean little"
        )
    unsure = [n for n in seen(values) if probability[n] < 0.8]
    if unsure:
        warnings.append(f"read with doubt: {', '.join(unsure)}")
    report: dict[str, Any] = {
        "adapter": str(written),
        "format": format,
        "rank": rank,
        "seed": seed,
        "prompt": prompt,
        "attributes": {n: {"value": v, "probability": probability[n]} for n, v in seen(values).items()},
        "warnings": warnings,
        "seconds": round(time.perf_counter() - start, 4),
    }
    if preview is not None:
        report |= draw_preview(written, preview, subject=subject, base=base)
    return report
