"""The index: duplicates across gauge, rank, precision and format; incremental, resumable, honest about bad files."""

from __future__ import annotations

import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lolgen import io, metrics
from lolgen.cli import main
from lolgen.errors import LolgenError
from lolgen.lora import Factors, LoRA
from lolgen.tools.search import build as building
from lolgen.tools.search.build import build
from lolgen.tools.search.query import duplicates, like, open_index
from lolgen.tools.search.store import FOLDER, ROWS, VECTORS, Store

from .files import SPEC, copies, lora, off_group

COPIES = {
    "kohya.safetensors", "peft", "diffusers.safetensors", "gauge.safetensors", "rank.safetensors",
    "half.safetensors", "bfloat.safetensors",
}  # fmt: skip


def near(x: LoRA, by: float, seed: int) -> LoRA:
    """x with each B moved by a share of another LoRA's."""
    other = lora(seed)
    return LoRA(SPEC, {n: Factors(x[n].B + by * other[n].B, x[n].A) for n in x.names})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Seven copies of one LoRA, its off-group twin, a near one, six strangers, and two bad files."""
    x = lora(0)
    at = tmp_path / "adapters"
    copies(x, at)
    io.save(off_group(x), at / "twin.safetensors", "kohya")
    io.save(near(x, 0.3, 50), at / "near.safetensors", "diffusers")
    for i in range(6):
        io.save(lora(100 + i, 1 + i), at / "strangers" / f"{i}.safetensors", "kohya")
    (at / "bad.safetensors").write_bytes(b"nonsense")
    (at / "old.pt").write_bytes(b"\x80\x04K\x01.")
    return at


def test_duplicates_are_found_and_only_they(folder: Path) -> None:
    done = build(folder)
    assert (done.total, done.indexed, done.unchanged, done.removed) == (17, 17, 0, 0)
    assert set(done.bad) == {"bad.safetensors", "old.pt"} and "a pickle" in done.bad["old.pt"]
    (group,) = duplicates(Store(folder / FOLDER))
    assert set(group["files"]) == COPIES
    assert all(p["cosine"] >= 0.9999 and abs(p["strength"] - 1) < 0.01 for p in group["pairs"])
    assert {f.name for f in (folder / FOLDER).iterdir()} == {ROWS, VECTORS}


def test_like_ranks_by_the_exact_cosine(folder: Path, tmp_path: Path) -> None:
    build(folder)
    store = Store(folder / FOLDER)
    query = io.save(near(lora(0), 0.1, 60), tmp_path / "query.safetensors", "kohya")
    hits = like(store, query, 9)
    assert {h.path for h in hits[:7]} == COPIES and hits[7].path == "near.safetensors"
    for h in hits:
        wanted = metrics.cosine(io.load(query), io.load(folder / h.path))
        assert h.cosine == pytest.approx(wanted, abs=1e-5) and abs(h.estimate - wanted) < 0.3
    assert [h.path for h in like(store, folder / "near.safetensors", 20)].count("near.safetensors") == 0
    assert len(like(store, query, 2)) == 2


def test_only_what_changed_is_read_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build(folder)
    read: list[str] = []
    real = building.read
    monkeypatch.setattr(building, "read", lambda place, *rest: read.append(place.name) or real(place, *rest))
    assert build(folder).unchanged == 17 and not read
    os.utime(folder / "near.safetensors")  # another time, the same bytes
    assert build(folder).unchanged == 17 and not read
    io.save(lora(200), folder / "near.safetensors", "diffusers")
    config = folder / "peft" / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 4', '"lora_alpha": 8'))
    shutil.rmtree(folder / "strangers")
    (folder / "bad.safetensors").unlink()
    done = build(folder)
    assert sorted(read) == ["near.safetensors", "peft"]
    assert (done.total, done.indexed, done.removed, set(done.bad)) == (10, 2, 7, {"old.pt"})
    store = Store(folder / FOLDER)
    hits = {h.path: h for h in like(store, folder / "kohya.safetensors", 20)}
    assert not any("strangers" in p for p in hits)
    assert abs(hits["near.safetensors"].cosine) < 0.5
    assert hits["peft"].cosine > 0.9999 and hits["peft"].strength == pytest.approx(2, rel=1e-4)


def test_a_moved_index_still_finds_its_files(folder: Path, tmp_path: Path) -> None:
    build(folder)
    moved = folder.rename(tmp_path / "elsewhere")
    assert len(like(open_index(None, moved / "kohya.safetensors"), moved / "kohya.safetensors", 5)) == 5
    other = tmp_path / "index"
    build(moved, other)
    assert set(duplicates(Store(other))[0]["files"]) == COPIES
    (moved / "half.safetensors").unlink()  # gone since: passed over
    assert "half.safetensors" not in {h.path for h in like(Store(other), moved / "kohya.safetensors", 20)}


def test_vectors_that_do_not_belong_to_the_rows_are_made_anew(folder: Path) -> None:
    build(folder)
    vectors = folder / FOLDER / VECTORS
    for damage in (b"nonsense", vectors.read_bytes()[:-100], None):
        vectors.write_bytes(damage) if damage is not None else vectors.unlink()
        assert set(duplicates(Store(folder / FOLDER))[0]["files"]) == COPIES
    build(folder)
    assert vectors.is_file()


def test_more_copies_than_neighbours_asked_for(tmp_path: Path) -> None:
    x = lora(0)
    for i in range(45):
        io.save(x, tmp_path / f"{i}.safetensors", "kohya")
    io.save(lora(1), tmp_path / "other.safetensors", "kohya")
    build(tmp_path)
    (group,) = duplicates(Store(tmp_path / FOLDER))
    assert len(group["files"]) == 45 and all(p["same_bytes"] for p in group["pairs"])


def test_zero_loras_and_empty_folders(tmp_path: Path) -> None:
    build(tmp_path)
    store = Store(tmp_path / FOLDER)
    assert duplicates(store) == []
    x = lora(0)
    query = io.save(x, tmp_path / "out" / "x.safetensors", "kohya")
    assert like(store, query) == []
    nothing = x.replace({n: Factors(f.B * 0, f.A) for n, f in x.factors.items()})
    zero = io.save(nothing, tmp_path / "z.safetensors", "kohya")
    done = build(tmp_path)
    assert done.total == 2 and not done.bad
    assert like(Store(tmp_path / FOLDER), query) == []
    with pytest.raises(LolgenError, match="nothing is like it"):
        like(Store(tmp_path / FOLDER), zero)


def test_what_is_wrong_with_an_index_is_said(tmp_path: Path) -> None:
    with pytest.raises(LolgenError, match="no such folder"):
        build(tmp_path / "nothing")
    with pytest.raises(LolgenError, match="lolgen search index"):
        Store(tmp_path / "nothing")
    with pytest.raises(LolgenError, match="here or above"):
        open_index(None, tmp_path)
    build(tmp_path)
    file = tmp_path / FOLDER / ROWS
    with sqlite3.connect(file) as db:
        db.execute("UPDATE meta SET value = '0' WHERE key = 'format'")
    db.close()
    with pytest.raises(LolgenError, match="another version"):
        Store(tmp_path / FOLDER)
    file.write_bytes(b"not sqlite at all, but long enough to look at" * 10)
    with pytest.raises(LolgenError, match="damaged"):
        Store(tmp_path / FOLDER)
    file.unlink()
    build(tmp_path)
    store = Store(tmp_path / FOLDER)
    for act in (lambda: like(store, tmp_path, 0), lambda: duplicates(store, 0.1)):
        with pytest.raises(LolgenError, match="wanted"):
            act()


def test_the_command(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(*argv: object) -> tuple[int, str, str]:
        code = main(["search", *map(str, argv)])
        out, err = capsys.readouterr()
        return code, out, err

    code, out, err = run("index", folder)
    assert code == 0 and "17 adapters: 17 read" in out and "bad.safetensors: found" in err
    code, out, _ = run("index", folder, "--json")
    assert json.loads(out)["unchanged"] == 17
    code, out, _ = run("like", folder / "kohya.safetensors", "-n", "3", "--json")
    assert code == 0 and [h["cosine"] > 0.999 for h in json.loads(out)] == [True] * 3
    code, out, _ = run("like", folder / "kohya.safetensors", "--index", folder / FOLDER)
    assert code == 0 and out.count("\n") == 10
    monkeypatch.chdir(folder)
    code, out, _ = run("duplicates")
    assert code == 0 and set(out.split()) == COPIES
    code, out, _ = run("duplicates", "--json", "--threshold", "0.99")
    assert set(json.loads(out)[0]["files"]) == COPIES
    code, out, err = run("like", tmp_path / "none", "--index", folder / FOLDER)
    assert code == 2 and err.startswith("lolgen: ") and err.count("\n") == 1


def _many(folder: Path, n: int) -> None:
    for i in range(n):
        io.save(
            lora(1000 + i, 1 + i % 4),
            folder / f"{i % 10}" / f"{i}.safetensors",
            ("kohya", "diffusers")[i % 2],
        )


def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path) -> None:
    _many(tmp_path, 120)
    code = (
        "import sys, time; from lolgen.tools.search import build as b; real = b.read\n"
        "def slow(*a):\n    time.sleep(0.02); return real(*a)\n"
        "b.read = slow; b.build(sys.argv[1])"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stderr=subprocess.DEVNULL)
    file = tmp_path / FOLDER / ROWS
    for _ in range(3000):
        if file.is_file() and _committed(file) >= building.SAVE_EVERY:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    before = _committed(file)
    assert building.SAVE_EVERY <= before < 120 and not (tmp_path / FOLDER / VECTORS).exists()
    done = build(tmp_path)
    assert done.unchanged >= before and done.indexed == 120 - done.unchanged and done.total == 120
    hits = like(Store(tmp_path / FOLDER), tmp_path / "7" / "97.safetensors", 3)
    assert len(hits) == 3 and max(h.cosine for h in hits) < 0.9


def _committed(file: Path) -> int:
    db = sqlite3.connect(f"file:{file}?mode=ro", uri=True)
    try:
        return int(db.execute("SELECT COUNT(*) FROM adapters").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
    finally:
        db.close()


@pytest.mark.slow
def test_a_thousand_loras_and_a_copy_of_every_tenth(tmp_path: Path) -> None:
    """Every copy is found by its exact cosine, and nothing else is."""
    _many(tmp_path, 1000)
    forms = ("kohya", "diffusers", "peft")
    for i in range(0, 1000, 10):
        x = io.load(tmp_path / "0" / f"{i}.safetensors")
        name = f"copy{i}" + ("" if forms[i // 10 % 3] == "peft" else ".safetensors")
        io.save(x, tmp_path / "copies" / name, forms[i // 10 % 3], dtype=torch.float16)
    done = build(tmp_path)
    assert done.indexed == 1100 and not done.bad
    found = duplicates(Store(tmp_path / FOLDER))
    assert len(found) == 100
    for group in found:
        a, b = sorted(group["files"])
        assert Path(b).name.split(".")[0] == f"copy{Path(a).stem}"
