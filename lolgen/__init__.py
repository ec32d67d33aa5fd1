"""lolgen learns on LoRAs, GL-equivariantly: it inspects, predicts from, generates and edits adapter files.

Public names are loaded on first use, so that `import lolgen` costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lolgen.errors import AttributeValueError, FormatError, LolgenError, ShapeError, SpecError
    from lolgen.lora import Batch, Factors, Group, LoRA, ModuleSpec, Spec
    from lolgen.pipeline import compare, edit, generate, invert, mix, predict, sample

__version__ = "0.1.0"

_WHERE = {
    "AttributeValueError": "errors",
    "Batch": "lora",
    "Factors": "lora",
    "FormatError": "errors",
    "Group": "lora",
    "LoRA": "lora",
    "LolgenError": "errors",
    "ModuleSpec": "lora",
    "ShapeError": "errors",
    "Spec": "lora",
    "SpecError": "errors",
    "compare": "pipeline",
    "edit": "pipeline",
    "generate": "pipeline",
    "invert": "pipeline",
    "mix": "pipeline",
    "predict": "pipeline",
    "sample": "pipeline",
}
_MODULES = ("errors", "gl", "io", "lora", "metrics", "nn", "testing")

__all__ = [
    "AttributeValueError",
    "Batch",
    "Factors",
    "FormatError",
    "Group",
    "LoRA",
    "LolgenError",
    "ModuleSpec",
    "ShapeError",
    "Spec",
    "SpecError",
    "__version__",
    "compare",
    "edit",
    "generate",
    "invert",
    "mix",
    "predict",
    "sample",
]


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        value = getattr(import_module(f"lolgen.{_WHERE[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        try:
            return import_module(f"lolgen.{name}")
        except ModuleNotFoundError as error:
            if error.name != f"lolgen.{name}":
                raise
    raise AttributeError(f"module 'lolgen' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_WHERE, *_MODULES})
