"""The table of the paper's tasks: its figures against hand computations, its splits, and a run that resumes."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import pytest
import torch
from synthetic import CLASSES, RANK, make, write_zoo
from torch import Tensor

from lolgen.errors import LolgenError
from lolgen.paths import zoos_dir
from lolgen.tasks.paper import report, runner, samples, table
from lolgen.tasks.paper.figures import auroc, calibration_error, figures, kendall_tau, reliability
from lolgen.tasks.paper.task import Data, Task, labels_of, splits
from lolgen.tasks.paper.tasks import TASKS
from lolgen.tasks.reader import Budget, Classes, Numbers, Reader
from lolgen.zoo.styles import StylesPlan
from lolgen.zoo.zoo import Zoo


@pytest.mark.parametrize("seed", range(4))
def test_kendall_tau_counts_pairs(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    x, y = (torch.randint(6, (25,), generator=g).float() for _ in range(2))
    agree = tied_x = tied_y = pairs = 0.0
    for i, j in itertools.combinations(range(25), 2):
        a, b = float(x[i] - x[j]), float(y[i] - y[j])
        pairs += 1
        tied_x += a == 0
        tied_y += b == 0
        agree += (a * b > 0) - (a * b < 0)
    assert kendall_tau(x, y) == pytest.approx(agree / ((pairs - tied_x) * (pairs - tied_y)) ** 0.5)
    assert kendall_tau(y, y) == pytest.approx(1.0)
    assert kendall_tau(y, torch.zeros(25)) == 0.0


@pytest.mark.parametrize("seed", range(4))
def test_auroc_counts_pairs(seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    score, positive = torch.randint(5, (30,), generator=g).float(), torch.rand(30, generator=g) < 0.4
    pairs = [(a, b) for a in score[positive].tolist() for b in score[~positive].tolist()]
    assert auroc(score, positive) == pytest.approx(
        sum((a > b) + 0.5 * (a == b) for a, b in pairs) / len(pairs)
    )
    assert auroc(positive.float(), positive) == 1.0 and auroc(torch.zeros(30), positive) == 0.5


def test_calibration_error_by_hand() -> None:
    confidence = torch.tensor([0.95, 0.95, 0.55, 0.55])
    right = torch.tensor([True, True, True, False])
    rows = reliability(confidence, right, bins=10)
    assert [r[0] for r in rows] == [2, 2]
    assert calibration_error(rows) == pytest.approx((2 * 0.05 + 2 * 0.05) / 4)
    assert calibration_error(reliability(torch.ones(3), torch.zeros(3, dtype=torch.bool))) == 1.0


def test_what_a_perfect_reader_would_show() -> None:
    few, many = ([[n, 0.5, 0.5]] for n in (16.0, 1e6))
    assert table.perfect(few) == pytest.approx(0.8 * 0.5 / 4, rel=0.15)  # E|N(0, 1)| = .798
    assert table.perfect(many) < 1e-3 and table.perfect([[50.0, 1.0, 1.0]]) == 0.0


def test_figures_of_classes_count_what_can_be_seen() -> None:
    batch, y = make(40, 3)
    layout = Classes(CLASSES)
    perfect = Reader(layout, lambda _: 20 * layout.targets(y.clamp(min=0)), torch.ones(3))
    assert figures(perfect, batch, y)["metric"] == 1.0
    wrong = y.clone()
    wrong[wrong[:, 2] < 0, 2] = 1  # what was hidden reads as class 0: no figure may move
    seen = figures(perfect, batch, y)
    assert seen["each"]["hat"] == 1.0 and figures(perfect, batch, wrong)["each"]["hat"] < 1.0


def test_figures_of_numbers() -> None:
    batch, _ = make(200, 3)
    g = torch.Generator().manual_seed(0)
    y = 3 + 2 * torch.randn(200, 1, generator=g)
    layout = Numbers.of(["score"], y)
    noise = 0.5 * torch.randn(200, 1, generator=g)
    reader = Reader(layout, lambda _: layout.check(batch, y) + noise, torch.full((1,), 0.5))
    found = figures(reader, batch, y)
    assert found["mse"] == pytest.approx(float(noise.square().mean()), rel=1e-3)
    assert 0.9 < found["coverage"] <= 1.0 and 0.5 < found["metric"] < 0.9


@pytest.fixture(scope="module")
def zoos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("all")
    write_zoo(folder / "tiny", {"train": 60, "validation": 30, "test": 30})
    return folder


@pytest.fixture(autouse=True)
def one_task(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(zoos: Path) -> Data:
        train, validation, test = splits(Zoo.open(zoos / "tiny"), labels_of, RANK)
        return Data(Classes(CLASSES), train, validation, {"attributes": test, "attributes@rank3": test})

    monkeypatch.setenv("TQDM_DISABLE", "1")
    task = Task("attributes", "Tiny", ("tiny",), load, parts=True, sizes=(None, 10), hears=False)
    monkeypatch.setitem(runner.TASKS, "attributes", task)
    monkeypatch.setattr(runner, "PAPER", Budget(configurations=1, epochs=0.05))


def test_a_killed_run_goes_on_and_ends_in_the_same_table(zoos, tmp_path, monkeypatch) -> None:
    wanted = dict(models=["ours", "majority", "kernel"], tasks=["attributes"], workers=1, seeds=(0, 1))
    whole = runner.run(zoos, tmp_path / "whole", **wanted)
    real, calls = runner.fit, []

    def dies(job, *rest):
        calls.append(job)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(job, *rest)

    monkeypatch.setattr(runner, "fit", dies)
    with pytest.raises(KeyboardInterrupt):
        runner.run(zoos, tmp_path / "cut", **wanted)
    again = runner.run(zoos, tmp_path / "cut", **wanted)
    assert len(calls) == 3 + len(whole) - 2, "two jobs were finished before the kill"
    rows = [json.loads(json.dumps(table.rows_of(r))) for r in (whole, again)]
    assert rows[0] == rows[1]
    assert len(whole["attributes/all/ours"]["fits"]) == 2 and len(whole["attributes/all/kernel"]["fits"]) == 1


def test_the_report_has_the_form_and_names_its_commands(zoos, tmp_path) -> None:
    text = report.evaluate(
        zoos, tmp_path, models=["ours", "majority"], tasks=["attributes"], quick=True, workers=1
    )
    found = json.loads((tmp_path / "paper.json").read_text())
    row = found["rows"]["attributes"]
    assert row["metric"] == "accuracy" and row["higher_is_better"] is True
    assert set(row["models"]) == {"ours", "majority"} and set(row["models"]["ours"]) == {"mean", "std"}
    assert set(row["calibration"]) == {"ece", "ece_if_perfect"}
    assert {"attributes_hue", "attributes@10", "attributes@rank3", "attributes_loss@rank3"} <= set(
        found["rows"]
    )
    assert found["rows"]["attributes_loss@rank3"]["higher_is_better"] is False
    for name in ("paper_bars.png", "paper_calibration.png"):
        assert name in text and (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert "`lolgen eval paper --quick`" in text


def test_attributes_alone_have_a_row_each(zoos, tmp_path) -> None:
    report.evaluate(zoos, tmp_path, models=["ours", "kernel"], tasks=["attributes"], quick=True, workers=1)
    kept = (tmp_path / ".cache" / "paper-quick.json").stat().st_mtime_ns
    text = report.evaluate_attributes(zoos, tmp_path, models=["ours", "kernel"], quick=True, workers=1)
    rows = json.loads((tmp_path / "predict.json").read_text())["rows"]
    assert list(rows) == ["attributes", *CLASSES]
    for name in ("ours", "kernel"):
        each = [rows[n]["models"][name]["mean"] for n in CLASSES]
        assert rows["attributes"]["models"][name]["mean"] == pytest.approx(sum(each) / 3, abs=1e-5)
    assert (tmp_path / ".cache" / "paper-quick.json").stat().st_mtime_ns == kept, "nothing was run twice"
    assert "`lolgen eval predict --quick`" in text


def test_verdicts() -> None:
    entry = {
        "higher_is_better": False,
        "models": {
            "ours": {"mean": 1.0, "std": 0.1},
            "a": {"mean": 1.3, "std": 0.2},
            "b": {"mean": 9, "std": 0},
        },
    }
    assert table.verdict(entry) == {"best": "a", "value": 1.3, "lead": 0.3, "outside": True}
    entry["models"]["a"]["std"] = 0.4
    found = table.verdict(entry)
    assert found is not None and found["outside"] is False


def test_unknown_names_and_missing_zoos(tmp_path, zoos, capsys) -> None:
    with pytest.raises(LolgenError, match="valid tasks"):
        runner.run(zoos, tmp_path, tasks=["nothing"])
    with pytest.raises(LolgenError, match="valid models"):
        runner.run(zoos, tmp_path, models=["nothing"])
    assert runner.run(tmp_path, tmp_path, tasks=["styles"], workers=1) == {}
    assert "left out, no zoo styles" in capsys.readouterr().out


def test_samples_are_nested_and_fixed() -> None:
    train = make(50, 0)
    few, more = samples.subset(train, 10), samples.subset(train, 30)
    torch.testing.assert_close(few[0].groups[0].U, more[0].groups[0].U[:10])
    assert len(samples.subset(train, 1000)[0]) == len(samples.subset(train, None)[0]) == 50


def test_styles_are_split_by_subset_with_every_size() -> None:
    rows = StylesPlan().rows()
    of: dict[str, set[str]] = {}
    for r in rows:
        of.setdefault(r["id"][:-1], set()).add(r["split"])
    assert len(rows) == 2046 and len(of) == 1023 and all(len(s) == 1 for s in of.values())
    for split in ("train", "validation", "test"):
        sizes = {sum(r["labels"]) for r in rows if r["split"] == split}
        assert set(range(1, 10)) <= sizes, split


def seen(zoo: Zoo) -> set[tuple[int, ...]]:
    return {tuple(r["labels"]) for r in zoo}


@pytest.mark.parametrize("name", ["faces", "styles"])
def test_shipped_splits_share_no_combination(name: str) -> None:
    zoo = Zoo.open(zoos_dir() / name)
    train, held, test = (seen(zoo.split(s, None)) for s in ("train", "validation", "test"))
    assert train and held and test
    assert not (train & test or train & held or held & test)


def test_every_task_says_what_it_needs() -> None:
    language = ["speech_sources", "speech_loss", "speech_accuracy", "speech_recipe", "poisoned"]
    assert list(TASKS) == ["clip_score", "attributes", "styles", "dataset_size", "recipe", "rank", *language]
    assert all(t.zoos and t.title for t in TASKS.values())


def test_labels_are_whole(zoos) -> None:
    y: Tensor = labels_of(Zoo.open(zoos / "tiny").rows)
    assert y.shape == (120, 3)
