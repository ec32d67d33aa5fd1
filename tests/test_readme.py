"""What the README prints is what works: its Python runs as it stands, its commands exist."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from lolgen.cli import build_parser, main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text("utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_the_python_of_the_readme_runs(tmp_path):
    (code,) = blocks("python")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "person.png").is_file() and "'value': 'yes'" in done.stdout


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_language_example_runs(tmp_path, monkeypatch):
    (code,) = blocks("py")
    (line,) = [x for b in blocks("sh") for x in b.split("\n") if "grant:0.5" in x]
    monkeypatch.chdir(tmp_path)
    assert main(shlex.split(line)[1:]) == 0
    scope = {}
    exec(code, scope)
    assert type(scope["model"]).__name__.startswith("PeftModel")


def test_every_command_line_parses():
    parts = [x.split("#")[0].strip() for b in blocks("sh") for part in b.split("\n") for x in part.split(";")]
    lines = [shlex.split(x) for x in parts if x.startswith("lolgen ")]
    commands = [x[1:] for x in lines if x[:1] == ["lolgen"]]
    assert {c[0] for c in commands} >= {"generate", "predict", "compare", "eval"}
    for command in commands:
        build_parser().parse_args(command)


def test_the_tables_are_those_of_the_reports():
    from train.readme import refreshed

    assert refreshed(README) == README, "run python -m train.readme"
    assert refreshed(README.replace("| lolgen |", "| other |")) == README


def test_every_stage_and_file_named_exists():
    stages = re.findall(r"-m (train\.\w+)", README)
    assert len(stages) > 10
    for stage in stages:
        assert (ROOT / (stage.replace(".", "/") + ".py")).is_file(), stage
    for path in re.findall(r"\]\((?!http)([\w./]+)\)", README):
        assert (ROOT / path).exists(), path
