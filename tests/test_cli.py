"""The command: files that load as they are, JSON that parses, errors in one line with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lolgen import gl, io
from lolgen.cli import main
from lolgen.paths import checkpoints_dir
from lolgen.testing import regauge


def run(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    code = main(list(argv))
    out, err = capsys.readouterr()
    return code, out, err


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "red"
    assert (
        main(["generate", "--set", "hair_color=red", "--set", "glasses=yes", "--seed", "0", "-o", str(out)])
        == 0
    )
    return out


def test_generate_predict_and_preview(capsys, tmp_path):
    code, out, _ = run(
        capsys, "generate", "--set", "hair_color=red", "--set", "glasses=yes", "--seed", "0", "--rank", "4",
        "--format", "peft", "-o", str(tmp_path / "out"), "--preview", str(tmp_path / "p.png"), "--json",
    )  # fmt: skip
    assert code == 0
    report = json.loads(out)
    assert report["modules_hit"] == report["modules"] == 7
    assert report["attributes"]["hair_color"] == "red" and report["attributes"]["glasses"] == "yes"
    assert (tmp_path / "p.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    code, out, _ = run(capsys, "predict", str(tmp_path / "out"), "--json")
    rows = json.loads(out)
    assert code == 0 and set(rows[0]["attributes"]) == {
        "top",
        "hair_color",
        "glasses",
        "beard",
        "skin",
        "clothes",
    }
    assert rows[0]["attributes"]["glasses"]["value"] == "yes"
    for attribute in rows[0]["attributes"].values():
        assert abs(sum(attribute["probabilities"].values()) - 1) < 2e-3


def test_the_peft_folder_loads_with_peft(made):
    from diffusers import UNet2DConditionModel
    from peft import PeftModel

    unet = UNet2DConditionModel.from_pretrained(
        checkpoints_dir() / "tiny-sd" / "unet", torch_dtype=torch.float32
    )
    x, t, states = torch.randn(1, 4, 8, 8), torch.tensor([500]), torch.randn(1, 20, 96)
    with torch.no_grad():
        before = unet(x, t, states).sample
        wrapped = PeftModel.from_pretrained(unet, str(made))
        after = wrapped(x, t, states).sample
    assert (before - after).norm() > 1e-2 * before.norm()


@pytest.mark.parametrize("rank", [1, 2, 4, 16, 64])
@pytest.mark.parametrize("format", ["peft", "diffusers", "kohya"])
def test_any_rank_and_format(capsys, tmp_path, rank, format):
    out = tmp_path / ("a" if format == "peft" else "a.safetensors")
    code, text, _ = run(
        capsys,
        "generate",
        "--set",
        "beard=yes",
        "--rank",
        str(rank),
        "--format",
        format,
        "-o",
        str(out),
        "--json",
    )
    assert code == 0
    lora = io.load(json.loads(text)["adapter"])
    assert {f.rank for f in lora.factors.values()} == {rank}


def test_the_same_seed_gives_the_same_file_another_seed_another(capsys, tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(capsys, "generate", "--set", "top=hat", "--seed", str(seed), "-o", str(tmp_path / name))
    read = {n: (tmp_path / n / "adapter_model.safetensors").read_bytes() for n in "abc"}
    assert read["a"] == read["b"] != read["c"]


def test_compare(capsys, made, tmp_path):
    lora = io.load(made)
    moved, _ = regauge(lora, generator=torch.Generator().manual_seed(0))
    io.save(moved, tmp_path / "moved", "peft")
    io.save(gl.scale(lora, 2.0), tmp_path / "twice", "peft")
    _, out, _ = run(capsys, "compare", str(made), str(tmp_path / "moved"), "--json")
    same = json.loads(out)
    assert same["cosine"] == pytest.approx(1, abs=1e-5) and same["relative_distance"] == pytest.approx(
        0, abs=1e-4
    )
    _, out, _ = run(capsys, "compare", str(made), str(tmp_path / "twice"), "--json")
    twice = json.loads(out)
    assert twice["cosine"] == pytest.approx(1, abs=1e-5) and twice["relative_distance"] == pytest.approx(
        1, abs=1e-4
    )


def test_predictions_do_not_depend_on_the_gauge(capsys, made, tmp_path):
    lora = io.load(made)
    moved, _ = regauge(lora, generator=torch.Generator().manual_seed(1))
    off, _ = regauge(lora, off_group=True, generator=torch.Generator().manual_seed(1))
    paths = []
    for name, x in (("moved", moved), ("off", off)):
        paths.append(str(io.save(x, tmp_path / name, "peft")))
    _, out, _ = run(capsys, "predict", str(made), *paths, "--json")
    first, second, third = (
        [p for a in row["attributes"].values() for p in a["probabilities"].values()]
        for row in json.loads(out)
    )
    assert first == pytest.approx(second, abs=2e-3)
    assert first != pytest.approx(third, abs=2e-2), "off the group the answer must change"


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["generate", "--set", "nose=big", "-o", "x"], ["nose", "glasses", "hair_color"]),
        (["generate", "--set", "glasses=maybe", "-o", "x"], ["maybe", "no, yes"]),
        (["generate", "--set", "glasses=yes", "--set", "glasses=no", "-o", "x"], ["both"]),
        (["generate", "--rank", "0", "-o", "x"], ["rank", "1 to 64"]),
        (["predict", "missing.safetensors"], ["missing.safetensors"]),
        (["compare", "missing", "missing"], ["missing"]),
    ],
)
def test_errors_are_one_line_and_nothing_is_written(capsys, tmp_path, monkeypatch, argv, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys, *argv)
    assert code == 2 and out == "" and err.count("\n") == 1 and err.startswith("lolgen: ")
    assert all(w in err for w in words)
    assert list(tmp_path.iterdir()) == []


def test_a_pickle_is_refused_unopened(capsys, tmp_path):
    path = tmp_path / "adapter.bin"
    path.write_bytes(b"\x80\x04cos\nsystem\n(S'touch pwned'\ntR.")
    code, _, err = run(capsys, "predict", str(path))
    assert code == 2 and "pickle" in err and not (tmp_path / "pwned").exists()


def test_an_adapter_of_another_base_is_named_as_such(capsys, tmp_path):
    from lolgen.lora import ModuleSpec, Spec
    from lolgen.testing import random_lora

    other = random_lora(Spec((ModuleSpec("model.layers.0.self_attn.q_proj", 8, 8),)), 2)
    io.save(other, tmp_path / "llm", "peft")
    code, _, err = run(capsys, "predict", str(tmp_path / "llm"))
    assert code == 2 and "q_proj" in err
