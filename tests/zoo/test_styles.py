"""The styles zoo: pictures come from a LoRA's own styles and its own split; the plan builds."""

from __future__ import annotations

import torch

from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.probe import Probe
from lolgen.zoo import styles
from lolgen.zoo.builder import build
from lolgen.zoo.styles import StylesPlan
from lolgen.zoo.zoo import Zoo


def test_pictures_are_of_the_subset_in_equal_parts(monkeypatch) -> None:
    monkeypatch.setattr(styles, "POOL", 3)
    plan = StylesPlan(styles=4, pictures=6)
    probe = Probe.load(checkpoints_dir() / "probe.safetensors")
    rows = {r["id"]: r for r in plan.rows()}
    assert len(rows) == 2 * 15
    row = rows["0-2-3a"]
    pixels = plan.draw(row)
    assert pixels.shape == (6, 3, 32, 32) and pixels.dtype == torch.uint8
    kinds = (probe(pixels.float() / 127.5 - 1)["kind"].argmax(1) - 1).tolist()
    assert kinds == [0, 2, 3, 0, 2, 3]
    assert torch.equal(plan.draw(row), pixels), "the same pictures whenever they are drawn"
    assert not torch.equal(plan.draw(rows["0-2-3b"]), pixels), "two LoRAs of a subset see different ones"


def test_a_tiny_styles_zoo(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(styles, "POOL", 2)
    styles.pool.cache_clear()
    plan = StylesPlan(
        name="tiny", styles=2, per_subset=1, steps=(2,), pictures=2, bank=4, prior_pictures=4, batch=1
    )
    zoo = Zoo.open(build(plan, checkpoints_dir() / "tiny-sd", tmp_path / "z", workers=1))
    styles.pool.cache_clear()
    assert sorted(map(tuple, zoo.labels().tolist())) == [(0, 1), (1, 0), (1, 1)]
    assert zoo.load().rank == 4 and len(zoo.spec) == 14


def test_the_shipped_zoo_is_the_plan() -> None:
    zoo = Zoo.open(zoos_dir() / "styles")
    wanted = {r["id"]: (r["split"], tuple(r["labels"])) for r in StylesPlan().rows()}
    assert {r["id"]: (r["split"], tuple(r["labels"])) for r in zoo} == wanted
    few = Zoo(zoo.folder, zoo.info, zoo.rows[:5]).load()
    assert all(torch.isfinite(g.U).all() and g.U.abs().sum() > 0 for g in few.groups)
