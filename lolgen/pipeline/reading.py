"""What adapters say of what they draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lolgen import io, pictures
from lolgen.errors import SpecError
from lolgen.lora import Batch, LoRA
from lolgen.pipeline.models import MODEL, load_predictor, load_readers

VALUES: dict[str, tuple[str, ...]] = {
    **pictures.ATTRIBUTES,
    **dict.fromkeys(pictures.STYLES, ("no", "yes")),
    "dataset_size": tuple(str(n) for n in range(1, len(pictures.STYLES) + 1)),
    "lr": ("0.0015", "0.003", "0.006", "0.012"),
    "steps": ("30", "40", "50", "60"),
    "prompt": pictures.SUBJECTS,
}
"""Label of a task -> its classes in words."""


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


def read(paths: Sequence[str | Path]) -> list[dict[str, Any]]:
    """Everything that the shipped readers know of adapters, a row per path, in order: `labels` (name -> value with its
    probability, or with the 95 % interval of a number), and `unlike`, the tasks whose zoo has nothing like it: their
    readings are guesses.

    FormatError for a bad file; SpecError for modules that no reader knows.
    """
    readers = load_readers()
    modules = max((spec for spec, _ in readers.values()), key=len)
    return [{"path": str(p)} | _read(io.load(p, modules=modules)) for p in paths]


def _read(lora: LoRA) -> dict[str, Any]:
    labels: dict[str, Any] = {}
    unlike: list[str] = []
    for task, (spec, reader) in load_readers().items():
        if set(spec.names) != set(lora.names):
            continue
        batch = Batch.stack([LoRA(spec, {n: lora.factors[n] for n in spec.names}, {}, {})])
        found = reader.predict(batch)
        interval = reader.interval(batch) if task == "clip_score" else {}
        unlike += [] if bool(reader.familiar(batch)) else [task]
        for name, p in found.items():
            if name in interval:
                low, high = (round(float(x), 4) for x in interval[name][0])
                labels[name] = {"value": round(float(p[0, 0]), 4), "interval": [low, high]}
            else:
                best = int(p[0].argmax())
                labels[name] = {"value": VALUES[name][best], "probability": round(float(p[0, best]), 4)}
    if not labels:
        raise SpecError(
            f"found {len(lora.names)} modules, the first {next(iter(lora.names), None)!r}, wanted those of a shipped "
            f"reader: {', '.join(load_readers())}"
        )
    return {"labels": labels, "unlike": unlike}
