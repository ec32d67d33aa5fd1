"""What adapters say: attributes, and how two compare."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lolgen import io, metrics, pictures
from lolgen.errors import LolgenError
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


def compare(a: str | Path, b: str | Path) -> dict[str, Any]:
    """Cosine of the two delta W, and |A - B| / |A| (A is the reference); a module missing in one is zero there."""
    first, second = io.load(a), io.load(b)
    shared = [n for n in first.names if n in second.spec]
    if not shared:
        raise LolgenError(
            f"{a} and {b} share no module: they are for different bases, or name them differently"
        )
    return {
        "a": str(a),
        "b": str(b),
        "cosine": float(metrics.cosine(first, second)),
        "relative_distance": float(metrics.relative_distance(first, second)),
        "modules": {"shared": len(shared), "only_a": len(first.spec) - len(shared),
                    "only_b": len(second.spec) - len(shared)},
    }  # fmt: skip
