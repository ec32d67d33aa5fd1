"""The frame: pinned versions, make's targets, light imports, imports that go down only."""

from __future__ import annotations

import os
import subprocess
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
    """What `make install` installs by name: not `demo`, nor `all`, which includes it, nor what one stage needs."""
    extras = PROJECT["project"]["optional-dependencies"]
    groups = [
        PROJECT["project"]["dependencies"],
        *(v for k, v in extras.items() if k not in ("demo", "all", "bible", "smollm")),
    ]
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
