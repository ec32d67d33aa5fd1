"""diffusers files: every spelling there is, and what stock diffusers makes of ours."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from adapters import (
    ATTENTION,
    LLM,
    SD,
    UNET,
    assert_same,
    double,
    linear_spec,
    mixed,
    pipeline,
    random,
    relative,
    unet,
)
from torch import Tensor

from lolgen import io
from lolgen.errors import FormatError
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
A, B = torch.arange(6.0).reshape(2, 3), torch.arange(8.0).reshape(4, 2)
CLIP = "text_encoder.text_model.encoder.layers.0"


def write(file: Path, tensors: dict[str, Tensor], config: dict[str, Any] | None = None) -> Path:
    """A file as diffusers lays it out."""
    header = {"format": "pt"} | ({"lora_adapter_metadata": json.dumps(config)} if config is not None else {})
    safetensors.torch.save_file(tensors, file, header)
    return file


def pair(down: str, up: str) -> dict[str, Tensor]:
    return {down: A.clone(), up: B.clone()}


def test_the_file_that_is_written(tmp_path: Path) -> None:
    lora = LoRA(
        Spec((ModuleSpec(f"{CLIP}.mlp.fc1", 1, 1), ModuleSpec("unet.conv_in", 1, 1, (1, 1), "conv"))),
        {
            f"{CLIP}.mlp.fc1": Factors(torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0], [1.0]])),
            "unet.conv_in": Factors(torch.tensor([[2.0]]), torch.tensor([[3.0]]), 0.5),
        },
        {"author": "me"},
    )
    file = io.save(lora, tmp_path, "diffusers")
    assert file == tmp_path / "pytorch_lora_weights.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    config = json.loads(header["__metadata__"].pop("lora_adapter_metadata"))
    assert header == {
        "__metadata__": {"author": "me", "format": "pt"},
        f"{CLIP}.mlp.fc1.lora_linear_layer.down.weight": row([2, 1], 0, 8),
        f"{CLIP}.mlp.fc1.lora_linear_layer.up.weight": row([1, 2], 8, 16),
        "unet.conv_in.lora_A.weight": row([1, 1, 1, 1], 16, 20),
        "unet.conv_in.lora_B.weight": row([1, 1, 1, 1], 20, 24),
    }
    assert data[8 + length :] == torch.tensor([0.0, 1.0, 1.0, 0.0, 3.0, 1.0]).numpy().tobytes()
    common = {
        "rank_pattern": {},
        "alpha_pattern": {},
        "use_rslora": False,
        "use_dora": False,
        "init_lora_weights": True,
    }
    te = {"r": 2, "lora_alpha": 2, "target_modules": ["encoder.layers.0.mlp.fc1"]} | common
    un = {"r": 1, "lora_alpha": 1, "target_modules": ["conv_in"]} | common
    assert config == {f"text_encoder.{k}": v for k, v in te.items()} | {f"unet.{k}": v for k, v in un.items()}


def row(shape: list[int], begin: int, end: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize(
    ("stem", "words", "name"),
    [
        (f"{ATTENTION}.attn1.to_q.", "lora_A lora_B", f"{ATTENTION}.attn1.to_q"),
        (f"{ATTENTION}.attn1.to_q.", "lora_A.default_0 lora_B.default_0", f"{ATTENTION}.attn1.to_q"),
        (f"{ATTENTION}.attn1.to_out.0.", "lora.down lora.up", f"{ATTENTION}.attn1.to_out.0"),
        (f"{ATTENTION}.attn1.processor.to_q_lora.", "down up", f"{ATTENTION}.attn1.to_q"),
        (f"{ATTENTION}.attn1.processor.to_out_lora.", "down up", f"{ATTENTION}.attn1.to_out.0"),
        (f"{ATTENTION}.attn2.to_v_lora.", "down up", f"{ATTENTION}.attn2.to_v"),
        (
            "mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_k_lora.",
            "down up",
            "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_k",
        ),
        (f"{ATTENTION}.ff.net.0.proj.", "lora.down lora.up", f"{ATTENTION}.ff.net.0.proj"),
        (f"{CLIP}.self_attn.to_q_lora.", "down up", f"{CLIP}.self_attn.q_proj"),
        (f"{CLIP}.self_attn.to_out_lora.", "down up", f"{CLIP}.self_attn.out_proj"),
        (
            f"{CLIP}.self_attn.q_proj.",
            "lora_linear_layer.down lora_linear_layer.up",
            f"{CLIP}.self_attn.q_proj",
        ),
        ("text_encoder.encoder.layers.0.mlp.fc1.", "lora_A lora_B", f"{CLIP}.mlp.fc1"),
        (
            "text_encoder_2.text_model.encoder.layers.3.mlp.fc2.",
            "lora_A lora_B",
            "text_encoder_2.text_model.encoder.layers.3.mlp.fc2",
        ),
        (
            "transformer.single_transformer_blocks.0.attn.to_q.",
            "lora_A lora_B",
            "transformer.single_transformer_blocks.0.attn.to_q",
        ),
        (
            "transformer.transformer_blocks.0.attn.to_q.",
            "lora_down lora_up",
            "transformer.transformer_blocks.0.attn.to_q",
        ),
    ],
)
def test_spellings(stem: str, words: str, name: str, tmp_path: Path) -> None:
    down, up = (f"{stem}{word}.weight" for word in words.split())
    file = write(tmp_path / "anything.safetensors", pair(down, up))
    assert io.detect(file) == "diffusers"
    lora = io.load(file)
    assert lora.names == (name,)
    assert torch.equal(lora[name].A, A) and torch.equal(lora[name].B, B)
    assert lora[name].scale == 1.0
    # diffusers reads what we make of it as it read the original.
    again = io.load(io.save(lora, tmp_path / "again.safetensors", "diffusers"))
    assert_same(again, lora)


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        (None, 1.0),
        ({}, 1.0),
        ({"unet.r": 2, "unet.lora_alpha": 3}, 1.5),
        ({"text_encoder.r": 2, "text_encoder.lora_alpha": 3}, 1.0),
        ({"unet.r": 9, "unet.lora_alpha": 9, "unet.rank_pattern": {"to_q": 2}}, 4.5),
        ({"unet.r": 2, "unet.lora_alpha": 9, "unet.alpha_pattern": {"attn1.to_q": 1}}, 0.5),
        ({"unet.r": 2, "unet.lora_alpha": 2, "unet.use_rslora": True}, 2**0.5),
        ({"r": 2, "lora_alpha": 6}, 3.0),  # `unet.save_lora_adapter`
    ],
)  # fmt: skip
def test_alpha_is_in_the_header(config: dict[str, Any] | None, scale: float, tmp_path: Path) -> None:
    name = f"{ATTENTION}.attn1.to_q"
    file = write(tmp_path / "x.safetensors", pair(f"{name}.lora_A.weight", f"{name}.lora_B.weight"), config)
    assert io.load(file)[name].scale == pytest.approx(scale)


def test_alpha_beside_the_factors(tmp_path: Path) -> None:
    tensors = pair("unet.conv_in.lora_down.weight", "unet.conv_in.lora_up.weight")
    tensors["unet.conv_in.alpha"] = torch.tensor(1.0)
    assert io.load(write(tmp_path / "x.safetensors", tensors))["unet.conv_in"].scale == 0.5


def test_stock_diffusers_applies_every_module(tmp_path: Path) -> None:
    pipe = pipeline()
    ends = ("to_q", "to_v", "to_out.0", "conv1", "proj_in", "conv_in", "ff.net.2", "time_emb_proj")
    un = linear_spec(pipe.unet, "unet.", ends)
    te = linear_spec(pipe.text_encoder, "text_encoder.text_model.", ("k_proj", "fc1"))
    spec = Spec(un.modules + te.modules)
    lora = random(spec, mixed(spec))
    file = io.save(lora, tmp_path / "x.safetensors", "diffusers")
    pipe.load_lora_weights(str(file), adapter_name="x")
    parts = {"unet": dict(pipe.unet.named_modules()), "text_encoder": dict(pipe.text_encoder.named_modules())}
    for module in spec:
        part, _, path = module.name.partition(".")
        layer = parts[part][path.removeprefix("text_model.")]
        assert (
            relative(layer.get_delta_weight("x").detach().reshape(module.shape), double(lora[module.name]))
            <= 1e-6
        )
    # The twin: in a pipeline without the adapter nothing of it is there.
    assert not any(hasattr(m, "get_delta_weight") for m in pipeline().unet.modules())


@pytest.mark.parametrize("modules", [("fc1",), ("q_proj",), ("out_proj", "fc2")])
def test_a_text_encoder_alone(modules: tuple[str, ...], tmp_path: Path) -> None:
    pipe = pipeline()
    spec = linear_spec(pipe.text_encoder, "text_encoder.text_model.", modules)
    lora = random(spec, mixed(spec))
    pipe.load_lora_weights(str(io.save(lora, tmp_path, "diffusers").parent), adapter_name="x")
    layers = dict(pipe.text_encoder.named_modules())
    for module in spec:
        layer = layers[module.name.removeprefix("text_encoder.text_model.")]
        assert relative(layer.get_delta_weight("x").detach(), double(lora[module.name])) <= 1e-6


def test_what_diffusers_saves(tmp_path: Path) -> None:
    """Both of its ways: a pipeline's file with the scale in the header, and one model's without prefixes."""
    from diffusers import StableDiffusionPipeline
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model = unet()
    config = LoraConfig(
        r=3,
        lora_alpha=5,
        target_modules=["to_q", "conv1"],
        rank_pattern={"conv1": 2},
        init_lora_weights=False,
    )
    model.add_adapter(config, "x")
    state = get_peft_model_state_dict(model, adapter_name="x")
    metadata = {k: sorted(v) if isinstance(v, set) else v for k, v in config.to_dict().items()}
    StableDiffusionPipeline.save_lora_weights(tmp_path / "pipe", state, unet_lora_adapter_metadata=metadata)
    model.save_lora_adapter(tmp_path / "model", adapter_name="x")
    spec = linear_spec(unet(), "unet.", ("to_q", "conv1"))
    layers = dict(model.named_modules())
    for folder in ("pipe", "model"):
        lora = io.load(tmp_path / folder, modules=spec)
        assert lora.spec == spec
        for module in spec:
            wanted = layers[module.name.removeprefix("unet.")].get_delta_weight("x").detach()
            assert relative(double(lora[module.name]), wanted.reshape(module.shape)) <= 1e-6


def test_unknown_keys_and_metadata_survive(tmp_path: Path) -> None:
    name = f"{ATTENTION}.attn1.to_q"
    tensors = pair(f"{name}.lora_A.weight", f"{name}.lora_B.weight")
    tensors |= {"unet.some_lora_thing": torch.arange(4), f"{name}.lora_magnitude_vector": torch.ones(4)}
    config = {"unet.r": 2, "unet.lora_alpha": 4, "unet.lora_dropout": 0.25, "unet.use_dora": True}
    lora = io.load(write(tmp_path / "x.safetensors", tensors, config))
    lora.metadata["note"] = "kept"
    again = io.load(io.save(lora, tmp_path / "y.safetensors", "diffusers"))
    assert again.metadata["note"] == "kept"
    found = json.loads(again.metadata["lora_adapter_metadata"])
    assert (
        found["unet.lora_dropout"] == 0.25
        and found["unet.use_dora"] is True
        and found["unet.lora_alpha"] == 2
    )
    assert set(again.extras) == {"unet.some_lora_thing", f"{name}.lora_magnitude_vector"}
    assert_same(again, lora)
    one, two = tmp_path / "y.safetensors", io.save(again, tmp_path / "z.safetensors", "diffusers")
    assert one.read_bytes() == two.read_bytes()


def test_what_diffusers_cannot_hold(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="model.embed_tokens.*no diffusers component.*save as peft"):
        io.save(random(LLM), tmp_path / "x.safetensors", "diffusers")
    full = random(UNET)
    full.extras["base_model.model.lm_head.weight"] = torch.ones(2)
    with pytest.raises(FormatError, match="lm_head"):
        io.save(full, tmp_path / "x.safetensors", "diffusers")
    assert list(tmp_path.iterdir()) == []


def test_names_that_diffusers_passes_over(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="passes over checkpoint-5.safetensors"):
        io.save(random(SD), tmp_path / "checkpoint-5.safetensors", "diffusers")
