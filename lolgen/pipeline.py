"""What users do with LoRAs, in one place: generate, predict, compare. The CLI and the demos call this module.

from lolgen import pipeline
made = pipeline.generate({"hair_color": "red", "glasses": "yes"}, "out/red", seed=0)
pipeline.predict(["out/red"])[0]["attributes"]["glasses"]      # {"value": "yes", "probability": 0.99, ...}
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lolgen import io, pictures
from lolgen.lora import LoRA
from lolgen.paths import checkpoints_dir
from lolgen.tools.compare import compare as compare

if TYPE_CHECKING:
    from lolgen.generator import Generator
    from lolgen.predictor import Predictor

MODEL = "faces"
"""The zoo whose models serve by default: folder in checkpoints/."""
PREVIEW_PREFIXES = pictures.PREFIXES


@cache
def load_generator(model: str = MODEL) -> Generator:
    """The shipped generator of a zoo, loaded once a process."""
    from lolgen.generator import Generator

    return Generator.from_pretrained(checkpoints_dir() / model)


@cache
def load_predictor(model: str = MODEL) -> Predictor:
    """The shipped attribute predictor of a zoo, loaded once a process."""
    from lolgen.predictor import Predictor

    return Predictor.from_pretrained(checkpoints_dir() / model / "predictor")


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
    lora = loras[0]
    prompt = pictures.caption({}, subject)
    lora.metadata.update(
        {"lolgen.request": _words(request), "lolgen.seed": str(seed), "lolgen.prompt": prompt}
    )
    written = io.save(lora, out, format)
    seen = {n: v for n, v in full[0].items() if pictures.visible(full[0], n)}
    report: dict[str, Any] = {
        "adapter": str(written),
        "format": format,
        "rank": rank,
        "seed": seed,
        "prompt": prompt,
        "requested": dict(request),
        "attributes": seen,
        "modules": len(lora.spec),
        "seconds": round(time.perf_counter() - start, 4),
    }
    if preview is not None:
        report |= draw_preview(written, preview, subject=subject, base=base)
    return report


def draw_preview(
    adapter: str | Path,
    out: str | Path,
    *,
    subject: str = pictures.SUBJECTS[0],
    base: str | Path | None = None,
) -> dict[str, Any]:
    """A small grid over prompts (rows) and seeds (columns), the last row without the trigger, drawn by stock
    diffusers; the picture's path and the number of modules that the load hit."""
    from lolgen import preview as drawing

    pipe = drawing.load_pipeline(base or checkpoints_dir() / "tiny-sd")
    hit = drawing.attach(pipe, adapter)
    prompts = [pictures.caption({}, subject, p) for p in PREVIEW_PREFIXES] + [
        pictures.caption({}, "a person")
    ]
    images = drawing.draw(pipe, prompts, range(6))
    path = drawing.save_image(drawing.grid(images, 6), out)
    return {"preview": str(path), "modules_hit": hit, "preview_prompts": prompts}


def predict(paths: Sequence[str | Path], *, model: str = MODEL) -> list[dict[str, Any]]:
    """Every attribute of every adapter with its probabilities; a row per path, in order.

    FormatError for a bad file; SpecError for one that is not of the base that the predictor knows.
    """
    predictor = load_predictor(model)
    loras = [io.load(p, modules=predictor.spec) for p in paths]
    rows = []
    for path, read in zip(paths, predictor.read(loras), strict=True):
        attributes = {}
        for name, probabilities in read.items():
            values = pictures.ATTRIBUTES[name]
            best = max(range(len(values)), key=lambda k: probabilities[k])
            attributes[name] = {
                "value": values[best],
                "probability": round(probabilities[best], 4),
                "probabilities": {v: round(p, 4) for v, p in zip(values, probabilities, strict=True)},
            }
        rows.append({"path": str(path), "attributes": attributes})
    return rows


def _words(request: Mapping[str, str]) -> str:
    return " ".join(f"{n}={v}" for n, v in request.items()) or "anything"


def load(path: str | Path) -> LoRA:
    """An adapter of any format."""
    return io.load(path)
