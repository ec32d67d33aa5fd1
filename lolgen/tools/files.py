"""Adapters in and out of the toolbox: `PATH:WEIGHT`, matching modules of several files, what a recipe records."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import lolgen
from lolgen import io
from lolgen.errors import LolgenError, ShapeError
from lolgen.io import peft
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec
from lolgen.tools.thin import Term, Written, dtype_of

RECIPE = "lolgen.recipe"
"""Header entry of what the toolbox writes: JSON of the command, its inputs (name, sha256, weight), its options."""
DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
    "float64": torch.float64,
}
_CONFIGS = ("adapter_config", "lora_adapter_metadata")


@dataclass(frozen=True, eq=False)
class Input:
    """An adapter that was read: where from, as which format, and its weight in a combination."""

    path: str
    lora: LoRA
    format: str
    weight: float = 1.0


def parse(text: str) -> tuple[str, float]:
    """(path, weight) of `PATH:WEIGHT`, cut at the last colon; without a number behind it, all is path, weight 1.

    A file that is really called so wins. LolgenError for a weight that is not finite.
    """
    head, colon, tail = text.rpartition(":")
    try:
        weight = float(tail)
    except ValueError:
        return text, 1.0
    if not colon or not head or (Path(text).exists() and not Path(head).exists()):
        return text, 1.0
    if not math.isfinite(weight):
        raise LolgenError(f"{text}: found weight {tail}, wanted a finite number")
    return head, weight


def read(path: str | Path, weight: float = 1.0) -> Input:
    """The adapter at `path`. FormatError for whatever is wrong with it."""
    return Input(str(path), io.load(path), io.detect(path), weight)


def no_extras(inputs: Sequence[Input], doing: str) -> None:
    """LolgenError when an input carries tensors that are not factors: they have no sum or difference."""
    for i in inputs:
        if i.lora.extras:
            key = next(iter(i.lora.extras))
            raise LolgenError(
                f"{i.path}, key {key!r}: found {len(i.lora.extras)} tensors that are not factor pairs (DoRA "
                f"magnitudes, biases, full modules); wanted a plain LoRA, as {doing} is defined on delta W alone; "
                "merge such an adapter into its base model first, or train without DoRA"
            )


def match(inputs: Sequence[Input]) -> tuple[dict[str, ModuleSpec], dict[str, list[Term]]]:
    """Modules by name, in order of first appearance, and each one's terms; a module may be missing anywhere.

    A 1x1 conv that one file stores as a matrix and another as a conv is one module. ShapeError when shapes or
    kinds do not agree.
    """
    modules: dict[str, ModuleSpec] = {}
    terms: dict[str, list[Term]] = {}
    for i, given in enumerate(inputs):
        for module in given.lora.spec:
            known = modules.get(module.name, module)
            agreed = _agreed(known, module)
            if agreed is None:
                raise ShapeError(
                    f"{given.path}: module {module.name!r}: found {_words(module)}, wanted {_words(known)} "
                    f"as in {inputs[terms[module.name][0].input].path}; the adapters are for different bases"
                )
            modules[module.name] = agreed
            terms.setdefault(module.name, []).append(Term(i, given.lora[module.name]))
    return modules, terms


def _agreed(a: ModuleSpec, b: ModuleSpec) -> ModuleSpec | None:
    if a == b:
        return a
    if a.shape == b.shape and {a.kind, b.kind} == {"linear", "conv"}:
        conv = a if a.kind == "conv" else b
        return conv if set(conv.kernel) == {1} else None
    return None


def _words(m: ModuleSpec) -> str:
    return f"{m.kind} {m.shape}" + (f", kernel {m.kernel}" if m.kernel else "")


def dtypes_of(terms: Mapping[str, Sequence[Term]], dtype: str | None) -> dict[str, torch.dtype]:
    """What each module is written in: `dtype`, or (None, "same") the widest of its inputs."""
    if dtype not in (None, "same"):
        if dtype not in DTYPES:
            raise LolgenError(f"dtype: found {dtype!r}, wanted same or one of {', '.join(DTYPES)}")
        return dict.fromkeys(terms, DTYPES[str(dtype)])
    found = {}
    for name, parts in terms.items():
        widest = dtype_of(parts[0].factors)
        for _, f in parts:
            widest = torch.promote_types(widest, dtype_of(f))
        found[name] = widest
    return found


def format_of(inputs: Sequence[Input], format: str | None) -> str:
    """The format to write: `format`, or (None, "same") the first input's. LolgenError when there is none such."""
    found = inputs[0].format if format in (None, "same") else str(format)
    if found not in io.FORMATS:
        raise LolgenError(f"format: found {found!r}, wanted one of {', '.join(io.FORMATS)} to write")
    return found


def result(
    inputs: Sequence[Input],
    modules: Mapping[str, ModuleSpec],
    written: Mapping[str, Written],
    recipe: Mapping[str, Any],
) -> LoRA:
    """The LoRA to write: of the inputs' header entries, those that all agree on, and the recipe.

    Extras are kept where there is one input.
    """
    metadata = _common([i.lora.metadata for i in inputs])
    ranks = {w.factors.rank for w in written.values()}
    for key in ("ss_network_dim", "ss_network_alpha"):
        if key in metadata:  # alpha is the rank in what lolgen writes; "Dynamic" is sd-scripts' own word
            metadata[key] = str(ranks.copy().pop()) if len(ranks) == 1 else "Dynamic"
    sources = [_source(i) for i in inputs]
    entry = {"lolgen": lolgen.__version__, "inputs": sources, **recipe}
    metadata[RECIPE] = json.dumps({k: v for k, v in entry.items() if v is not None})
    factors: dict[str, Factors] = {n: written[n].factors for n in modules}
    extras = dict(inputs[0].lora.extras) if len(inputs) == 1 else {}
    return LoRA(Spec(tuple(modules.values())), factors, metadata, extras)


def _source(given: Input) -> dict[str, Any]:
    """What a recipe says of an input; of one that the toolbox made, its own recipe too."""
    found = {"name": Path(given.path).name, "sha256": _sha256(given.path), "weight": given.weight}
    earlier = _object(given.lora.metadata.get(RECIPE))
    return found | ({"recipe": earlier} if earlier else {})


def _common(headers: Sequence[Mapping[str, str]]) -> dict[str, str]:
    """The entries that all headers agree on; of PEFT's configs, JSON inside an entry, the fields."""
    first, *others = headers
    shared = {k: v for k, v in first.items() if all(h.get(k) == v for h in others)}
    for key in _CONFIGS:
        if key in first and key not in shared:
            configs = [_object(h.get(key)) for h in headers]
            if all(configs):
                fields = {k: v for k, v in configs[0].items() if all(c.get(k, c) == v for c in configs[1:])}
                shared[key] = json.dumps(fields, sort_keys=True)
    return shared


def _object(text: str | None) -> dict[str, Any]:
    try:
        found = json.loads(text or "{}")
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _sha256(path: str) -> str:
    with open(peft.weights_file(path), "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def save(lora: LoRA, out: str | Path, format: str) -> str:
    """Write the result, atomically; where it is."""
    return str(io.save(lora, out, format))
