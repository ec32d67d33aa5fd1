"""What the toolbox writes, in stock peft and diffusers: against peft's own merges, and in the models' outputs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lolgen import io
from lolgen.tools.merge import merge
from lolgen.tools.resize import resize
from tools.dense import draw, relative
from tools.models import IDS, NET, answer, net, pipeline, unet_spec

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is_gradient_checkpointing.*:FutureWarning",
    "ignore:.*save_embedding_layers.*:UserWarning",
    "ignore:.*Could not find a config file.*:UserWarning",
    "ignore:.*Could not identify embedding layer.*:UserWarning",
    "ignore:.*Already found a `peft_config` attribute.*:UserWarning",
)
WEIGHTS = (0.7, -0.3)


def saved(tmp_path: Path, ranks: tuple[int, int] = (3, 2)) -> list[Path]:
    return [
        io.save(draw(NET, r, seed=i, dtype=torch.float32), tmp_path / f"in{i}", "peft")
        for i, r in enumerate(ranks)
    ]


def loaded(files: list[Path]) -> Any:
    """A stock PeftModel with the folders as adapters a0, a1, ..."""
    from peft import PeftModel

    model = PeftModel.from_pretrained(net(), str(files[0]), adapter_name="a0")
    for i, file in enumerate(files[1:], 1):
        model.load_adapter(str(file), adapter_name=f"a{i}")
    return model


def deltas(model: Any, adapter: str) -> dict[str, Tensor]:
    layers = dict(model.base_model.model.named_modules())
    return {m.name: layers[m.name].get_delta_weight(adapter).detach() for m in NET}


def output(model: Any, adapter: str) -> Tensor:
    model.set_adapter(adapter)
    with torch.no_grad():
        found: Tensor = model(IDS)
    return found


@pytest.mark.parametrize(("rank", "theirs"), [(None, "cat"), (2, "svd"), (1, "svd")])
def test_merge_equals_what_peft_does_exactly(rank: int | None, theirs: str, tmp_path: Path) -> None:
    inputs = saved(tmp_path)
    merge(list(zip(inputs, WEIGHTS, strict=True)), rank=rank, out=tmp_path / "ours")
    model = loaded([*inputs, tmp_path / "ours"])
    model.add_weighted_adapter(
        ["a0", "a1"], list(WEIGHTS), "theirs", combination_type=theirs, **({"svd_rank": rank} if rank else {})
    )
    ours, wanted = deltas(model, "a2"), deltas(model, "theirs")
    for name in NET.names:
        assert relative(ours[name], wanted[name]) < 2e-6, name
    assert relative(output(model, "a2"), output(model, "theirs")) < 1e-5
    # And the twin: an input alone is far from it.
    assert relative(output(model, "a0"), output(model, "theirs")) > 1e-2


def test_pefts_linear_has_cross_terms(tmp_path: Path) -> None:
    """It adds the factors: (w1 B1 + w2 B2)(w1 A1 + w2 A2). What it adds to the sum is B1 A2 and B2 A1."""
    inputs = saved(tmp_path, (3, 3))
    merge([(p, 0.5) for p in inputs], out=tmp_path / "ours")
    model = loaded([*inputs, tmp_path / "ours"])
    model.add_weighted_adapter(["a0", "a1"], [0.5, 0.5], "linear", combination_type="linear")
    model.add_weighted_adapter(["a0", "a1"], [0.5, 0.5], "cat", combination_type="cat")
    ours, linear, cat = (deltas(model, name) for name in ("a2", "linear", "cat"))
    one, two = io.load(inputs[0]), io.load(inputs[1])
    for name in NET.names:
        assert relative(ours[name], cat[name]) < 2e-6
        assert relative(linear[name], cat[name]) > 0.3
        # The scale is baked into the file: each weight's root goes to either factor.
        cross = 0.5 * (one[name].B @ two[name].A + two[name].B @ one[name].A)
        cross = (cross.T if name == "embed" else cross).reshape(cat[name].shape)
        assert relative(linear[name] - cat[name], cross) < 1e-5


@pytest.mark.parametrize("dtype", ["same", "float16"])
def test_a_resized_file_acts_as_its_optimum(dtype: str, tmp_path: Path) -> None:
    (file,) = saved(tmp_path, (3, 2))[:1]
    report = resize(file, rank=2, out=tmp_path / "small", dtype=dtype)
    model = loaded([file, tmp_path / "small"])
    old, new = deltas(model, "a0"), deltas(model, "a1")
    for row in report["modules"]:
        W = old[row["name"]].double().flatten(1)
        S = torch.linalg.svdvals(W)
        optimum = float(S[2:].norm() / S.norm())
        error = relative(new[row["name"]].double().flatten(1), W)
        assert row["error"] == pytest.approx(optimum, abs=1e-6)
        assert error == pytest.approx(optimum, abs=1e-6 if dtype == "same" else 1e-3)
    full = resize(file, rank=3, out=tmp_path / "full", dtype=dtype)
    assert full["error"] == 0
    model = loaded([file, tmp_path / "full"])
    assert relative(output(model, "a1"), output(model, "a0")) < (1e-5 if dtype == "same" else 2e-3)


def test_peft_and_kohya_into_one_diffusers_file(tmp_path: Path) -> None:
    """The UNet with the merged file answers as the UNet with both files at these weights in stock diffusers."""
    pipe = pipeline()
    bare = answer(pipe.unet)
    spec = unet_spec(pipe.unet, ("to_q", "to_v", "conv1", "ff.net.2", "conv_in"))
    ranks = [1 + i % 4 for i in range(len(spec))]
    a, b = draw(spec, 3, dtype=torch.float32), draw(spec, ranks, seed=1, dtype=torch.float32)
    one = io.save(a, tmp_path / "one", "peft")
    two = io.save(b, tmp_path / "two.safetensors", "kohya")
    out = tmp_path / "both.safetensors"
    report = merge([(one, 0.7), (two, 0.3)], out=out, format="diffusers")
    assert [i["format"] for i in report["inputs"]] == ["peft", "kohya"]
    pipe.load_lora_weights(str(one), adapter_name="one")
    pipe.load_lora_weights(str(two), adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.7, 0.3])
    both = answer(pipe.unet)
    fresh = pipeline()
    fresh.load_lora_weights(str(out), adapter_name="both")
    found = answer(fresh.unet)
    assert relative(found - bare, both - bare) < 1e-4
    pipe.set_adapters(["one"], [0.7])
    assert relative(answer(pipe.unet) - bare, both - bare) > 1e-2, "the twin: one alone is not both"
