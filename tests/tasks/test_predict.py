"""The evaluation: the form of its report, and that a killed run goes on where it stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from synthetic import CLASSES, RANK, write_zoo

from lolgen.errors import LolgenError
from lolgen.tasks import predict
from lolgen.tasks.models import MODELS, Model
from lolgen.tasks.reader import Budget, Reader

COUNTS = {"train": 90, "validation": 40, "test": 40}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_zoo(tmp_path_factory.mktemp("zoos") / "synthetic", COUNTS)


@pytest.fixture(autouse=True)
def quiet_and_short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TQDM_DISABLE", "1")
    monkeypatch.setattr(predict, "FULL", Budget(configurations=2, epochs=0.1))


def evaluate(zoo: Path, out: Path, **options: Any) -> dict[str, Any]:
    return predict.evaluate(zoo, out=out, rank=RANK, classes=CLASSES, **options)


def test_report_has_the_form(zoo: Path, tmp_path: Path) -> None:
    report = evaluate(zoo, tmp_path / "reports", quick=True)
    assert json.loads((tmp_path / "reports" / "predict.json").read_text()) == report
    assert list(report) == ["rows"]
    assert list(report["rows"]) == ["attributes", *CLASSES]
    for row in report["rows"].values():
        assert list(row) == ["metric", "higher_is_better", "models"]
        assert row["metric"] == "accuracy" and row["higher_is_better"] is True
        assert list(row["models"]) == list(MODELS)
        for entry in row["models"].values():
            assert list(entry) == ["mean", "std"]
            assert 0 <= entry["mean"] <= 1 and entry["std"] >= 0
    for name in MODELS:
        each = [report["rows"][a]["models"][name]["mean"] for a in CLASSES]
        assert report["rows"]["attributes"]["models"][name]["mean"] == pytest.approx(sum(each) / 3, abs=1e-5)
    table = (tmp_path / "reports" / "predict.md").read_text()
    assert "`lolgen eval predict --quick`" in table
    assert f"| row | {' | '.join(MODELS)} |" in table
    assert not list(tmp_path.rglob("*.tmp"))


class Killed(BaseException):
    pass


def counting(monkeypatch: pytest.MonkeyPatch, name: str, stop_at: int = 99) -> list[tuple[int, Any]]:
    """Record (seed, config) of every fit of a model; the fit number `stop_at` is killed."""
    fit, calls = MODELS[name].fit, []

    def counted(*args: Any, **options: Any) -> Reader:
        if len(calls) == stop_at:
            raise Killed
        calls.append((args[5], options["config"]))
        return fit(*args, **options)

    monkeypatch.setitem(MODELS, name, Model(counted, MODELS[name].random))
    return calls


def test_a_killed_run_goes_on(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models, whole = (
        ["svd", "kernel"],
        evaluate(zoo, tmp_path / "whole", models=["svd", "kernel"], seeds=(0, 1)),
    )
    with monkeypatch.context() as patch, pytest.raises(Killed):
        calls = counting(patch, "svd", stop_at=1)
        evaluate(zoo, tmp_path / "out", models=models, seeds=(0, 1))
    assert [seed for seed, _ in calls] == [0]
    assert not (tmp_path / "out" / "predict.json").exists()
    with monkeypatch.context() as patch:
        calls = counting(patch, "svd")
        assert evaluate(zoo, tmp_path / "out", models=models, seeds=(0, 1)) == whole
    assert [seed for seed, _ in calls] == [1]
    assert set(calls[0][1]) == {"hidden", "lr"}  # chosen with the first seed, before the kill
    with monkeypatch.context() as patch:
        calls = counting(patch, "svd")
        assert evaluate(zoo, tmp_path / "out", models=models, seeds=(0, 1)) == whole
        assert not calls
        evaluate(zoo, tmp_path / "out", models=["svd"], seeds=(0,), quick=True)
        assert [seed for seed, _ in calls] == [0]


def test_another_zoo_is_another_result(zoo: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evaluate(zoo, tmp_path / "out", models=["majority"])
    other = write_zoo(tmp_path / "other", {**COUNTS, "test": 30})
    calls = counting(monkeypatch, "majority")
    evaluate(other, tmp_path / "out", models=["majority"])
    assert len(calls) == 1


def test_seeds_give_mean_and_deviation(zoo: Path, tmp_path: Path) -> None:
    report = evaluate(zoo, tmp_path, models=["majority", "svd"], seeds=(0, 1))
    assert report["rows"]["attributes"]["models"]["majority"]["std"] == 0
    each = [
        evaluate(zoo, tmp_path / str(s), models=["svd"], seeds=(s,))["rows"]["hue"]["models"]["svd"]["mean"]
        for s in (0,)
    ]
    both = report["rows"]["hue"]["models"]["svd"]
    assert abs(both["mean"] - each[0]) == pytest.approx(both["std"] / 2**0.5, abs=1e-5)
    assert "one fit where nothing is random" in (tmp_path / "predict.md").read_text()


def test_what_cannot_be_evaluated(zoo: Path, tmp_path: Path) -> None:
    with pytest.raises(LolgenError, match="valid models"):
        evaluate(zoo, tmp_path, models=["knn"])
    with pytest.raises(LolgenError, match="no LoRA of rank 7 in the train split"):
        predict.evaluate(zoo, out=tmp_path, rank=7, classes=CLASSES)
    with pytest.raises(LolgenError, match="zoo.json"):
        predict.evaluate(tmp_path / "nowhere", out=tmp_path)
