"""A killed build resumes to the same bytes; a zoo says what it holds."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lolgen import pictures
from lolgen.errors import LolgenError
from lolgen.paths import checkpoints_dir
from lolgen.zoo.builder import build
from lolgen.zoo.plan import Plan
from lolgen.zoo.zoo import Zoo

TINY = Plan(
    name="tiny", counts={"train": 2, "validation": 1, "test": 2}, ranks=(1,), per_rank=1, steps=(2, 3),
    pictures=2, bank=2, prior_pictures=4,
)  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def base_folder() -> Path:
    return checkpoints_dir() / "tiny-sd"


@pytest.fixture(scope="module")
def whole(base_folder, tmp_path_factory) -> Path:
    return build(TINY, base_folder, tmp_path_factory.mktemp("zoo") / "whole", workers=1)


def test_an_interrupted_build_ends_in_the_same_bytes(whole, base_folder, tmp_path):
    build(TINY, base_folder, tmp_path / "z", workers=1, only=[1])
    assert not (tmp_path / "z" / "zoo.json").exists(), "an unfinished zoo must not look finished"
    with pytest.raises(LolgenError, match=r"zoo\.json"):
        Zoo.open(tmp_path / "z")
    build(TINY, base_folder, tmp_path / "z", workers=1)
    assert contents(tmp_path / "z") == contents(whole)


def test_another_seed_gives_other_bytes(whole, base_folder, tmp_path):
    other = Plan(**{**TINY.__dict__, "seed": 1})
    build(other, base_folder, tmp_path / "z", workers=1, only=[0])
    name = "shard-0000.safetensors"
    assert (tmp_path / "z" / name).read_bytes() != (whole / name).read_bytes()


def test_a_killed_process_resumes(whole, base_folder, tmp_path):
    code = (
        "from tests.zoo.test_builder import TINY; from lolgen.zoo.builder import build; import sys;"
        "build(TINY, sys.argv[1], sys.argv[2], workers=1)"
    )
    command = [sys.executable, "-W", "ignore", "-c", code, str(base_folder), str(tmp_path / "z")]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while (
        not list((tmp_path / "z").glob("shard-*")) and process.poll() is None and time.monotonic() < deadline
    ):
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list((tmp_path / "z").glob("shard-*")), "the build did not get to its first bank"
    build(TINY, base_folder, tmp_path / "z", workers=1)
    left = {k: v for k, v in contents(tmp_path / "z").items() if not k.endswith(".tmp")}
    assert left == contents(whole)


def test_another_plan_is_refused_and_nothing_is_lost(whole, base_folder):
    before = contents(whole)
    with pytest.raises(LolgenError, match="another plan"):
        build(Plan(**{**TINY.__dict__, "seed": 7}), base_folder, whole, workers=1)
    assert contents(whole) == before


def test_index_and_factors(whole):
    zoo = Zoo.open(whole)
    assert len(zoo) == 6 and {r["split"] for r in zoo} == {"train", "validation", "test"}
    for row in zoo:
        a = row["identity"]["attributes"]
        assert pictures.split_of(a) == row["split"] and pictures.labels(a) == row["labels"]
    batch = zoo.load()
    assert batch.rank == 4 and sorted(batch.ranks[:, 0].tolist()) == [1, 4, 4, 4, 4, 4]
    assert all(torch.isfinite(g.U).all() and g.U.abs().sum() > 0 for g in batch.groups)
    ids = [r["id"] for r in zoo if r["rank"] == 1]
    assert ids == ["test-0000"], "further ranks are of the same identities"


def test_splits_share_no_combination_of_attributes():
    rows = [r for bank in Plan().banks() for r in bank]
    seen = {s: {tuple(r["labels"]) for r in rows if r["split"] == s} for s in ("train", "validation", "test")}
    assert not seen["train"] & seen["test"] and not seen["train"] & seen["validation"]
    assert not seen["validation"] & seen["test"]
    assert sum(r["rank"] == 4 for r in rows) == 2000
    for rank in (1, 2, 8, 16, 32):
        assert sum(r["rank"] == rank for r in rows) >= 100


def test_the_shipped_zoo_is_the_plan():
    from lolgen.paths import zoos_dir

    zoo = Zoo.open(zoos_dir() / "faces")
    plan = [(r["id"], r["rank"]) for bank in Plan().banks() for r in bank]
    assert [(r["id"], r["rank"]) for r in zoo] == plan
    assert Plan().to_json() == zoo.info["plan"]
