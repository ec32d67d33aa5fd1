"""edit, sample, mix and invert from files to files: formats, reports, pictures, one-line errors."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import lolgen
from lolgen import io, metrics, pictures, pipeline, preview
from lolgen.cli import main
from lolgen.lora import LoRA
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.probe import Probe
from lolgen.testing import random_lora, regauge
from lolgen.zoo.zoo import Zoo


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def real() -> LoRA:
    """A strong validation LoRA without glasses."""
    zoo = Zoo.open(zoos_dir() / "faces").split("validation")
    row = next(
        i
        for i, r in enumerate(zoo)
        if r["identity"]["attributes"]["glasses"] == "no" and r["recipe"]["lr"] * r["recipe"]["steps"] > 0.3
    )
    return Zoo(zoo.folder, zoo.info, zoo.rows[row : row + 1]).load().unstack()[0]


def place(folder: Path, format: str, name: str = "a") -> Path:
    return folder / (name if format == "peft" else f"{name}.safetensors")


@pytest.mark.parametrize("format", io.FORMATS)
def test_an_edit_comes_out_as_it_came_in_and_the_same_whatever_that_is(capsys, tmp_path, real, format):
    source = io.save(real, place(tmp_path, format), format)
    code, out, _ = run(
        capsys, "edit", str(source), "--set", "glasses=yes", "-o", str(place(tmp_path, format, "b")), "--json"
    )
    assert code == 0
    report = json.loads(out)
    assert report["format"] == format == io.detect(report["adapter"]) and report["rank"] == 4
    assert report["attributes"]["glasses"]["before"]["value"] == "no"
    assert report["attributes"]["glasses"]["after"]["value"] == "yes"
    assert set(report) >= {
        "moved_unasked",
        "moved",
        "warnings",
        "seconds",
        "also_set",
        "prompt",
        "strength",
        "keep",
    }
    assert report["warnings"] == [] and 0 < report["moved"] < 2
    spec = real.spec
    found = io.load(report["adapter"], modules=spec)
    direct = lolgen.edit(real, {"glasses": "yes"}, tmp_path / "c")
    assert metrics.relative_distance(io.load(direct["adapter"], modules=spec), found) < 1e-4


def test_a_regauged_file_gives_the_same_edit_an_other_file_another(tmp_path, real):
    moved, _ = regauge(real, condition=30.0, generator=torch.Generator().manual_seed(0))
    off, _ = regauge(real, condition=30.0, off_group=True, generator=torch.Generator().manual_seed(0))
    made = []
    for name, lora in (("a", real), ("b", moved), ("c", off)):
        source = io.save(lora, tmp_path / f"{name}.safetensors", "kohya")
        report = pipeline.edit(source, {"beard": "yes"}, tmp_path / f"{name}2.safetensors")
        made.append(io.load(report["adapter"], modules=real.spec))
    assert metrics.relative_distance(made[0], made[1]) < 1e-4
    assert metrics.relative_distance(made[0], made[2]) > 0.05


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_strength_0_is_the_same_adapter_in_its_own_precision(capsys, tmp_path, real, dtype):
    source = io.save(real, tmp_path / "a.safetensors", "diffusers", dtype=dtype)
    out = str(tmp_path / "b.safetensors")
    code, _, _ = run(capsys, "edit", str(source), "--set", "top=hat", "--strength", "0", "-o", out)
    before, after = io.load(source, modules=real.spec), io.load(out, modules=real.spec)
    assert code == 0 and after.dtype == dtype
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}[dtype]
    assert metrics.relative_distance(before, after) < tolerance


def test_the_pictures_change_as_asked(capsys, tmp_path, real):
    """Through stock diffusers, read by the probe."""
    source = io.save(real, tmp_path / "a", "peft")
    code, out, _ = run(
        capsys, "edit", str(source), "--set", "glasses=yes", "-o", str(tmp_path / "b"),
        "--preview", str(tmp_path / "p.png"), "--json",
    )  # fmt: skip
    report = json.loads(out)
    assert code == 0 and report["modules_hit"] == 7
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    probe = Probe.load(checkpoints_dir() / "probe.safetensors")
    pipe = preview.load_pipeline(checkpoints_dir() / "tiny-sd")
    read = []
    for adapter in (source, report["adapter"]):
        preview.attach(pipe, adapter)
        read.append(probe.read(preview.draw(pipe, [report["prompt"]], range(6)) * 2 - 1))
        pipe.unload_lora_weights()
    q = list(pictures.ATTRIBUTES).index("glasses")
    assert (read[0][:, q] == 0).sum() >= 5 and (read[1][:, q] == 1).sum() >= 5
    rest = [k for k in range(6) if k != q]
    assert (read[0][:, rest] == read[1][:, rest]).float().mean() >= 0.85


def test_metadata_and_extras_survive_an_edit(tmp_path, real):
    carrying = LoRA(real.spec, real.factors, {"ss_note": "mine"}, {"base_model.model.head": torch.ones(3)})
    source = io.save(carrying, tmp_path / "a", "peft")
    report = pipeline.edit(source, {"skin": "dark"}, tmp_path / "b")
    found = io.load(report["adapter"], modules=real.spec)
    assert found.metadata["ss_note"] == "mine" and found.metadata["lolgen.request"] == "skin=dark"
    assert list(found.extras) and "no factors" in " ".join(report["warnings"])


def test_a_file_without_some_modules_is_edited_all_the_same(tmp_path, real):
    kept = real.names[:5]
    fewer = LoRA(type(real.spec)(real.spec.modules[:5]), {n: real.factors[n] for n in kept})
    report = pipeline.edit(io.save(fewer, tmp_path / "a", "peft"), {"glasses": "yes"}, tmp_path / "b")
    assert len(io.load(report["adapter"], modules=real.spec)) == 7


def test_unlike_the_zoo_is_a_warning(tmp_path, real):
    odd = random_lora(real.spec, 4, generator=torch.Generator().manual_seed(0))
    report = pipeline.edit(io.save(odd, tmp_path / "a", "peft"), {"glasses": "yes"}, tmp_path / "b")
    assert any("unlike the zoo" in w for w in report["warnings"])


def test_sample_is_generate_without_a_request(capsys, tmp_path):
    code, _, _ = run(capsys, "sample", "--seed", "3", "-o", str(tmp_path / "a"))
    assert code == 0
    run(capsys, "generate", "--seed", "3", "-o", str(tmp_path / "b"))
    run(capsys, "sample", "--seed", "4", "-o", str(tmp_path / "c"))
    data = [(tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "abc"]
    assert data[0] == data[1] != data[2]


def test_mix_walks_from_one_to_the_other(capsys, tmp_path):
    for name, values in (("a", "bald"), ("b", "long")):
        run(capsys, "generate", "--set", f"top={values}", "--set", "skin=dark", "-o", str(tmp_path / name))
    tops = []
    for t in ("0", "0.5", "1"):
        code, out, _ = run(
            capsys, "mix", str(tmp_path / "a"), str(tmp_path / "b"), "--t", t, "-o",
            str(tmp_path / "m.safetensors"), "--format", "kohya", "--json",
        )  # fmt: skip
        report = json.loads(out)
        assert code == 0 and report["format"] == io.detect(report["adapter"]) == "kohya"
        assert report["attributes"]["skin"]["value"] == "dark"
        tops.append(report["attributes"]["top"]["value"])
    assert tops[0] == "bald" and tops[2] == "long"


def test_invert_reads_a_picture(capsys, tmp_path):
    from PIL import Image

    person = pictures.Identity({"top": "long", "hair_color": "red", "glasses": "yes", "beard": "no",
                                "skin": "dark", "clothes": "yellow"})  # fmt: skip
    pixels = pictures.draw_portrait(person, np.random.default_rng(0), 128)
    image = Image.fromarray(pixels.transpose(1, 2, 0))
    image.save(tmp_path / "p.png")
    code, out, _ = run(capsys, "invert", str(tmp_path / "p.png"), "-o", str(tmp_path / "a"), "--json")
    report = json.loads(out)
    assert code == 0 and report["warnings"] == []
    assert {n: a["value"] for n, a in report["attributes"].items()} == person.attributes
    read = pipeline.predict([report["adapter"]])[0]["attributes"]
    assert {n: a["value"] for n, a in read.items()} == person.attributes
    # What is no portrait is said to be none.
    Image.fromarray(pictures.draw_style(1, np.random.default_rng(0)).transpose(1, 2, 0)).save(
        tmp_path / "s.png"
    )
    _, out, _ = run(capsys, "invert", str(tmp_path / "s.png"), "-o", str(tmp_path / "b"), "--json")
    assert "does not look like" in " ".join(json.loads(out)["warnings"])


@pytest.mark.parametrize("name", ["text.png", "empty.png", "missing.png", "half.png", "folder.png"])
def test_what_is_no_picture_is_one_line(capsys, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    from PIL import Image

    Path("text.png").write_text("hello")
    Path("empty.png").touch()
    Path("folder.png").mkdir()
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)).save("whole.png")
    Path("half.png").write_bytes(Path("whole.png").read_bytes()[:600])
    code, out, err = run(capsys, "invert", name, "-o", "x")
    assert code == 2 and out == "" and err.count("\n") == 1 and name in err and not Path("x").exists()


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["edit", "a", "-o", "x"], ["--set"]),
        (["edit", "a", "--set", "nose=big", "-o", "x"], ["nose", "glasses"]),
        (["edit", "a", "--set", "top=wig", "-o", "x"], ["wig", "bald"]),
        (["edit", "a", "--set", "top=hat", "--set", "top=bald", "-o", "x"], ["both"]),
        (["edit", "a", "--set", "top=hat", "--strength", "9", "-o", "x"], ["strength", "0 to 4"]),
        (["edit", "a", "--set", "top=hat", "--strength", "nan", "-o", "x"], ["strength"]),
        (["edit", "a", "--set", "top=hat", "--rank", "65", "-o", "x"], ["rank", "1 to 64"]),
        (["edit", "none", "--set", "top=hat", "-o", "x"], ["none"]),
        (["edit", "llm", "--set", "top=hat", "-o", "x"], ["q_proj"]),
        (["edit", "pickle.bin", "--set", "top=hat", "-o", "x"], ["pickle"]),
        (["mix", "a", "llm", "-o", "x"], ["q_proj"]),
        (["mix", "a", "a", "--t", "1.5", "-o", "x"], ["0 to 1"]),
        (["invert", "a", "-o", "x"], ["a"]),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(capsys, tmp_path, monkeypatch, real, argv, words):
    monkeypatch.chdir(tmp_path)
    io.save(real, "a", "peft")
    from lolgen.lora import ModuleSpec, Spec

    io.save(random_lora(Spec((ModuleSpec("model.layers.0.self_attn.q_proj", 8, 8),)), 2), "llm", "peft")
    Path("pickle.bin").write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("lolgen: ")
    assert all(w in err for w in words)
    assert not Path("x").exists() and not Path("pwned").exists()


def test_nan_in_a_file_is_found_before_anything_is_written(tmp_path, real):
    from safetensors.torch import load_file, save_file

    io.save(real, tmp_path / "a", "peft")
    tensors = load_file(tmp_path / "a" / "adapter_model.safetensors")
    key = next(iter(tensors))
    tensors[key][0, 0] = float("nan")
    save_file(tensors, tmp_path / "a" / "adapter_model.safetensors")
    assert main(["edit", str(tmp_path / "a"), "--set", "top=hat", "-o", str(tmp_path / "x")]) == 2
    assert not (tmp_path / "x").exists()
