"""The models of the table, by name."""

from __future__ import annotations

from dataclasses import dataclass

from lolgen.errors import LolgenError
from lolgen.tasks import dense, glnet, kernel, majority, mlp, ours, svd
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
    "svd": Model(svd.fit),
    "dense": Model(dense.fit),
    "glnet": Model(glnet.fit),
    "kernel": Model(kernel.fit, random=False),
}
"""Name -> model, in the order of the table's columns."""


def model(name: str) -> Model:
    """The model of that name; LolgenError names the valid ones."""
    if name not in MODELS:
        raise LolgenError(f"unknown model {name!r}; valid models: {', '.join(MODELS)}")
    return MODELS[name]
