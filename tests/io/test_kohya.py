"""kohya files for SD 1.x: literal keys, alphas, convolutions, Tucker, and stock diffusers as a reader."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from adapters import LLM, SD, UNET, assert_same, double, linear_spec, mixed, pipeline, random, relative
from torch import Tensor

from lolgen import io
from lolgen.errors import FormatError
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
NAME = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


def write(file: Path, tensors: dict[str, Tensor], header: dict[str, str] | None = None) -> Path:
    safetensors.torch.save_file(tensors, file, header)
    return file


def pair(at: str = Q, r: int = 2) -> dict[str, Tensor]:
    return {
        f"{at}.lora_down.weight": torch.arange(3.0 * r).reshape(r, 3),
        f"{at}.lora_up.weight": torch.arange(4.0 * r).reshape(4, r),
    }


def test_the_file_that_is_written(tmp_path: Path) -> None:
    spec = Spec(
        (ModuleSpec("text_encoder.text_model.encoder.layers.0.mlp.fc1", 1, 1), ModuleSpec(NAME, 1, 1))
    )
    lora = LoRA(spec, {m.name: Factors(torch.tensor([[2.0]]), torch.tensor([[3.0]]), 0.5) for m in spec})
    file = io.save(lora, tmp_path / "x.safetensors", "kohya")
    data = file.read_bytes()
    te = "lora_te_text_model_encoder_layers_0_mlp_fc1"
    rows: list[tuple[str, list[int]]] = []
    for at in (te, Q):
        rows += [(f"{at}.alpha", []), (f"{at}.lora_down.weight", [1, 1]), (f"{at}.lora_up.weight", [1, 1])]
    header = {"__metadata__": {"format": "pt"}} | {
        k: {"dtype": "F32", "shape": s, "data_offsets": [4 * i, 4 * i + 4]} for i, (k, s) in enumerate(rows)
    }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    numbers = torch.tensor([1.0, 3.0, 1.0] * 2).numpy().tobytes()
    assert data == len(text).to_bytes(8, "little") + text + numbers


@pytest.mark.parametrize(
    ("alpha", "scale"),
    [
        (None, 1.0),
        (torch.tensor(0.0), 1.0),
        (torch.tensor(1.0), 0.5),
        (torch.tensor([8], dtype=torch.int64), 4.0),
        (torch.tensor(1.0, dtype=torch.bfloat16), 0.5),
    ],
)
def test_alpha(alpha: Tensor | None, scale: float, tmp_path: Path) -> None:
    tensors = pair() | ({} if alpha is None else {f"{Q}.alpha": alpha})
    lora = io.load(write(tmp_path / "x.bin.safetensors", tensors))
    assert lora.names == (NAME,)
    assert lora[NAME].scale == scale


def test_sd1_names_and_sdxl_prefixes(tmp_path: Path) -> None:
    te = "text_model_encoder_layers_7_self_attn_out_proj"
    tensors = pair() | pair(f"lora_te_{te}")
    lora = io.load(write(tmp_path / "sd1.safetensors", tensors))
    assert lora.names == ("text_encoder.text_model.encoder.layers.7.self_attn.out_proj", NAME)
    xl = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = pair(xl) | pair(f"lora_te1_{te}") | pair(f"lora_te2_{te}")
    lora = io.load(write(tmp_path / "sdxl.safetensors", tensors))
    assert set(lora.names) == {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "text_encoder.text_model.encoder.layers.7.self_attn.out_proj",
        "text_encoder_2.text_model.encoder.layers.7.self_attn.out_proj",
    }
    # Written under the same keys, and to any other format.
    again = io.save(lora, tmp_path / "again.safetensors", "kohya")
    found = {k for k in safetensors.torch.load_file(again) if not k.endswith(".alpha")}
    assert found == set(tensors)
    assert_same(io.load(io.save(lora, tmp_path / "y.safetensors", "diffusers")), lora)


def test_a_name_without_explanation_stays_in_kohya_files(tmp_path: Path) -> None:
    own = "lora_unet_input_blocks_4_1_own_layer"
    lora = io.load(write(tmp_path / "x.safetensors", pair(own)))
    assert lora.names == (own,)
    assert f"{own}.lora_up.weight" in safetensors.torch.load_file(
        io.save(lora, tmp_path / "again.safetensors", "kohya")
    )
    with pytest.raises(FormatError, match="no diffusers component"):
        io.save(lora, tmp_path / "y.safetensors", "diffusers")
    with pytest.raises(FormatError, match="no module table explains"):
        io.save(lora, tmp_path / "y", "peft")


def test_the_callers_modules(tmp_path: Path) -> None:
    file = write(
        tmp_path / "x.safetensors", pair("lora_unet_own_block_2_layer") | pair("lora_unet_own_block_10_layer")
    )
    base = ["unet.own_block.10.layer", "unet.never.used", "unet.own_block.2.layer"]
    assert io.load(file, modules=base).names == ("unet.own_block.10.layer", "unet.own_block.2.layer")
    assert io.load(file).names == ("lora_unet_own_block_2_layer", "lora_unet_own_block_10_layer")
    with pytest.raises(FormatError, match="own_block_10_layer, which the base does not have"):
        io.load(file, modules=base[1:])
    spec = Spec(tuple(ModuleSpec(n, 4, 3, (1, 1), "conv") for n in base))
    assert io.load(file, modules=spec).spec.modules == (spec[0], spec[2])
    wrong = Spec(tuple(ModuleSpec(n, 4, 5) for n in base))
    with pytest.raises(FormatError, match=r"delta W of shape \(4, 3\); wanted \(4, 5\)"):
        io.load(file, modules=wrong)


def test_names_beyond_the_grammar_come_back_from_our_own_files(tmp_path: Path) -> None:
    spec = Spec((ModuleSpec("unet.conv_in", 4, 3), ModuleSpec("unet.own_block.2.layer", 4, 3)))
    lora = random(spec, mixed(spec))
    assert_same(io.load(io.save(lora, tmp_path / "x.safetensors", "kohya")), lora)


def test_convolutions(tmp_path: Path) -> None:
    one, three = "lora_unet_mid_block_attentions_0_proj_in", "lora_unet_conv_in"
    tensors = {
        f"{three}.lora_down.weight": torch.randn(2, 3, 3, 3),
        f"{three}.lora_up.weight": torch.randn(5, 2, 1, 1),
        f"{one}.lora_down.weight": torch.randn(2, 3, 1, 1),
        f"{one}.lora_up.weight": torch.randn(5, 2),
    }
    lora = io.load(write(tmp_path / "x.safetensors", tensors))
    assert lora.spec["unet.conv_in"] == ModuleSpec("unet.conv_in", 5, 3, (3, 3), "conv")
    assert lora.spec["unet.mid_block.attentions.0.proj_in"].kernel == (1, 1)
    down, up = tensors[f"{three}.lora_down.weight"], tensors[f"{three}.lora_up.weight"]
    wanted = torch.einsum("or,rikl->oikl", up[:, :, 0, 0], down)
    assert torch.allclose(lora["unet.conv_in"].delta().reshape(5, 3, 3, 3), wanted, atol=1e-6)
    assert_same(io.load(io.save(lora, tmp_path / "y.safetensors", "kohya")), lora)


def test_tucker(tmp_path: Path) -> None:
    at = "lora_unet_conv_in"
    tensors = {
        f"{at}.lora_down.weight": torch.randn(4, 3, 1, 1),
        f"{at}.lora_mid.weight": torch.randn(2, 4, 3, 3),
        f"{at}.lora_up.weight": torch.randn(5, 2, 1, 1),
        f"{at}.alpha": torch.tensor(6.0),
    }
    lora = io.load(write(tmp_path / "x.safetensors", tensors))
    d, m, u = (tensors[f"{at}.lora_{p}.weight"] for p in ("down", "mid", "up"))
    wanted = 3.0 * torch.einsum("op,prkl,ri->oikl", u[..., 0, 0], m, d[..., 0, 0])
    assert lora.ranks == {"unet.conv_in": 2}
    assert relative(double(lora["unet.conv_in"]), wanted.reshape(5, 27)) <= 1e-6


def test_dora_scale_is_the_magnitude_of_the_others(tmp_path: Path) -> None:
    tensors = pair() | {f"{Q}.dora_scale": torch.rand(4, 1)}
    lora = io.load(write(tmp_path / "x.safetensors", tensors))
    assert lora.extras[f"{NAME}.lora_magnitude_vector"].shape == (4,)
    io.save(lora, tmp_path / "peft", "peft")
    again = io.load(tmp_path / "peft")
    back = safetensors.torch.load_file(io.save(again, tmp_path / "y.safetensors", "kohya"))
    assert torch.equal(back[f"{Q}.dora_scale"], tensors[f"{Q}.dora_scale"])


@pytest.mark.parametrize("ranks", ["one", "mixed"])
def test_stock_diffusers_applies_every_module(ranks: str, tmp_path: Path) -> None:
    """With mixed ranks too, where diffusers would mis-scale attention modules if alphas differed."""
    pipe = pipeline()
    un = linear_spec(
        pipe.unet, "unet.", ("to_q", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2", "conv_in")
    )
    te = linear_spec(pipe.text_encoder, "text_encoder.text_model.", ("_proj", "fc1", "fc2"))
    spec = Spec(un.modules + te.modules)
    lora = random(spec, mixed(spec) if ranks == "mixed" else 3)
    pipe.load_lora_weights(str(io.save(lora, tmp_path / "x.safetensors", "kohya")), adapter_name="x")
    parts = {"unet": dict(pipe.unet.named_modules()), "text_encoder": dict(pipe.text_encoder.named_modules())}
    for module in spec:
        part, _, path = module.name.partition(".")
        layer = parts[part][path.removeprefix("text_model.")]
        assert (
            relative(layer.get_delta_weight("x").detach().reshape(module.shape), double(lora[module.name]))
            <= 1e-6
        )


def test_unknown_keys_and_metadata_survive_and_hashes_are_fresh(tmp_path: Path) -> None:
    header = {
        "ss_network_dim": "2",
        "ss_tag_frequency": '{"a": 1}',
        "modelspec.title": "T",
        "sshs_model_hash": "stale",
        "sshs_legacy_hash": "stale",
        "my": "own",
    }
    tensors = pair() | {
        f"{Q}.alpha": torch.tensor(1.0),
        "lora_unet_odd.diff_b": torch.arange(3.0),
        "x": torch.arange(2),
    }
    lora = io.load(write(tmp_path / "x.safetensors", tensors, header))
    assert lora.metadata == header
    file = io.save(lora, tmp_path / "y.safetensors", "kohya")
    again = io.load(file)
    assert {k: v for k, v in again.metadata.items() if not k.startswith("sshs_")} == {
        k: v for k, v in header.items() if not k.startswith("sshs_")
    }
    data = file.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert again.metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert set(again.extras) == {"lora_unet_odd.diff_b", "x"}
    assert_same(again, lora)


def test_what_kohya_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="kohya has no name for"):
        io.save(random(LLM), tmp_path / "x.safetensors", "kohya")
    biased = random(UNET)
    biased.extras["unet.conv_in.lora_B.bias"] = torch.ones(8)
    with pytest.raises(FormatError, match="a bias beside lora_B"):
        io.save(biased, tmp_path / "x.safetensors", "kohya")
    twins = Spec((ModuleSpec("unet.a.b", 2, 2), ModuleSpec("unet.a_b", 2, 2)))
    with pytest.raises(FormatError, match="a second module called lora_unet_a_b"):
        io.save(random(twins), tmp_path / "x.safetensors", "kohya")
    assert list(tmp_path.iterdir()) == []


def test_other_methods_are_named(tmp_path: Path) -> None:
    file = write(tmp_path / "x.safetensors", {f"{Q}.oft_blocks": torch.ones(2, 2)})
    with pytest.raises(FormatError, match="another LyCORIS method.*wanted LoRA, LoCon, LoHa or LoKr"):
        io.load(file)


def test_order_is_natural_and_the_same_for_every_format(tmp_path: Path) -> None:
    lora = random(SD)
    assert io.load(io.save(lora, tmp_path / "x.safetensors", "kohya")).spec == SD
