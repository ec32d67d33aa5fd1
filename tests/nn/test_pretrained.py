"""One safetensors file a model, its config in the header; what is not one is refused in one line."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from lolgen.errors import FormatError, SpecError
from lolgen.nn import (
    Decoder,
    DecoderConfig,
    Encoder,
    EncoderConfig,
    GLNet,
    GLNetConfig,
    Heads,
    HeadsConfig,
    Pretrained,
    VelocityField,
    VelocityFieldConfig,
)

from .tiny import LONGER, SPEC, batch

ENCODER = EncoderConfig(d=3, mix=1, p=2, features=4, width=8, heads=2)


def models() -> list[Pretrained]:
    torch.manual_seed(0)
    return [
        Encoder.from_batch(batch([2] * 5, dtype=torch.float32), ENCODER),
        Decoder(SPEC, DecoderConfig(d=3, mix=1, heads=2)),
        Heads(SPEC, HeadsConfig({"hair": ("red", "black"), "hat": ("no", "yes")}, features=4, hidden=4)),
        GLNet(SPEC, GLNetConfig(outputs=2, d=3, hidden=4)),
        VelocityField(SPEC, VelocityFieldConfig(d_u=3, d_v=3, p=2, width=8, heads=2)),
    ]


@pytest.mark.parametrize("i", range(5))
def test_round_trip_to_the_byte(tmp_path: Path, i: int) -> None:
    model = models()[i]
    file = model.save_pretrained(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]
    state = torch.random.get_rng_state()
    for again in (
        type(model).from_pretrained(tmp_path / "a"), type(model).from_pretrained(file),
        Pretrained.from_pretrained(str(file)),
    ):  # fmt: skip
        assert type(again) is type(model) and again.config == model.config and again.spec == SPEC
        assert not again.training
        own = model.state_dict()
        assert own.keys() == again.state_dict().keys()
        assert all(torch.equal(own[k], v) for k, v in again.state_dict().items())
        assert all(p.requires_grad for p in again.parameters())
        assert again.save_pretrained(tmp_path / "b").read_bytes() == file.read_bytes()
    assert torch.equal(state, torch.random.get_rng_state())


def test_the_file_in_its_literal_form(tmp_path: Path) -> None:
    model = models()[1]
    file = model.save_pretrained(tmp_path)
    with safe_open(file, framework="pt") as f:
        metadata, keys = f.metadata(), set(f.keys())
    assert list(metadata) == ["config"]
    header = json.loads(metadata["config"])
    assert header["class"] == "Decoder"
    assert header["config"] == {"d": 3, "mix": 1, "mix_rank": 8, "heads": 2, "dropout": 0.0}
    assert header["spec"]["modules"][1] == {
        "name": "conv",
        "out": 5,
        "in": 2,
        "kernel": [3, 3],
        "kind": "conv",
    }
    assert {"lift.U.0", "lift.V.2", "mixes.0.net.out.weight"} <= keys
    assert json.loads((tmp_path / "config.json").read_text()) == header


def test_dtype_and_outputs_survive(tmp_path: Path) -> None:
    encoder, x = models()[0].eval(), batch([2, 3], dtype=torch.float32)
    encoder.save_pretrained(tmp_path)
    again = Encoder.from_pretrained(tmp_path)
    assert torch.equal(encoder(x)[1], again(x)[1])
    double = Encoder.from_pretrained(tmp_path, dtype=torch.float64)
    assert torch.allclose(double(x.to(torch.float64))[1].float(), again(x)[1], atol=1e-4)
    double.save_pretrained(tmp_path)
    assert Encoder.from_pretrained(tmp_path).size.dtype == torch.float64


def test_another_spec_is_refused(tmp_path: Path) -> None:
    Encoder(LONGER, ENCODER).save_pretrained(tmp_path)
    with pytest.raises(SpecError, match=r"module 4: found none, wanted 'k' \(linear, \(7, 6\)\)"):
        Encoder.from_pretrained(tmp_path)(batch([2], dtype=torch.float32))


def refused(path: Path, model: type[Pretrained] = Decoder) -> str:
    with pytest.raises(FormatError) as error:
        model.from_pretrained(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)
    return str(error.value)


def rewrite(file: Path, **changes: Any) -> None:
    """The model file with parts of its header replaced."""
    with safe_open(file, framework="pt") as f:
        tensors, header = {k: f.get_tensor(k) for k in f.keys()}, json.loads(f.metadata()["config"])  # noqa: SIM118
    save_file(tensors, file, {"config": json.dumps(header | changes)})


def test_bad_files_are_refused_in_one_line(tmp_path: Path) -> None:
    file = models()[1].save_pretrained(tmp_path)
    good = file.read_bytes()
    assert "Heads" in refused(file, Heads) and "Decoder.from_pretrained" in refused(file, Heads)
    assert "no such file" in refused(tmp_path / "nowhere")
    for bad in (good[:-5], good[:50], b"", pickle.dumps({"a": 1})):
        file.write_bytes(bad)
        refused(file)
    file.write_bytes(good)
    rewrite(file, config={"d": 3, "depth": 7})
    assert "depth" in refused(file)
    rewrite(file, config={"d": 3})  # without its mixing layer: tensors that nobody asked for
    assert "wanted no tensor" in refused(file)
    rewrite(file, config={"d": 4, "mix": 1, "heads": 2})
    assert "found a tensor (" in refused(file)
    rewrite(file, **{"class": "Unknown"})
    assert "'Unknown'" in refused(file)
    rewrite(file, spec={"modules": 3})
    assert "SpecError" in refused(file)
    save_file({"x": torch.zeros(1)}, file)
    assert "config" in refused(file)
    save_file({"x": torch.zeros(1)}, file, {"config": "{"})
    assert "JSON" in refused(file)

    bad_model = models()[1]
    with torch.no_grad():
        next(bad_model.parameters())[0] = float("nan")
    bad_model.save_pretrained(tmp_path)
    assert "NaN" in refused(file)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = models()[1]
    file = model.save_pretrained(tmp_path)
    before = file.read_bytes()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with torch.no_grad():
        next(model.parameters()).zero_()
    with pytest.raises(FormatError, match="No space left"):
        model.save_pretrained(tmp_path)
    assert file.read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
