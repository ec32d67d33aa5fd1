"""What a finding about a target is, and what the targets' rules share."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from lolgen.io import safetensors_file as stf
from lolgen.io.raw import RawModule
from lolgen.tools.inspect.source import Source

REFUSES, DROPS, SCALES, NOTE = "refuses", "drops", "mis-scales", "note"
LANGUAGE = ("llama", "mistral", "qwen", "gemma", "gpt2", "tiny-lm")


@dataclass(frozen=True)
class Finding:
    """`effect`: "refuses" (the whole file), "drops", "mis-scales" or "note"; `modules`: paths as in the file."""

    target: str
    effect: str
    text: str
    modules: tuple[str, ...] = ()


def alphas_of(source: Source) -> dict[str, float]:
    """Path -> what the file's `.alpha` tensors say, where it is one finite number."""
    wanted = {
        m.parts["alpha"]: path for path, m in source.modules.items() if m.shapes.get("alpha") in ((), (1,))
    }
    tensors = stf.read_raw(source.file, wanted)
    return {wanted[k]: float(t) for k, t in tensors.items() if math.isfinite(float(t))}


def is_language(source: Source) -> bool:
    """Whether the base is, or may be, a language model."""
    return any(f in LANGUAGE for f in source.family.candidates)


def keys_of(m: RawModule) -> Iterable[str]:
    """The keys of a module's tensors."""
    return m.parts.values()


def how_many(some: list[str], source: Source) -> str:
    """ "all 7 modules", "3 of 7 modules"."""
    total = len(source.modules)
    return f"all {total} modules" if len(some) == total else f"{len(some)} of {total} modules"
