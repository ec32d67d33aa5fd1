"""`import lolgen` is light, and imports inside the repository only go down the layers of DESIGN.md."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import lolgen

ROOT = Path(__file__).resolve().parents[1]

LAYERS: tuple[tuple[str, ...], ...] = (
    ("errors", "quiet", "precision"),
    ("paths",),
    ("lora", "pictures", "language"),
    ("gl", "probe", "conditions"),
    ("io", "nn", "metrics", "testing", "base", "framing", "imager"),
    ("flow", "predictor", "preview"),
    ("zoo", "generator", "speaker"),
    ("editor", "speech_editor"),
    ("tasks",),
    ("tools",),
    ("pipeline",),
    ("commands",),
    ("cli",),
)
"""Bottom first. A part of lolgen (a file, or a folder and all in it) may import itself and lower layers."""

ONLY: dict[str, tuple[str, ...]] = {
    "flow": ("errors",),  # knows latents, never LoRAs
    "pictures": ("errors",),
    "paths": ("errors",),
    "__main__": ("cli",),
}
"""Parts that may import less than their layer says; what is named here needs no layer."""

NEVER: dict[str, tuple[str, ...]] = {"train": ("cli", "commands"), "demos": ("cli", "commands")}
"""Folders outside lolgen, and the parts of lolgen that they leave alone."""

LEVEL = {name: float(i) for i, names in enumerate(LAYERS) for name in names}
NEW = LEVEL["pipeline"] - 0.5
"""Where a part lies that has no place in LAYERS: just below the pipeline, beside others such."""

HEAVY = ("peft", "diffusers", "gradio", "transformers")


def imported(source: str, package: tuple[str, ...]) -> set[str]:
    """Parts of lolgen that a file in `package` imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join((*above, *filter(None, [node.module])))
            names = [f"{base}.{alias.name}" for alias in node.names]
        for name in names:
            top, *rest = name.split(".")
            if top == "lolgen" and rest and not rest[0].startswith("__"):
                # `from lolgen import LoRA` is an import of where LoRA lives.
                found.add(lolgen._WHERE.get(rest[0], rest[0]))
    return found


def level(part: str) -> float:
    return LEVEL.get(part, NEW)


def wrong(file: str, source: str) -> set[str]:
    """Parts that a file (its path in the repository) imports and may not."""
    folder, *inside = Path(file).with_suffix("").parts
    found = imported(source, (folder, *inside[:-1]))
    if folder in NEVER:
        return found & set(NEVER[folder])
    part = inside[0]
    if part in ONLY:
        return found - {part, *ONLY[part]}
    return {name for name in found - {part} if level(name) > level(part) or level(name) == level(part) != NEW}


def files() -> list[str]:
    found = [
        p.relative_to(ROOT) for folder in ("lolgen", *NEVER) for p in sorted((ROOT / folder).rglob("*.py"))
    ]
    # lolgen/__init__.py loads names on use: the package on top of all layers.
    return [p.as_posix() for p in found if p.as_posix() != "lolgen/__init__.py"]


@pytest.mark.parametrize("file", files())
def test_imports_go_down_only(file: str) -> None:
    assert wrong(file, (ROOT / file).read_text()) == set()


@pytest.mark.parametrize(
    "file, source, found",
    [
        ("lolgen/lora.py", "from lolgen.gl import act", {"gl"}),
        ("lolgen/gl.py", "import lolgen.metrics as m", {"metrics"}),
        ("lolgen/gl.py", "def f():\n    from . import nn", {"nn"}),
        ("lolgen/io/peft.py", "from ..nn.layers import Linear", {"nn"}),
        ("lolgen/io/peft.py", "from .kohya import read\nfrom ..lora import LoRA\nimport torch", set()),
        ("lolgen/flow/path.py", "from lolgen import LoRA", {"lora"}),
        ("lolgen/flow/path.py", "from lolgen.nn import Linear\nfrom lolgen.io import load", {"nn", "io"}),
        ("lolgen/base.py", "from lolgen import pipeline, pictures", {"pipeline"}),
        ("lolgen/zoo/build.py", "from lolgen.pipeline import generate", {"pipeline"}),
        ("lolgen/zoo/build.py", "from lolgen import __version__, io", set()),
        ("lolgen/pipeline.py", "from lolgen.cli import main", {"cli"}),
        ("lolgen/cli.py", "from lolgen.pipeline import generate", set()),
        ("lolgen/new/a.py", "from lolgen import cli, pipeline, tasks, other", {"cli", "pipeline"}),
        ("lolgen/gl.py", "from lolgen.new import a", {"new"}),
        ("train/stage.py", "from lolgen.cli import main", {"cli"}),
        ("train/stage.py", "from lolgen import pipeline, zoo", set()),
        ("demos/edit.py", "import lolgen.cli", {"cli"}),
    ],
)
def test_the_check_can_fail(file: str, source: str, found: set[str]) -> None:
    assert wrong(file, source) == found


def test_import_lolgen_is_light() -> None:
    code = "import sys, lolgen; print(*sys.modules)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(run.stdout.split())
    assert "lolgen" in loaded and not loaded & {"torch", *HEAVY}


@pytest.mark.parametrize("part", ["errors", "lora", "gl", "metrics", "testing"])
def test_the_core_needs_no_heavy_package(part: str) -> None:
    nodes = list(ast.walk(ast.parse((ROOT / "lolgen" / f"{part}.py").read_text())))
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not {name.split(".")[0] for name in names} & set(HEAVY)
