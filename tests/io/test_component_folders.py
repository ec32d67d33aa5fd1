"""Folders of PEFT folders: one a component, all of them or none."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from adapters import LLM, SD, assert_same, mixed, random, tree

from lolgen import io
from lolgen.errors import FormatError
from lolgen.io import parts, peft
from lolgen.lora import LoRA, Spec


def test_there_and_back(dtype: torch.dtype, tmp_path: Path) -> None:
    lora = random(SD, mixed(SD), dtype=dtype)
    lora.metadata["note"] = "kept"
    lora.extras = {"unet.conv_in.lora_magnitude_vector": torch.ones(8)}
    folder = parts.save(lora, tmp_path / "out")
    assert sorted(p.name for p in folder.iterdir()) == ["text_encoder", "unet"]
    assert io.detect(folder) == "peft"
    found = io.load(folder)
    assert_same(found, lora, 1e-6 if dtype == torch.float32 else 1e-14)
    assert found.metadata["note"] == "kept" and set(found.extras) == set(lora.extras)
    assert io.load(folder / "unet").names == tuple(n for n in SD.names if n.startswith("unet."))


def test_the_base_decides_on_order_and_modules(tmp_path: Path) -> None:
    folder = parts.save(random(SD, mixed(SD)), tmp_path / "out")
    turned = Spec(tuple(reversed(SD.modules)))
    assert io.load(folder, modules=turned).spec == turned
    with pytest.raises(FormatError, match="unet.conv_in, which the base does not have"):
        io.load(folder, modules=[n for n in SD.names if n != "unet.conv_in"])


@pytest.mark.parametrize("exists", [False, True])
def test_all_or_nothing(exists: bool, tmp_path: Path) -> None:
    """The second component's numbers cannot be written: the first's are not either."""
    lora = random(SD)
    out = tmp_path / "out"
    if exists:
        parts.save(random(SD, seed=1), out)
    before = tree(tmp_path)
    lora["unet.conv_in"].B[0, 0] = float("nan")
    with pytest.raises(FormatError, match="unet.conv_in B.*NaN"):
        parts.save(lora, out)
    assert tree(tmp_path) == before
    lora["unet.conv_in"].B[0, 0] = 0
    assert_same(io.load(parts.save(lora, out)), lora)


def test_a_broken_part_is_an_error(tmp_path: Path) -> None:
    folder = parts.save(random(SD), tmp_path / "out")
    (folder / "unet" / peft.WEIGHTS).write_bytes(b"")
    with pytest.raises(FormatError, match="an empty file"):
        io.load(folder)
    shutil.rmtree(folder / "unet")
    assert all(n.startswith("text_encoder.") for n in io.load(folder).names)


def test_what_does_not_belong(tmp_path: Path) -> None:
    both = Spec((*SD, *LLM))
    with pytest.raises(FormatError, match="a module of no component beside modules of text_encoder, unet"):
        parts.save(random(both), tmp_path / "out")
    lora = random(SD)
    lora.extras["x"] = torch.ones(2)
    with pytest.raises(FormatError, match="a tensor of none of the components"):
        parts.save(lora, tmp_path / "out")
    with pytest.raises(FormatError, match="the path of a file"):
        parts.save(random(SD), tmp_path / "out.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_split_keeps_everything() -> None:
    lora = random(SD, mixed(SD))
    found = parts.split(lora)
    assert list(found) == ["text_encoder", "unet"]
    assert all(isinstance(x, LoRA) for x in found.values())
    assert {n for x in found.values() for n in x.names} == set(SD.names)
