"""`resize`: files in and out, optimal errors, no gauge."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from lolgen import gl, io
from lolgen.errors import FormatError, LolgenError
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec
from lolgen.testing import assert_invariant
from lolgen.tools import files
from lolgen.tools.ranks import Target
from lolgen.tools.resize import resize, resized
from tools.dense import EVERY_KIND, best, delta, draw, given, lora_of, relative

UNET = Spec(
    (
        ModuleSpec("unet.conv_in", 8, 4, (3, 3), "conv"),
        ModuleSpec("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k", 12, 10),
        ModuleSpec("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 12, 10),
    )
)
TARGETS = [
    Target(rank=2),
    Target(rank=7),
    Target(energy=0.9),
    Target(error=0.3),
    Target(error=0.3, per="overall"),
    Target(rank=2, per="overall"),
    Target(rank=2, error=0.01),
]


@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_every_module_is_the_dense_optimum_of_its_rank(target: Target) -> None:
    lora = draw(zero=("attn.to_v",))
    made, report = resized(lora, target)
    lost = whole = 0.0
    for row in report["modules"]:
        name = row["name"]
        W, found = delta(lora, name), made[name].factors
        assert found.rank == row["rank"] and row["rank_before"] == lora[name].rank
        optimum = best(W, found.rank)
        assert float((found.delta() - optimum).norm()) <= 1e-10 * max(1.0, float(W.norm()))
        assert row["error"] == pytest.approx(relative(optimum, W) if W.any() else 0, abs=1e-8)
        assert row["norm"] == pytest.approx(float(W.norm()))
        lost, whole = lost + float((W - optimum).square().sum()), whole + float(W.square().sum())
    assert report["error"] == pytest.approx((lost / whole) ** 0.5, abs=1e-8)
    if target.per == "overall" and target.error:
        assert report["error"] <= target.error


@pytest.mark.parametrize("target", TARGETS, ids=repr)
def test_no_gauge_changes_the_result(target: Target, dtype: torch.dtype) -> None:
    lora = draw(dtype=dtype)

    def run(x: LoRA) -> tuple[LoRA, list[float]]:
        made, report = resized(x, target, "float64")
        return lora_of(made, x), [report["error"], *(r["norm"] for r in report["modules"])]

    assert_invariant(run, lora)
    with pytest.raises(AssertionError):
        assert_invariant(run, lora, off_group=True)


@pytest.mark.parametrize("target", [{"rank": 2}, {"rank": 7}, {"energy": 0.8}, {"error": 0.2, "rank": 3}])
def test_it_agrees_with_the_algebra_of_one_module(target: dict[str, float]) -> None:
    lora = draw()
    made, _ = resized(lora, Target(**target))  # type: ignore[arg-type]
    wanted = gl.resize(lora, **target)  # type: ignore[arg-type]
    for name in lora.names:
        assert made[name].factors.rank == wanted[name].rank
        assert relative(made[name].factors.delta(), delta(wanted, name)) < 1e-10


def test_a_rank_above_adds_zero_columns() -> None:
    lora = draw()
    made, report = resized(lora, Target(rank=8))
    for name in lora.names:
        assert made[name].factors.rank == 8
        assert relative(made[name].factors.delta(), delta(lora, name)) < 1e-12
    assert report["error"] == 0


def test_sizes() -> None:
    lora = draw(UNET, 4, dtype=torch.float32)
    _, report = resized(lora, Target(rank=1), "float16")
    assert report["before"] == {
        "parameters": 4 * (8 + 36 + 22 * 2),
        "bytes": 16 * (8 + 36 + 22 * 2),
        "ranks": [4, 4],
    }
    assert report["after"] == {
        "parameters": 8 + 36 + 22 * 2,
        "bytes": 2 * (8 + 36 + 22 * 2),
        "ranks": [1, 1],
    }


@pytest.mark.parametrize("format", ["peft", "diffusers", "kohya"])
@pytest.mark.parametrize("to", ["same", "peft", "diffusers", "kohya"])
def test_formats(format: str, to: str, tmp_path: Path) -> None:
    lora = draw(UNET, 4, dtype=torch.float32)
    at = {"peft": "peft", "diffusers": "d.safetensors", "kohya": "k.safetensors"}
    source = io.save(lora, tmp_path / at[format], format)
    wanted = format if to == "same" else to
    out = tmp_path / f"new-{at[wanted]}"
    report = resize(source, rank=2, out=out, format=to)
    assert report["format"] == wanted and report["output"] == str(out)
    assert io.detect(out) == wanted
    found = io.load(out)
    for name in lora.names:
        assert relative(delta(found, name), best(delta(lora, name), 2)) < 1e-6


def test_header_and_extras_stay_and_the_recipe_is_added(tmp_path: Path) -> None:
    lora = draw(UNET, 4, dtype=torch.float32)
    lora.metadata |= {"ss_network_dim": "4", "ss_network_alpha": "4", "ss_output_name": "x"}
    lora.extras["note"] = torch.arange(3)
    source = io.save(lora, tmp_path / "a.safetensors", "kohya")
    resize(source, rank=2, out=tmp_path / "b.safetensors")
    found = io.load(tmp_path / "b.safetensors")
    assert found.metadata["ss_output_name"] == "x" and found.metadata["ss_network_dim"] == "2"
    assert torch.equal(found.extras["note"], torch.arange(3))
    recipe = json.loads(found.metadata[files.RECIPE])
    assert recipe["command"] == "resize" and recipe["rank"] == 2
    (entry,) = recipe["inputs"]
    assert entry["name"] == "a.safetensors" and len(entry["sha256"]) == 64
    resize(source, error=0.5, per="overall", out=tmp_path / "c.safetensors")
    again = tmp_path / "d.safetensors"
    resize(tmp_path / "b.safetensors", rank=1, out=again)
    (entry,) = json.loads(io.load(again).metadata[files.RECIPE])["inputs"]
    assert entry["recipe"] == recipe, "what was done before is kept"
    found = io.load(tmp_path / "c.safetensors")
    assert len(set(found.ranks.values())) > 1 and found.metadata["ss_network_dim"] == "Dynamic"


def test_without_a_place_nothing_is_written(tmp_path: Path) -> None:
    source = io.save(draw(UNET, dtype=torch.float32, ranks=4), tmp_path / "a.safetensors", "kohya")
    before = source.read_bytes()
    report = resize(source, energy=0.9)
    assert "output" not in report
    assert list(tmp_path.iterdir()) == [source] and source.read_bytes() == before


def test_over_itself(tmp_path: Path) -> None:
    lora = draw(UNET, dtype=torch.float32, ranks=4)
    source = io.save(lora, tmp_path / "a.safetensors", "diffusers")
    resize(source, rank=1, out=source)
    assert set(io.load(source).ranks.values()) == {1}


def test_bad_requests(tmp_path: Path) -> None:
    source = io.save(draw(UNET, dtype=torch.float32, ranks=4), tmp_path / "a.safetensors", "kohya")
    out = tmp_path / "b.safetensors"
    with pytest.raises(LolgenError, match="no target"):
        resize(source, out=out)
    with pytest.raises(LolgenError, match="dtype: found 'int8'"):
        resize(source, rank=1, dtype="int8", out=out)
    with pytest.raises(LolgenError, match="format: found 'onnx'"):
        resize(source, rank=1, format="onnx", out=out)
    with pytest.raises(FormatError, match="missing"):
        resize(tmp_path / "missing", rank=1, out=out)
    with pytest.raises(FormatError, match="folder"):
        resize(source, rank=1, format="peft", out=out)
    assert not out.exists()


def test_numbers_too_large_for_half_precision_are_refused(tmp_path: Path) -> None:
    lora = LoRA(
        Spec((ModuleSpec("unet.conv_in", 2, 2),)),
        {"unet.conv_in": Factors(torch.full((2, 1), 1e6), torch.full((1, 2), 1e6))},
    )
    source = io.save(lora, tmp_path / "a.safetensors", "diffusers")
    with pytest.raises(FormatError, match="unet.conv_in"):
        resize(source, rank=1, dtype="float16", out=tmp_path / "b.safetensors")


def test_dtypes_of_a_module_are_kept() -> None:
    lora = draw(EVERY_KIND, 2)
    mixed = lora.replace(
        {n: f.to(torch.float16 if i % 2 else torch.float32) for i, (n, f) in enumerate(lora.factors.items())}
    )
    made, report = resized(mixed, Target(rank=1))
    assert [w.factors.B.dtype for w in made.values()] == [torch.float32, torch.float16] * 3
    assert [r["rounding"] > 0 for r in report["modules"]] == [False, True] * 3
    assert given(mixed)[0].lora is mixed
