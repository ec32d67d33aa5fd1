"""Modules that a user should look at: numbers that are none, modules that do nothing, modules far off the rest."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from torch import Tensor

from lolgen.io import safetensors_file as stf
from lolgen.lora import LoRA
from lolgen.tools.inspect.source import Source

FACTOR = 4.0
"""An outlier's norm is at least this many times its group's median, or this many times below it."""
DEVIATIONS = 6.0
"""And this many robust standard deviations of the group's log norms away (1.4826 times the median deviation)."""
GROUP = 5
"""Fewest modules of one shape among which an outlier is looked for."""


@dataclass(frozen=True)
class Outlier:
    """`times`: the module's norm over the median norm of the modules of its shape."""

    name: str
    norm: float
    times: float


def outliers(lora: LoRA, norms: Mapping[str, float]) -> list[Outlier]:
    """Modules whose norm is far from the median of those of their shape, farthest first; zero modules left out."""
    found = []
    for _, index in lora.spec.groups:
        names = [lora.names[i] for i in index if norms[lora.names[i]] > 0]
        if len(names) < GROUP:
            continue
        middle = median(math.log(norms[n]) for n in names)
        spread = 1.4826 * median(abs(math.log(norms[n]) - middle) for n in names)
        for name in names:
            off = math.log(norms[name]) - middle
            if abs(off) > max(math.log(FACTOR), DEVIATIONS * spread):
                found.append(Outlier(name, norms[name], math.exp(off)))
    return sorted(found, key=lambda o: -abs(math.log(o.times)))


def not_finite(source: Source) -> list[tuple[str, int, int]]:
    """(key, NaN, Inf) of each tensor that holds any, from the raw file."""
    floating = [k for k, r in source.rows.items() if stf.DTYPES[r["dtype"]].is_floating_point]
    found = []
    for key in floating:
        tensor: Tensor = stf.read_raw(source.file, [key])[key]
        if not stf.finite(tensor):
            wide = tensor.float()
            found.append((key, int(wide.isnan().sum()), int(wide.isinf().sum())))
    return found
