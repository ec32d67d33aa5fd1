"""Every pair of formats, every precision: delta W stays."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
from adapters import SD, UNET, assert_same, double, mixed, random, relative

from lolgen import gl, io
from lolgen.errors import FormatError
from lolgen.lora import LoRA


def place(folder: Path, name: str, format: str) -> Path:
    return folder / (name if format == "peft" else f"{name}.safetensors")


@pytest.mark.parametrize(("first", "second"), list(itertools.product(io.FORMATS, repeat=2)))
def test_every_pair_of_formats(first: str, second: str, dtype: torch.dtype, tmp_path: Path) -> None:
    lora = random(UNET, mixed(UNET), scale=-0.7, dtype=dtype)
    lora.metadata["note"] = "kept"
    one = io.load(io.save(lora, place(tmp_path, "one", first), first))
    two = io.load(io.save(one, place(tmp_path, "two", second), second))
    error = 1e-6 if dtype == torch.float32 else 1e-14
    assert io.detect(place(tmp_path, "one", first)) == first
    assert io.detect(place(tmp_path, "two", second)) == second
    for found in (one, two):
        assert found.dtype == dtype
        assert found.metadata["note"] == "kept"
        assert_same(found, lora, error)


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_two_components_in_a_file(format: str, tmp_path: Path) -> None:
    lora = random(SD, mixed(SD))
    assert_same(io.load(io.save(lora, tmp_path / "x.safetensors", format)), lora)


@pytest.mark.parametrize("format", io.FORMATS)
@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_of_a_bad_gauge(format: str, half: torch.dtype, tmp_path: Path) -> None:
    """A gauge of condition 1e4 costs nothing, as factors are balanced before they are rounded."""
    fine = random(UNET, 4, dtype=torch.float64)
    g = torch.Generator().manual_seed(1)
    rough = gl.act_lora(
        fine,
        {n: gl.random_gauge(rank=4, condition=1e4, generator=g, dtype=torch.float64) for n in fine.names},
    )
    rounded = io.load(io.save(rough, place(tmp_path, "x", format), format, dtype=half))
    assert rounded.dtype == half
    eps = torch.finfo(half).eps
    assert_same(rounded, fine, 2 * eps)
    plain = rough.to(half)
    worst = max(relative(double(plain[n]), double(fine[n])) for n in fine.names)
    assert worst > 20 * eps


def test_numbers_that_need_no_rounding_stay_bit_for_bit(tmp_path: Path) -> None:
    lora = random(UNET, 4, scale=0.5, dtype=torch.float16)
    one = io.load(io.save(lora, tmp_path / "one.safetensors", "kohya"))
    for name in lora.names:
        assert torch.equal(one[name].A, lora[name].A)
        assert torch.equal(one[name].B, lora[name].B * 0.5)
    io.save(one, tmp_path / "two.safetensors", "kohya")
    assert (tmp_path / "one.safetensors").read_bytes() == (tmp_path / "two.safetensors").read_bytes()


def test_too_large_for_half(tmp_path: Path) -> None:
    lora = random(UNET, 1, scale=1e12)
    with pytest.raises(FormatError, match="too large for float16.*bfloat16 or float32"):
        io.save(lora, tmp_path / "x.safetensors", "kohya", dtype=torch.float16)
    assert list(tmp_path.iterdir()) == []
    assert_same(io.load(io.save(lora, tmp_path / "x.safetensors", "kohya", dtype=torch.bfloat16)), lora, 0.02)


def test_zero_modules_and_any_rank(tmp_path: Path) -> None:
    lora = random(UNET, {n: r for n, r in zip(UNET.names, (1, 64, 7, 2, 3, 4), strict=False)})
    lora[UNET.names[0]].B.zero_()
    for format in io.FORMATS:
        found = io.load(io.save(lora, place(tmp_path, format, format), format, dtype=torch.float16))
        assert found.ranks == lora.ranks
        assert not found[UNET.names[0]].delta().any()
        assert_same(found, lora, 2e-3)


def test_eight_bit_files_are_read(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    A, B = torch.randn(2, 3).to(torch.float8_e4m3fn), torch.randn(4, 2).to(torch.float8_e5m2)
    save_file({"unet.conv_in.lora_A.weight": A, "unet.conv_in.lora_B.weight": B}, tmp_path / "x.safetensors")
    found = io.load(tmp_path / "x.safetensors")["unet.conv_in"]
    assert found.A.dtype == torch.float16
    assert torch.equal(found.A.float(), A.float()) and torch.equal(found.B.float(), B.float())


def test_an_unknown_format_or_dtype(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="peft, diffusers, kohya"):
        io.save(random(UNET), tmp_path / "x", "gguf")
    with pytest.raises(FormatError, match="int8 asked for"):
        io.save(random(UNET), tmp_path / "x", "peft", dtype=torch.int8)


def test_a_zero_sized_lora_is_refused(tmp_path: Path) -> None:
    from lolgen.lora import Spec

    for format in io.FORMATS:
        with pytest.raises(FormatError, match="no module"):
            io.save(LoRA(Spec(()), {}), place(tmp_path, "x", format), format)
