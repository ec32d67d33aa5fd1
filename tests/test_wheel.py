"""The wheel: what is in it, and that it works installed elsewhere and called from another folder."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DATA = "lolgen/_checkpoints/"


def run(*args: str | Path, cwd: Path, **env: str) -> str:
    """Standard output of a Python command that must succeed, in an environment that names no checkpoints."""
    clean = {k: v for k, v in os.environ.items() if k not in ("LOLGEN_CHECKPOINTS", "PYTHONPATH")}
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=cwd, env=clean | env, capture_output=True, text=True)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what a wheel is built from, with a model and a zoo planted; the tree is left alone."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE", ".gitignore"):
        shutil.copy(ROOT / name, copy)
    for name in ("lolgen", "demos"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    if (ROOT / "checkpoints").is_dir():
        shutil.copytree(ROOT / "checkpoints", copy / "checkpoints", ignore=shutil.ignore_patterns("zoos"))
    for name in ("planted/model.safetensors", "zoos/planted/0.safetensors"):
        (copy / "checkpoints" / name).parent.mkdir(parents=True)
        (copy / "checkpoints" / name).write_bytes(name.encode())
    return copy


@pytest.fixture(scope="module")
def wheel(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("dist")
    run("-m", "build", "--wheel", "--no-isolation", "--outdir", out, cwd=source)
    (built,) = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder apart holding the installed package; PYTHONPATH puts it before the editable install."""
    target = tmp_path_factory.mktemp("elsewhere") / "site"
    pip = ("-m", "pip", "install", "--quiet", "--no-index", "--no-deps")
    run(*pip, "--target", target, wheel, cwd=target.parent)
    return target


def test_holds_every_checkpoint_and_no_zoo(source: Path, wheel: Path) -> None:
    checkpoints = source / "checkpoints"
    files = [p for p in checkpoints.rglob("*") if p.is_file() and checkpoints / "zoos" not in p.parents]
    with zipfile.ZipFile(wheel) as z:
        packed = {n for n in z.namelist() if n.startswith(DATA) and not n.endswith("/")}
        assert packed == {DATA + p.relative_to(checkpoints).as_posix() for p in files}
        for p in files:
            assert z.read(DATA + p.relative_to(checkpoints).as_posix()) == p.read_bytes()


def test_holds_the_package_its_licence_and_one_command(source: Path, wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        names = set(z.namelist())
        (entry,) = (n for n in names if n.endswith(".dist-info/entry_points.txt"))
        assert z.read(entry).decode().split() == ["[console_scripts]", "lolgen", "=", "lolgen.cli:main"]
    assert any(n.endswith(".dist-info/licenses/LICENSE") for n in names)
    assert {p.relative_to(source).as_posix() for p in (source / "lolgen").rglob("*.py")} <= names
    assert {n.split("/")[0] for n in names if ".dist-info/" not in n} == {"lolgen"}


def test_holds_the_app(source: Path, wheel: Path) -> None:
    wanted = {f"lolgen/_demos/{p.name}" for p in (source / "demos").iterdir() if p.is_file()}
    with zipfile.ZipFile(wheel) as z:
        assert {n for n in z.namelist() if n.startswith("lolgen/_demos/")} == wanted
    assert {"lolgen/_demos/app.py", "lolgen/_demos/style.css", "lolgen/_demos/favicon.svg"} <= wanted


def test_installed_elsewhere_the_app_is_found(installed: Path, tmp_path: Path) -> None:
    """Also where a folder called `demos` lies about."""
    (tmp_path / "demos").mkdir()
    (tmp_path / "demos" / "app.py").write_text("raise SystemExit('the wrong app')")
    code = "from lolgen.commands.demo import load_app; app = load_app(); print(app.__name__, app.__file__)"
    name, file = run("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).split()
    assert name == "lolgen._demos.app" and Path(file) == installed / "lolgen/_demos/app.py"


def test_installed_elsewhere_finds_its_checkpoints(installed: Path, tmp_path: Path) -> None:
    code = "import lolgen.paths as p; print(p.__file__); print(p.checkpoints_dir())"
    module, found = run("-c", code, cwd=tmp_path, PYTHONPATH=str(installed)).splitlines()
    assert Path(module).is_relative_to(installed)
    assert Path(found) == installed / DATA
    assert (Path(found) / "planted/model.safetensors").read_bytes() == b"planted/model.safetensors"
    assert not (Path(found) / "zoos").exists()


def test_installed_elsewhere_it_generates_and_draws(installed: Path, tmp_path: Path) -> None:
    """A real request, from the wheel's own models and base, called from a folder that is not the repository."""
    out = run(
        "-m", "lolgen.cli", "generate", "--set", "hair_color=red", "--set", "glasses=yes", "--seed", "0",
        "--rank", "4", "--format", "peft", "-o", "out", "--preview", "p.png", "--json",
        cwd=tmp_path, PYTHONPATH=str(installed),
    )  # fmt: skip
    report = json.loads(out)
    assert report["modules_hit"] == report["modules"] > 0
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file() and (tmp_path / "p.png").is_file()
    read = run("-m", "lolgen.cli", "predict", "out", "--json", cwd=tmp_path, PYTHONPATH=str(installed))
    assert json.loads(read)[0]["attributes"]["glasses"]["value"] == "yes"
