"""One name a module, and the way back from kohya's underscores."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lolgen.io import names


@pytest.mark.parametrize(
    ("options", "structure"),
    [
        ({"cross_attention_dim": 768}, {}),
        (
            {
                "block_out_channels": (32, 64),
                "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
                "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
                "layers_per_block": 1,
            },
            {"down": (True, False), "layers": 1, "widths": (32, 64)},
        ),
    ],
    ids=["SD 1.x", "two blocks"],
)
def test_the_table_is_that_of_the_real_unet(options: dict[str, Any], structure: dict[str, Any]) -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**options)
    real = {f"unet.{n}" for n, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    table = names.unet_modules(**structure)
    assert len(table) == len(set(table))
    assert set(table) == real


def test_clip_l() -> None:
    table = names.clip_modules()
    assert len(table) == 72
    assert table[3] == "text_encoder.text_model.encoder.layers.0.self_attn.out_proj"


def test_every_sd1_name_comes_back_from_underscores() -> None:
    keys = {names.to_kohya(n): n for n in names.sd1_modules()}
    assert len(keys) == len(names.sd1_modules())
    for key, name in keys.items():
        assert key is not None
        assert names.from_kohya(key, {}) == name
    assert (
        keys["lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn2_to_out_0"]
        == "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_out.0"
    )
    assert (
        keys["lora_te_text_model_encoder_layers_11_self_attn_k_proj"]
        == "text_encoder.text_model.encoder.layers.11.self_attn.k_proj"
    )


@pytest.mark.parametrize(
    "key",
    [
        "lora_unet_up_blocks_0_my_own_layer",
        "lora_unet_input_blocks_0_1_transformer_blocks_0_attn1_to_q",
        "lora_unet_double_blocks_0_img_attn_my_own",
        "lora_unet_proj",
        "lora_te3_encoder_block_0",
    ],
)
def test_names_without_explanation_stay(key: str) -> None:
    assert names.from_kohya(key, {}) == key
    assert names.to_kohya(key) == key


def test_the_callers_names_come_first() -> None:
    table = names.kohya_table(["unet.my.own_layer", "mid_block.attentions.0.proj_in"])
    assert names.from_kohya("lora_unet_my_own_layer", table) == "unet.my.own_layer"
    assert table["lora_unet_mid_block_attentions_0_proj_in"] == "unet.mid_block.attentions.0.proj_in"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("unet.conv_in", "unet"),
        ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", "text_encoder_2"),
        ("transformer.single_transformer_blocks.0.attn.to_q", "transformer"),
        ("transformer.blocks.3.attn1.to_q", "transformer"),
        ("transformer.x_embedder", "transformer"),
        ("transformer.h.0.attn.c_attn", None),  # GPT-2
        ("transformer.blocks.0.attn.Wqkv", None),  # MPT
        ("model.layers.0.self_attn.q_proj", None),
        ("unet", None),
    ],
)
def test_components(name: str, part: str | None) -> None:
    assert names.component(name) == part


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("mid_block.attentions.0.proj_in", "unet.mid_block.attentions.0.proj_in"),
        ("text_encoder.encoder.layers.0.mlp.fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        ("text_model.encoder.layers.0.mlp.fc1", "text_encoder.text_model.encoder.layers.0.mlp.fc1"),
        ("text_encoder_3.encoder.block.0.layer.0", "text_encoder_3.encoder.block.0.layer.0"),  # T5
        ("transformer_blocks.0.attn.to_q", "transformer.transformer_blocks.0.attn.to_q"),
        ("diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.self_attn.q"),
    ],
)
def test_paths_get_their_component(path: str, name: str) -> None:
    assert names.with_component(path) == name


def test_numbers_are_ordered_by_value() -> None:
    found = sorted(["b.10.x", "b.2.x", "a.3", "b.2.a", "b"], key=names.natural)
    assert found == ["a.3", "b", "b.2.a", "b.2.x", "b.10.x"]
