"""The benchmark of conversions runs, and its figures are those of files that were read back."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from train import convert_bench


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_it_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    argv = ["convert_bench", "--families", "sd1", "--rank", "1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    convert_bench.main()
    report = json.loads((tmp_path / "convert_bench.json").read_text())
    assert len(report["sd1"]["pairs"]) == 9
    assert 0 < report["sd1"]["largest_error"] <= 1e-6
    assert report["sd1"]["read_kohya_cpu_seconds"]["diffusers"] > 0
