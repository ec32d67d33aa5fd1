"""The stages of speeches after the zoo, each in its smoke recipe on what the one before left; the commands on that."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

from lolgen import io
from lolgen.cli import main
from lolgen.paths import zoos_dir
from lolgen.speech_editor import SpeechEditor
from lolgen.tasks import respeak, speak

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
]


def stage(monkeypatch: pytest.MonkeyPatch, name: str, *argv: str | Path) -> None:
    monkeypatch.setattr(sys, "argv", [name, "--recipe", "smoke", *map(str, argv)])
    importlib.import_module(f"train.{name}").main()


def test_from_a_zoo_to_edited_adapters_and_reports(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    zoo, model, out, cache = zoos_dir() / "speeches", tmp_path / "model", tmp_path / "out", tmp_path / "cache"
    rivals = model / respeak.FACTORS
    stage(
        monkeypatch, "speeches_train", "--zoo", zoo, "--out", model, "--state", tmp_path / "state.safetensors"
    )
    stage(monkeypatch, "speeches_edit_tune", "--zoo", zoo, "--out", model, "--cache", cache)
    tuned = SpeechEditor.from_pretrained(model).amounts
    assert (tuned.kept, tuned.reach, tuned.removed, tuned.deepest) == (0.7, 1.0, 2.0, 0.5)
    # One system of one doing again: the others stay as they are.
    before = json.loads(rivals.read_text())
    argv = "--out", model, "--cache", cache, "--systems", "merge", "--doing", "remove"
    stage(monkeypatch, "speeches_edit_tune", "--zoo", zoo, *argv)
    assert json.loads(rivals.read_text()) == before and set(before) == set(respeak.RIVALS)

    made, edited = str(tmp_path / "a"), str(tmp_path / "b")
    assert main(["generate", "--zoo", str(model), "--set", "source=polk", "-o", made]) == 0
    assert main(["edit", made, "--zoo", str(model), "--add", "taft", "-o", edited]) == 0
    assert io.load(edited).names == io.load(made).names

    for what, names in (("speeches", speak.NAMES), ("speeches-edit", respeak.NAMES)):
        assert main(["eval", what, "--quick", "--model", str(model), "--out", str(out)]) == 0
        text = (out / f"{what.replace('-', '_')}.md").read_text()
        assert all(f"| {n} |" in text for n in names)
