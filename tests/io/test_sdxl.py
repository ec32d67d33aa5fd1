"""SDXL: both spellings of every module at true size, against the real structure and diffusers' own conversion."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from adapters import assert_same, linear_spec, mixed, random
from torch import Tensor, nn

from lolgen import io
from lolgen.errors import FormatError
from lolgen.io import names
from lolgen.io.families import unet
from lolgen.lora import ModuleSpec, Spec

XL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "attention_head_dim": (5, 10, 20),
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


@pytest.fixture(scope="module")
def model() -> Any:
    """The UNet of SDXL at true size, without numbers."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        return UNet2DConditionModel(**XL)


def test_the_table_is_that_of_the_real_model(model: Any) -> None:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    real = {f"unet.{n}" for n, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    with torch.device("meta"):
        second = CLIPTextModelWithProjection(CLIPTextConfig(num_hidden_layers=32, hidden_size=64))
    real |= {f"text_encoder_2.{n}" for n, m in second.named_modules() if isinstance(m, nn.Linear)}
    table = names.sdxl_modules()
    assert len(table) == len(set(table))
    assert {n for n in table if not n.startswith("text_encoder.")} == real


def test_every_original_name_comes_back() -> None:
    paths = [n.removeprefix("unet.") for n in unet.sdxl()]
    originals = {unet.to_ldm(p): p for p in paths}
    assert None not in originals and len(originals) == len(paths)
    for original, path in originals.items():
        assert original is not None
        assert unet.from_ldm(original) == path
        assert names.from_kohya("lora_unet_" + original.replace(".", "_"), {}) == f"unet.{path}"
    for path in paths:  # and diffusers' names in a kohya file of SDXL
        assert names.from_kohya("lora_unet_" + path.replace(".", "_"), {}) == f"unet.{path}"


@pytest.mark.parametrize(
    ("original", "path"),
    [
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        (
            "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("input_blocks_7_0_skip_connection", "down_blocks.2.resnets.0.conv_shortcut"),
        (
            "middle_block_1_transformer_blocks_9_ff_net_0_proj",
            "mid_block.attentions.0.transformer_blocks.9.ff.net.0.proj",
        ),
        ("middle_block_2_in_layers_2", "mid_block.resnets.1.conv1"),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_8_0_emb_layers_1", "up_blocks.2.resnets.2.time_emb_proj"),
        ("label_emb_0_2", "add_embedding.linear_2"),
        ("out_2", "conv_out"),
    ],
)
def test_literal_names(original: str, path: str) -> None:
    assert names.from_kohya(f"lora_unet_{original}", {}) == f"unet.{path}"
    assert names.to_kohya(f"unet.{path}", style="sdxl") == f"lora_unet_{original}"


def test_sd1_in_the_original_layout() -> None:
    """Its first up block does not attend, so its upsampler stands one place further up."""
    paths = [n.removeprefix("unet.") for n in unet.modules()]
    attends = (False, True, True, True)
    originals = {unet.to_ldm(p, up=attends): p for p in paths}
    assert None not in originals and len(originals) == len(paths)
    assert originals["output_blocks.2.1.conv"] == "up_blocks.0.upsamplers.0.conv"
    assert originals["output_blocks.5.2.conv"] == "up_blocks.1.upsamplers.0.conv"
    for original, path in originals.items():
        assert original is not None
        assert names.from_kohya("lora_unet_" + original.replace(".", "_"), {}) == f"unet.{path}"
        assert names.from_other(f"diffusion_model.{original}") == f"unet.{path}"


@pytest.mark.parametrize(
    "path",
    [
        "input_blocks.3.0.in_layers.2",
        "input_blocks.4.2.proj_in",
        "middle_block.3.proj_in",
        "output_blocks.2.2.proj_in",
        "input_blocks.1.0.in_layers.3",
        "middle_block.1",
    ],
)
def test_what_is_no_original_name(path: str) -> None:
    assert unet.from_ldm(path) is None


@pytest.mark.parametrize(
    "path",
    [
        "down_blocks.1.resnets.2.conv1",
        "up_blocks.0.resnets.3.conv1",
        "mid_block.resnets.2.conv1",
        "down_blocks.0.upsamplers.0.conv",
        "mid_block.attentions",
    ],
)
def test_what_has_no_original_name(path: str) -> None:
    assert unet.to_ldm(path) is None


def true_size(model: Any) -> Spec:
    spec = linear_spec(model, "unet.", ("",))
    te = [ModuleSpec(n, 2, 3) for n in names.sdxl_modules() if n.startswith("text") and "projection" not in n]
    return Spec((*spec, *te))


def test_diffusers_converts_every_true_size_name_to_ours(model: Any, tmp_path: Path) -> None:
    """The names that stock diffusers makes of our kohya file, module for module, at the size of the real SDXL."""
    from diffusers import StableDiffusionXLPipeline

    # Two inputs wide, so that the file stays small: names are what is looked at.
    spec = Spec(tuple(ModuleSpec(m.name, 2, 2, m.kernel, m.kind) for m in true_size(model)))
    lora = random(spec, 1)
    file = io.save(lora, tmp_path / "x.safetensors", "kohya", base="sdxl")
    heads = {k.partition(".")[0] for k in safetensors.torch.load_file(file)}
    assert "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q" in heads
    assert {h.split("_")[1] for h in heads} == {"unet", "te1", "te2"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state, _ = StableDiffusionXLPipeline.lora_state_dict(str(file), unet_config=model.config)
    found = converted(state)
    assert found.keys() == set(lora.names)
    for name in lora.names:
        assert torch.equal(found[name].flatten(), (0.7 * lora[name].B @ lora[name].A).flatten()), name
    assert_same(io.load(file, modules=spec), lora)


def converted(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our name -> up @ down of a state dict that diffusers has converted."""
    from lolgen.io import keys

    halves: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        parsed = keys.parse(key)
        assert parsed is not None, key
        halves.setdefault(names.with_component(parsed.path), {})[parsed.part] = tensor
    return {n: h["B"].flatten(1) @ h["A"].flatten(1) for n, h in halves.items()}


@pytest.mark.parametrize(
    ("changes", "original"),
    [
        ({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1": (4, 4)}, True),
        ({"unet.add_embedding.linear_1": (4, 4)}, True),
        ({"unet.mid_block.attentions.0.transformer_blocks.1.attn1.to_q": (4, 4)}, True),
        ({"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (4, 2048)}, True),
        ({"unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k": (4, 768)}, False),
        # A layer that the original layout has no name for: then no module is given one, as readers want one kind.
        ({"unet.add_embedding.linear_1": (4, 4), "unet.down_blocks.1.resnets.5.conv1": (4, 4)}, False),
    ],
)
def test_which_names_a_file_gets(changes: dict[str, tuple[int, int]], original: bool, tmp_path: Path) -> None:
    modules = {"unet.down_blocks.1.attentions.0.proj_in": (4, 4)} | changes
    lora = random(Spec(tuple(ModuleSpec(n, *s) for n, s in modules.items())), 2)
    found = safetensors.torch.load_file(io.save(lora, tmp_path / "x.safetensors", "kohya"))
    assert ("lora_unet_input_blocks_4_1_proj_in.alpha" in found) == original
    assert ("lora_unet_down_blocks_1_attentions_0_proj_in.alpha" in found) == (not original)
    assert_same(io.load(tmp_path / "x.safetensors", modules=lora.spec), lora)


def test_the_header_and_the_base_decide_too(tmp_path: Path) -> None:
    lora = random(Spec((ModuleSpec("unet.down_blocks.1.attentions.0.proj_in", 4, 4),)), 2)
    marked = copy.deepcopy(lora)
    marked.metadata["ss_base_model_version"] = "sdxl_base_v1-0"
    key = "lora_unet_input_blocks_4_1_proj_in.alpha"
    for one, base, original in (
        (marked, None, True),
        (marked, "sd1", False),
        (lora, None, False),
        (lora, "sdxl", True),
    ):
        file = io.save(one, tmp_path / "x.safetensors", "kohya", base=base)
        assert (key in safetensors.torch.load_file(file)) == original
    with pytest.raises(FormatError, match="found 'sdxxl'; wanted sd1, sd2, sdxl"):
        io.save(lora, tmp_path / "x.safetensors", "kohya", base="sdxxl")
    with pytest.raises(FormatError, match="a module of a UNet; wanted modules of flux"):
        io.save(lora, tmp_path / "x.safetensors", "kohya", base="flux")


def test_mixed_spellings_of_one_module_are_refused(tmp_path: Path) -> None:
    tensors = {}
    for head in ("lora_unet_input_blocks_4_1_proj_in", "lora_unet_down_blocks_1_attentions_0_proj_in"):
        tensors |= {f"{head}.lora_down.weight": torch.ones(1, 2), f"{head}.lora_up.weight": torch.ones(2, 1)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(FormatError, match="a second [AB] for module unet.down_blocks.1.attentions.0.proj_in"):
        io.load(tmp_path / "x.safetensors")


def test_every_pair_of_formats(model: Any, tmp_path: Path) -> None:
    spec = Spec(tuple(m for m in true_size(model) if m.name.startswith("unet.down_blocks.1.attentions.0.")))
    lora = random(spec, mixed(spec))
    for first in io.FORMATS:
        one = io.load(
            io.save(lora, tmp_path / f"{first}.safetensors" if first != "peft" else tmp_path / "p", first)
        )
        for second in io.FORMATS:
            at = tmp_path / (f"{first}{second}" + ("" if second == "peft" else ".safetensors"))
            two = io.load(io.save(one, at, second, base="sdxl"), modules=spec)
            assert_same(two, lora)
