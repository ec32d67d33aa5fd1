"""What adapters say of what they draw."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lolgen import io, pictures
from lolgen.pipeline.models import MODEL, load_predictor


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
