"""The report of a file, against what `lolgen.io.load` says of it; files that are none; many at once; the command."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from lolgen import io, metrics
from lolgen.cli import main
from lolgen.errors import FormatError
from lolgen.io import safetensors_file as stf
from lolgen.lora import Factors
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.tools.inspect import health
from lolgen.tools.inspect.report import inspect
from lolgen.tools.inspect.source import find, open_source
from lolgen.tools.inspect.summary import others, summary

from .files import SPEC, copies, lora, off_group


def run(capsys: pytest.CaptureFixture[str], *argv: object) -> tuple[int, str, str]:
    code = main(["inspect", *map(str, argv)])
    out, err = capsys.readouterr()
    return code, out, err


@pytest.mark.parametrize("form", ["kohya", "diffusers", "peft"])
def test_a_report_says_what_the_loader_says(form: str, tmp_path: Path) -> None:
    x = lora(1, 3, scale=0.7)
    path = io.save(x, tmp_path / ("x" if form == "peft" else "x.safetensors"), form)
    report = inspect(path, modules=True)
    assert (report["kind"], report["format"], report["loads"], report["reason"]) == (
        "adapter",
        form,
        True,
        None,
    )
    assert report["method"] == "LoRA" and report["variants"] == []
    assert report["modules"]["count"] == len(SPEC) and report["modules"]["ranks"] == {"3": len(SPEC)}
    assert report["modules"]["components"] == {"unet" if form != "peft" else "model": len(SPEC)}
    y = io.load(path)
    assert report["norm"] == pytest.approx(metrics.norm(y), rel=1e-6)
    for row in report["module_rows"]:
        f = y[row["name"]]
        assert (row["rank"], row["scale"]) == (f.rank, f.scale)
        assert row["alpha"] == pytest.approx(f.scale * f.rank)
        assert row["norm"] == pytest.approx(float(f.to(torch.float64).delta().norm()), rel=1e-6)
    assert report["parameters"] >= sum(f.A.numel() + f.B.numel() for f in y.factors.values())
    json.dumps(report, allow_nan=False)


def test_scales_come_from_alphas_and_configs(tmp_path: Path) -> None:
    """Mixed alphas, rsLoRA, patterns: what is reported is what `io.load` found, module by module."""
    tensors: dict[str, Tensor] = {}
    for i, alpha in enumerate((1.0, 4.0, None)):
        tensors[f"lora_unet_conv_{i}.lora_down.weight"] = torch.ones(4, 3)
        tensors[f"lora_unet_conv_{i}.lora_up.weight"] = torch.ones(5, 4)
        if alpha:
            tensors[f"lora_unet_conv_{i}.alpha"] = torch.tensor(alpha)
    save_file(tensors, tmp_path / "k.safetensors")
    report = inspect(tmp_path / "k.safetensors", modules=True)
    assert [r["scale"] for r in report["module_rows"]] == [0.25, 1.0, 1.0]
    assert report["scale"] == {"min": 0.25, "median": 1.0, "max": 1.0}
    save_file({f"base_model.model.a.{h}.weight": torch.ones(4, 4) for h in ("lora_A", "lora_B")},
              tmp_path / "adapter_model.safetensors")  # fmt: skip
    config = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "use_rslora": True}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    report = inspect(tmp_path, modules=True)
    assert report["module_rows"][0]["scale"] == 4.0 and any("rsLoRA" in v for v in report["variants"])


def loha() -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    at = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k"
    made = {}
    for i in "12":
        made[f"{at}.hada_w{i}_a"] = torch.randn(320, 4, generator=g)
        made[f"{at}.hada_w{i}_b"] = torch.randn(4, 768, generator=g)
    return made | {f"{at}.alpha": torch.tensor(4.0)}


def test_what_becomes_a_lora_is_looked_at_as_one(tmp_path: Path) -> None:
    """LoHa of rank 4 is a LoRA of rank 16, and the report says both."""
    save_file(loha(), tmp_path / "loha.safetensors", {"ss_network_module": "lycoris.kohya"})
    report = inspect(tmp_path / "loha.safetensors", modules=True)
    assert report["kind"] == "adapter" and report["loads"]
    assert report["method"].startswith("LoHa") and any("exactly" in v for v in report["variants"])
    assert report["family"]["name"] == "sd1" and report["modules"]["ranks"] == {"4": 1}
    tensors = loha()
    wanted = torch.ones(())
    for i in "12":
        parts = [next(t for k, t in tensors.items() if k.endswith(f"hada_w{i}_{h}")) for h in "ab"]
        wanted = wanted * (parts[0] @ parts[1])
    (row,) = report["module_rows"]
    assert row["rank"] == 16 and row["norm"] == pytest.approx(float(wanted.norm()), rel=1e-5)
    assert not report["targets"]["diffusers"]["loads"] and report["targets"]["comfyui"]["loads"]
    assert report["metadata"]["summary"]["network"] == "lycoris.kohya"


BIG = {f"lora_unet_x.hada_w{i}_a": torch.ones(600, 300) for i in "12"}
BIG |= {f"lora_unet_x.hada_w{i}_b": torch.ones(300, 600) for i in "12"}


@pytest.mark.parametrize("method, tensors", [
    ("OFT", {"lora_unet_conv_in.oft_blocks": torch.ones(2, 4, 4), "lora_unet_conv_in.alpha": torch.ones(())}),
    ("LoHa", BIG),
    ("(IA)^3", {"lora_unet_conv_in.weight": torch.ones(4), "lora_unet_conv_in.on_input": torch.ones(1)}),
    ("VeRA", {"base_model.vera_A": torch.ones(4, 4), "base_model.model.a.vera_lambda_b": torch.ones(4)}),
])  # fmt: skip
def test_what_is_no_lora_is_still_inspected(method: str, tensors: dict[str, Tensor], tmp_path: Path) -> None:
    """What has no factor pairs, and LoHa that as a LoRA would be hundreds of times as large."""
    save_file(tensors, tmp_path / "x.safetensors")
    report = inspect(tmp_path / "x.safetensors")
    assert report["kind"] == "adapter" and not report["loads"] and report["method"].startswith(method)
    assert any("not a LoRA" in v for v in report["variants"])
    assert report["reason"] and "x.safetensors:" not in report["reason"]
    assert report["health"]["not_finite"]["count"] == 0 and report["modules"]["count"] >= 1


@pytest.mark.parametrize("init", ["pissa", "olora", "corda"])
def test_a_file_that_does_not_give_delta_w_says_so(init: str, tmp_path: Path) -> None:
    path = io.save(lora(), tmp_path / "x", "peft")
    config = json.loads((path / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": init}))
    report = inspect(path)
    assert not report["loads"] and "changes the base model's weights" in report["reason"]
    assert any("changed the base's weights" in v for v in report["variants"])


def test_dora_loras_of_convolutions_and_embeddings(tmp_path: Path) -> None:
    at = "unet.conv_in"
    tensors = {
        f"{at}.lora_A.weight": torch.ones(2, 4, 3, 3), f"{at}.lora_B.weight": torch.ones(8, 2, 1, 1),
        f"{at}.lora_magnitude_vector": torch.ones(8),
    }  # fmt: skip
    save_file(tensors, tmp_path / "x.safetensors")
    found = " ".join(inspect(tmp_path / "x.safetensors")["variants"])
    assert "DoRA" in found and "LoCon" in found


def test_full_models_and_parts_of_them() -> None:
    whole = inspect(checkpoints_dir() / "tiny-sd")
    assert whole["kind"] == "full model" and whole["family"]["name"] == "tiny-sd"
    assert "full model" in whole["reason"] and not whole["loads"]
    assert inspect(checkpoints_dir() / "probe.safetensors")["kind"] == "full model"
    shard = inspect(zoos_dir() / "faces" / "shard-0000.safetensors")
    assert shard["kind"] == "unknown" and shard["family"]["name"] == "unknown"


def test_nan_zero_and_outliers_are_named(tmp_path: Path) -> None:
    x = lora()
    names = x.names
    factors = dict(x.factors)
    factors[names[0]] = Factors(factors[names[0]].B * 0, factors[names[0]].A)
    path = io.save(x.replace(factors), tmp_path / "zero.safetensors", "kohya")
    assert inspect(path)["health"]["zero_modules"] == {"count": 1, "first": [names[0]]}
    tensors = {k: t.clone() for k, t in stf.read_raw(path, stf.read_keys(path)).items()}
    bad = next(k for k in tensors if k.endswith("lora_up.weight"))
    tensors[bad][0, 0] = float("nan")
    tensors[bad][1, 1] = float("inf")
    save_file(tensors, tmp_path / "nan.safetensors")
    report = inspect(tmp_path / "nan.safetensors")
    assert not report["loads"]
    assert report["health"]["not_finite"] == {"count": 1, "first": [{"key": bad, "nan": 1, "inf": 1}]}


@pytest.mark.parametrize("times, found", [(1.5, 0), (30.0, 1), (1 / 30, 1)])
def test_an_outlier_is_far_from_its_shape_group(times: float, found: int) -> None:
    x = lora()
    group = [m.name for m in SPEC if m.shape == (16, 16)]
    norms = {n: 1.0 + 0.1 * (i % 3) for i, n in enumerate(x.names)}
    norms[group[2]] *= times
    seen = health.outliers(x, norms)
    assert len(seen) == found
    if found:
        assert seen[0].name == group[2] and seen[0].times == pytest.approx(norms[group[2]] / 1.1, rel=0.15)
    # Two modules of a shape are no group: nothing is far from anything.
    norms = dict.fromkeys(x.names, 1.0) | {next(m.name for m in SPEC if m.shape == (16, 12)): 1e6}
    assert health.outliers(x, norms) == []


def test_metadata_is_readable_and_harmless() -> None:
    tags = json.dumps({"10_me": {" hat": 3, "dog": 9}, "5_x": {"dog": 2, "n": "x"}})
    found = summary({
        "ss_base_model_version": "sd_v1", "ss_network_dim": "8", "ss_learning_rate": "None", "ss_steps": "100",
        "modelspec.title": "a\x1b[31m\nb" + "c" * 1000, "ss_training_started_at": "1700000000.5",
        "ss_tag_frequency": tags,
    })  # fmt: skip
    assert found["trained on"] == "sd_v1" and found["network rank"] == "8" and "learning rate" not in found
    assert found["trained at"] == "2023-11-14 22:13 UTC" and found["commonest tags"] == "dog (11), hat (3)"
    assert "\x1b" not in found["title"] and "\n" not in found["title"] and len(found["title"]) < 300
    assert others({"x": "yz", "ss_steps": "1"}) == {"x": 2}
    for text in ("{", "[1]", "null", "nan", "1e400", "-1e30", "[" * 100_000):
        assert summary({"ss_tag_frequency": text, "ss_training_started_at": text}) == {}


def test_what_is_found_below_a_folder(tmp_path: Path) -> None:
    io.save(lora(), tmp_path / "b" / "x.safetensors", "kohya")
    io.save(lora(), tmp_path / "a", "peft")
    (tmp_path / ".hidden").mkdir()
    for name in ("old.pt", "optimizer.bin", "README.md", ".hidden/x.safetensors"):
        (tmp_path / name).write_bytes(b"")
    os.symlink(tmp_path, tmp_path / "loop")
    assert [p.relative_to(tmp_path).as_posix() for p in find([tmp_path])] == [
        "a",
        "b/x.safetensors",
        "old.pt",
    ]
    assert find([tmp_path / "b", tmp_path / "b" / "x.safetensors"]) == [tmp_path / "b" / "x.safetensors"]


def test_the_command_on_one_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = io.save(lora(scale=0.5), tmp_path / "x.safetensors", "kohya")
    code, out, _ = run(capsys, path, "--modules")
    assert code == 0 and out.startswith(str(path))
    for words in (
        "LoRA for",
        "kohya format",
        "8 modules, rank 4",
        "90 % of the energy",
        "ComfyUI: takes it as it is",
    ):
        assert words in out
    assert out.count("attn1.to_q") == 1
    code, out, _ = run(capsys, path, "--json")
    assert code == 0 and out.count("\n") == 1 and json.loads(out)["modules"]["count"] == 8


def test_the_command_on_one_bad_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.pt").write_bytes(pickle.dumps({"a": 1}))
    for place in (tmp_path / "x.pt", tmp_path / "nothing"):
        code, out, err = run(capsys, place)
        assert code == 2 and not out and err.startswith("lolgen: ") and err.count("\n") == 1
    (tmp_path / "empty").mkdir()
    code, _, err = run(capsys, tmp_path / "empty")
    assert code == 2 and "without adapters" in err or "adapter_model" in err


def test_many_files_bad_ones_among_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    x = lora(2)
    copies(x, tmp_path)
    io.save(off_group(x), tmp_path / "twin.safetensors", "kohya")
    io.save(lora(77), tmp_path / "other.safetensors", "kohya")
    (tmp_path / "bad.safetensors").write_bytes(b"no")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps(1))
    code, out, _ = run(capsys, tmp_path, tmp_path / "missing", "--json")
    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    errors = {Path(r["path"]).name: r["error"] for r in rows if "error" in r}
    assert set(errors) == {"bad.safetensors", "pickle.pt", "missing"} and "a pickle" in errors["pickle.pt"]
    relatives = rows[-1]
    assert relatives["kind"] == "relatives" and relatives["compared"] == 9
    (group,) = relatives["duplicates"]
    assert {Path(p).name for p in group} == {
        "kohya.safetensors", "peft", "diffusers.safetensors", "gauge.safetensors", "rank.safetensors",
        "half.safetensors", "bfloat.safetensors",
    }  # fmt: skip
    code, out, _ = run(capsys, tmp_path)
    assert code == 0 and "the same delta W" in out and "bad.safetensors: found" in out
    code, out, err = run(capsys, tmp_path / "bad.safetensors", tmp_path / "pickle.pt")
    assert code == 2 and err == "lolgen: no file could be read\n" and out.count("found") == 2


def test_intruders_in_the_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lolgen import pipeline

    pipeline.generate({"glasses": "yes"}, tmp_path / "made", seed=1)
    base = checkpoints_dir() / "tiny-sd"
    code, out, _ = run(capsys, tmp_path / "made", "--base", base, "--threshold", "0.9", "--k", "3", "--json")
    found = json.loads(out)["intruders"]
    assert code == 0 and (found["k"], found["threshold"], found["modules"]) == (3, 0.9, 7)
    for wrong in (("--threshold", "2"), ("--k", "0")):
        code, _, err = run(capsys, tmp_path / "made", "--base", base, *wrong)
        assert code == 2 and wrong[0] in err
    code, _, err = run(capsys, tmp_path / "made", "--near", "0")
    assert code == 2 and "--near" in err


def test_no_heavy_package_is_imported(tmp_path: Path) -> None:
    path = io.save(lora(), tmp_path / "x.safetensors", "kohya")
    code = (
        "import sys; from lolgen.cli import main; main(['inspect', sys.argv[1]]);"
        "print(*(m for m in ('diffusers', 'transformers', 'peft', 'usearch', 'scipy') if m in sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == ""
    code = "import sys; from lolgen.cli import build_parser; build_parser(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_a_pickle_is_refused_unopened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "boom",))

    for name in ("x.safetensors", "x.bin", "adapter_model.bin"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
        with pytest.raises(FormatError, match="pickle"):
            open_source(tmp_path / name)
    assert not (tmp_path / "boom").exists()


def test_numbers_too_large_for_norms_are_said_and_still_json(tmp_path):
    from lolgen.lora import ModuleSpec, Spec
    from lolgen.testing import random_lora
    from lolgen.tools.inspect.text import page

    x = random_lora(Spec((ModuleSpec("unet.mid_block.attentions.0.proj_in", 6, 5),)), 2, dtype=torch.float64)
    huge = x.replace({n: Factors(f.B * 1e160, f.A * 1e160) for n, f in x.factors.items()})
    report = inspect(io.save(huge, tmp_path / "x.safetensors", "diffusers"), modules=True)
    json.dumps(report, allow_nan=False)
    assert report["health"]["too_large"]["count"] == 1 and "norm" not in report
    assert "overflow" in "\n".join(page(report))
    plain = inspect(io.save(x, tmp_path / "y.safetensors", "diffusers"))
    assert "too_large" not in plain["health"] and plain["norm"] > 0
