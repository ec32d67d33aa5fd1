"""The frame: pinned versions, make's targets, light imports, imports that go down only."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# --- versions


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    assert all(len(pair) == 2 for pair in pairs), "every line is NAME==VERSION"
    found: dict[str, Version] = {canonicalize_name(name): Version(version) for name, version in pairs}
    assert len(found) == len(pairs), "a name is pinned twice"
    return found


def requirements() -> list[Requirement]:
    """What `make install` installs by name: all but the `demo` extra, and `all`, which includes it."""
    extras = PROJECT["project"]["optional-dependencies"]
    groups = [PROJECT["project"]["dependencies"], *(v for k, v in extras.items() if k not in ("demo", "all"))]
    return [Requirement(r) for group in [*groups, PROJECT["build-system"]["requires"]] for r in group]


def closure(roots: list[Requirement]) -> Iterator[tuple[str, Version]]:
    """Name and installed version of everything that the requirements pull in, directly or not."""
    todo, seen = [(r, r.extras) for r in roots], set()
    while todo:
        requirement, extras = todo.pop()
        key = (canonicalize_name(requirement.name), frozenset(extras))
        if key in seen:
            continue
        seen.add(key)
        dist = distribution(requirement.name)
        yield key[0], Version(dist.version)
        for text in dist.requires or ():
            r = Requirement(text)
            if r.marker is None or any(r.marker.evaluate({"extra": e}) for e in ("", *extras)):
                todo.append((r, r.extras))


def test_every_requirement_is_pinned_within_its_range() -> None:
    pinned = pins()
    for r in requirements():
        assert r.specifier.contains(pinned[canonicalize_name(r.name)]), r


def test_indirect_requirements_are_pinned_and_installed_so() -> None:
    pinned = pins()
    for name, version in closure(requirements()):
        assert str(pinned.get(name)) == version.public, f"{name}: constraints.txt and the environment differ"


def test_pins_suit_any_index() -> None:
    pinned = pins()
    assert pinned["torch"] == Version("2.13.0")
    assert not [name for name, version in pinned.items() if version.local]


# --- make and the linters


def dry_run(folder: Path, target: str) -> str:
    """What `make target` would do; the variables of a make that runs these tests are kept from it."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--dry-run", target]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(
    "target, job",
    [("demo", "lolgen generate"), ("test", "-m pytest"), ("test-all", "-m pytest"), ("lint", "bin/mypy")],
)
def test_each_target_installs_first_where_needed(tmp_path: Path, target: str, job: str) -> None:
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    install = "-m venv .venv"
    plan = dry_run(tmp_path, target)
    assert 0 <= plan.find(install) < plan.find("constraints.txt") < plan.find(job)

    (tmp_path / ".venv").mkdir()
    stamp = tmp_path / ".venv" / ".installed"
    stamp.touch()
    newest = stamp.stat().st_mtime
    os.utime(tmp_path / "pyproject.toml", (newest - 1, newest - 1))
    os.utime(tmp_path / "constraints.txt", (newest - 1, newest - 1))
    plan = dry_run(tmp_path, target)
    assert install not in plan and job in plan

    os.utime(tmp_path / "constraints.txt", (newest + 1, newest + 1))
    assert install in dry_run(tmp_path, target)


def test_ci_and_pre_commit_lint_alike() -> None:
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"]
    assert [(h["entry"], h["language"]) for repo in hooks for h in repo["hooks"]] == [("make lint", "system")]
    script = ROOT / ".ci" / "run"
    assert "make lint test" in script.read_text()
    assert os.access(script, os.X_OK)


# --- imports

HEAVY = ("peft", "diffusers", "transformers", "gradio", "accelerate", "dicebear", "matplotlib")


def test_import_lolgen_stays_light() -> None:
    code = f"import sys, lolgen; print(*[m for m in {HEAVY!r} if m in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert out.stdout.split() == []


MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "errors": (),
    "paths": ("errors",),
    "pictures": ("errors",),
    "lora": ("errors",),
    "gl": ("errors", "lora"),
    "io": ("errors", "paths", "lora", "gl"),
    "nn": ("errors", "lora", "gl"),
    "metrics": ("errors", "lora", "gl"),
    "testing": ("errors", "lora", "gl", "metrics"),
    "flow": ("errors", "gl", "nn"),  # latents, never LoRAs
}
"""Part of lolgen -> the other parts it may import."""

OUTSIDE = ("train", "demos", "tests")
MAY_NOT_IMPORT: dict[str, tuple[str, ...]] = {
    "train": ("cli", "demos", "tests"),
    "demos": ("cli", "train", "tests"),
    "cli": OUTSIDE,
    "__main__": OUTSIDE,
    "__init__": ("cli", *OUTSIDE),
    "pipeline": ("cli", *OUTSIDE),
}
"""For the parts that are not in MAY_IMPORT; one that is in neither, such as zoo, lies below the pipeline."""


def parts(source: str, package: list[str]) -> set[str]:
    """What a module of `package` imports of ours: 'lora' for lolgen.lora; 'train', 'demos', 'tests'."""
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            base = [*above, *([node.module] if node.module else [])]
            names |= {".".join([*base, alias.name]) for alias in node.names}
    split = [name.split(".") for name in names]
    inside = {s[1] for s in split if s[0] == "lolgen" and len(s) > 1 and not s[1].startswith("__")}
    return inside | {s[0] for s in split if s[0] in OUTSIDE}


def upward(source: str, file: str) -> set[str]:
    """The imports of `file` (its path in the repository) that its place does not allow."""
    *package, stem = Path(file).with_suffix("").parts
    found = parts(source, package)
    part = [*package, stem][1] if package[0] == "lolgen" else package[0]
    if part in MAY_IMPORT:
        return found - {part, *MAY_IMPORT[part]}
    return found & set(MAY_NOT_IMPORT.get(part, ("pipeline", "cli", *OUTSIDE)))


FOLDERS = ("lolgen", "train", "demos")
FILES = [p.relative_to(ROOT).as_posix() for d in FOLDERS for p in sorted((ROOT / d).rglob("*.py"))]


@pytest.mark.parametrize("file", FILES)
def test_imports_go_down_only(file: str) -> None:
    assert upward((ROOT / file).read_text(), file) == set()


@pytest.mark.parametrize(
    "file, line, found",
    [
        ("lolgen/lora.py", "from lolgen.gl import act", {"gl"}),
        ("lolgen/lora.py", "def f():\n    from lolgen import gl", {"gl"}),
        ("lolgen/flow/path.py", "from ..lora import LoRA", {"lora"}),
        ("lolgen/flow/path.py", "from .. import lora", {"lora"}),
        ("lolgen/io/peft.py", "import lolgen.nn.layers", {"nn"}),
        ("lolgen/zoo/build.py", "from lolgen.pipeline import generate", {"pipeline"}),
        ("lolgen/pipeline.py", "from train.state import save", {"train"}),
        ("train/faces_train.py", "from lolgen.cli import main", {"cli"}),
        ("demos/app.py", "from lolgen.cli import main", {"cli"}),
        ("lolgen/io/peft.py", "from .kohya import table\nfrom lolgen.lora import LoRA\nimport torch", set()),
        ("lolgen/cli.py", "from lolgen import __version__, pipeline", set()),
        ("demos/app.py", "from lolgen.pipeline import generate", set()),
    ],
)
def test_an_upward_import_is_seen(file: str, line: str, found: set[str]) -> None:
    assert upward(line, file) == found
