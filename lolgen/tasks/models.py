"""The models of the table, by name."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path

from lolgen.errors import LolgenError
from lolgen.tasks import (
    dense,
    dsire,
    flat_transformer,
    glnet,
    glnet_gate,
    glnet_transformer,
    gp,
    kernel,
    majority,
    mlp,
    oalign,
    ours,
    pca,
    svd,
    w2t,
)
from lolgen.tasks.reader import Fit


@dataclass(frozen=True)
class Model:
    """`random`: whether the seed matters, so that several are worth their time."""

    fit: Fit
    random: bool = True


MODELS: dict[str, Model] = {
    "ours": Model(ours.fit),
    "majority": Model(majority.fit, random=False),
    "mlp": Model(mlp.fit),
    "o_align": Model(oalign.fit),
    "svd": Model(svd.fit),
    "dsire": Model(dsire.fit, random=False),
    "dense": Model(dense.fit),
    "glnet": Model(glnet.fit),
    "glnet_gate": Model(glnet_gate.fit),
    "glnet_transformer": Model(glnet_transformer.fit),
    "transformer": Model(flat_transformer.fit),
    "w2t": Model(w2t.fit),
    "pca": Model(pca.fit, random=False),
    "kernel": Model(kernel.fit, random=False),
    "gp": Model(gp.fit, random=False),
}
"""Name -> model, in the order of the table's columns."""

SOURCES: tuple[Path, ...] = tuple(Path(inspect.getfile(m.fit)) for m in MODELS.values())
"""The file of each model, one a model, in the same order."""


def model(name: str) -> Model:
    """The model of that name; LolgenError names the valid ones."""
    if name not in MODELS:
        raise LolgenError(f"unknown model {name!r}; valid models: {', '.join(MODELS)}")
    return MODELS[name]
