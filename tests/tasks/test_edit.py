"""The judge of edits, the rivals' directions, and the evaluation as a whole on a few LoRAs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from lolgen import metrics, pictures, pipeline
from lolgen.lora import Batch
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.probe import Probe
from lolgen.tasks import editors
from lolgen.tasks.edit import Bench, Point, points
from lolgen.tasks.edit_report import equal_success
from lolgen.tasks.editing import EditCase, at, judge, make_edit_cases
from lolgen.tasks.generators import Training
from lolgen.zoo.zoo import Zoo


@pytest.fixture(scope="module")
def test() -> Zoo:
    zoo = Zoo.open(zoos_dir() / "faces").split("test")
    return Zoo(zoo.folder, zoo.info, zoo.rows[:6])


@pytest.fixture(scope="module")
def probe() -> Probe:
    return Probe.load(checkpoints_dir() / "probe.safetensors")


def rendered(people: list[pictures.Identity], each: int = 2) -> torch.Tensor:
    """(N, each, 3, 32, 32) in [-1, 1]: the same expressions and backgrounds for everybody."""
    rows = []
    for person in people:
        rng = np.random.default_rng(0)
        rows.append(np.stack([pictures.draw_portrait(person, rng) for _ in range(each)]))
    return torch.from_numpy(np.stack(rows)).float() / 127.5 - 1


def test_cases_name_what_shows_and_another_value(test):
    cases = make_edit_cases(test, 6, 0)
    for case in cases:
        person = test.rows[case.row]["identity"]["attributes"]
        assert pictures.visible(person, case.attribute) and person[case.attribute] != case.value
    shown = sum(pictures.visible(r["identity"]["attributes"], n) for r in test for n in pictures.ATTRIBUTES)
    assert len(cases) == shown and make_edit_cases(test, 6, 0) == cases != make_edit_cases(test, 6, 1)


def test_the_judge_on_rendered_edits(test, probe):
    """Pictures of the persons themselves: a perfect edit, none at all, and an edit that changes something else too."""
    people = [pictures.Identity.from_json(r["identity"]) for r in test]
    before = rendered(people)
    cases = [c for c in make_edit_cases(test, 6, 0) if c.attribute in ("glasses", "clothes", "skin")]

    def after(more: dict[str, str]) -> torch.Tensor:
        return rendered(
            [
                pictures.Identity.from_json(
                    {**test.rows[c.row]["identity"],
                     "attributes": {**people[c.row].attributes, **more, **c.request}}
                )
                for c in cases
            ]
        )  # fmt: skip

    perfect = judge(probe, test, cases, before, after({}))
    assert perfect.success.mean() > 0.97 and perfect.collateral.mean() < 0.03 and perfect.wrong.mean() < 0.03
    none = judge(probe, test, cases, before, before[[c.row for c in cases]])
    assert none.success.max() == 0 and none.collateral.max() == 0 and none.identity.min() > 0.999
    assert none.identity.mean() > perfect.identity.mean()
    other = {"top": "hat", "beard": "yes"}
    worse = judge(probe, test, cases, before, after(other))
    assert worse.collateral.mean() > 0.1 and worse.identity.mean() < perfect.identity.mean()


def test_rivals_point_the_right_way(test):
    """Directions lead from LoRAs of one value towards those of the other, by exact inner products."""
    zoo = Zoo.open(zoos_dir() / "faces")
    training = Training.of(zoo, "sks")
    person = test.rows[0]["identity"]["attributes"]
    to = "no" if person["glasses"] == "yes" else "yes"
    cases = [EditCase(0, "glasses", to, 0)]
    old = torch.tensor([pictures.labels(person)])
    new = torch.tensor([pictures.labels({**person, "glasses": to})])
    gram = metrics.gram(training.batch)
    q = list(pictures.ATTRIBUTES).index("glasses")
    wanted = training.labels[:, q] == pictures.ATTRIBUTES["glasses"].index(to)
    for name, weights in editors.RIVALS.items():
        w = weights(training, old, new, cases)
        assert w.shape == (1, len(training.labels)), name
        along = (w.double() @ gram)[0]  # inner product of the direction with every training LoRA
        assert along[wanted].mean() > along[~wanted].mean() + along.std(), name
    means = editors.class_mean_weights(training, old, new, cases)[0]
    assert torch.allclose(means[wanted], torch.full_like(means[wanted], 1 / wanted.sum()))
    assert torch.allclose(means[~wanted], torch.full_like(means[~wanted], -1 / (~wanted).sum()))


def test_a_rival_adds_its_direction_and_keeps_the_rank(test):
    zoo = Zoo.open(zoos_dir() / "faces")
    cases = make_edit_cases(test, 2, 0)
    batch = at(test.load(), cases)
    system = editors.along(
        editors.class_mean_weights,
        zoo,
        test,
        pipeline.load_editor().familiarity,
        editors.rival_reach("class_means"),
    )
    edited = system(batch, cases, 1.0)
    assert isinstance(edited, Batch) and torch.equal(edited.ranks, batch.ranks)
    same = system(batch, cases, 0.0)
    assert float(metrics.relative_distance(batch.to(torch.float64), same).max()) < 1e-6
    assert float(metrics.relative_distance(batch.to(torch.float64), edited).min()) > 1e-2


def test_equal_success_reads_the_curve():
    curve = [{"strength": s, "success": s, "collateral": s / 10, "identity": 1 - s / 2} for s in (0.5, 1.0)]
    rival = [{"strength": 1.0, "success": 0.75, "collateral": 0.08, "identity": 0.5}]
    systems = {n: {"curve": rival} for n in editors.RIVALS}
    point = {"success": 0.75, "collateral": 0.01, "identity": 0.9}
    rows = equal_success({"systems": {"lolgen": {"curve": curve}, **systems, "retrained": point}})
    assert [r["ahead"] for r in rows] == [True, True, True, False]
    assert rows[0]["lolgen_collateral"] == pytest.approx(0.075) and rows[0][
        "lolgen_identity"
    ] == pytest.approx(0.625)


def test_the_report_covers_what_it_says():
    found = points()
    assert {p.system for p in found} == {"lolgen", "w2w", "ridge", "class_means", "retrained"}
    assert {p.rank for p in found} == {1, 2, 4, 8, 16, 32}
    assert len(found) == len(set(found)) and Point("lolgen", variant="regauged") in found


def test_the_same_people_at_every_rank(tmp_path):
    bench = Bench(str(zoos_dir() / "faces"), "faces", 5, [0], tmp_path, None)
    for rank in (1, 32):
        assert int(bench.loras(rank).ranks.max()) == rank and len(bench.loras(rank)) == 5
    assert [r["id"] for r in bench.test.rows[:3]] == ["test-0000", "test-0001", "test-0002"]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["edit", "invert"])
def test_the_quick_evaluations_write_their_reports(tmp_path, what):
    from lolgen.cli import main

    assert main(["eval", what, "--quick", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / f"{what}.json").read_text())
    assert report["command"] == f"lolgen eval {what} --quick"
    for figures in report["systems"].values():
        assert figures["seconds"] > 0
    for name in (f"{what}.md", f"{what}.png"):
        assert (tmp_path / name).stat().st_size > 500
