"""What is said of diffusers and PEFT, against the installed loaders; what is said of ComfyUI, by its literal keys."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lolgen import io
from lolgen.io import safetensors_file as stf
from lolgen.tools.inspect.finding import DROPS, NOTE, REFUSES, SCALES, Finding
from lolgen.tools.inspect.source import open_source
from lolgen.tools.inspect.targets import findings

from .files import BLOCK, lora

K = BLOCK.replace("unet.", "lora_unet_").replace(".", "_")
WIDTH = {"attn1": 16, "attn2": 12}


def unet() -> Any:
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8, block_out_channels=(16, 16), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), layers_per_block=1, cross_attention_dim=12,
        attention_head_dim=4, norm_num_groups=4,
    ).eval()  # fmt: skip


def pipe() -> Any:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
    from transformers import CLIPTextConfig, CLIPTextModel

    text = CLIPTextModel(
        CLIPTextConfig(vocab_size=40, hidden_size=12, intermediate_size=24, num_hidden_layers=1,
                       num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
                       pad_token_id=2)
    )  # fmt: skip
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8)
    return StableDiffusionPipeline(
        vae, text, None, unet(), DDIMScheduler(steps_offset=1, clip_sample=False), None, None,
        requires_safety_checker=False,
    )  # fmt: skip


def module(
    name: str, alpha: float | None = 4.0, rank: int = 4, out: int = 16, in_: int = 16
) -> dict[str, Tensor]:
    made = {
        f"{name}.lora_down.weight": torch.ones(rank, in_),
        f"{name}.lora_up.weight": torch.ones(out, rank),
    }
    return made | ({f"{name}.alpha": torch.tensor(alpha)} if alpha is not None else {})


def kohya(**alphas: float | None) -> dict[str, Tensor]:
    """attn1's four layers and ff, each with its own alpha (4 unless given, None for no tensor)."""
    found: dict[str, Tensor] = {}
    for leaf in ("to_q", "to_k", "to_v", "to_out_0"):
        found |= module(f"{K}_attn1_{leaf}", alphas.get(leaf, 4.0))
    return found | module(f"{K}_ff_net_2", alphas.get("ff", 4.0), in_=64)


def _clip(leaf: str, alpha: float | None = 4.0) -> dict[str, Tensor]:
    out = 24 if "fc1" in leaf else 12
    return module(f"lora_te_text_model_encoder_layers_0_{leaf}", alpha, out=out, in_=12)


def _clip_peft(leaf: str) -> dict[str, Tensor]:
    at = f"text_encoder.text_model.encoder.layers.0.{leaf}"
    return {
        f"{at}.lora_A.weight": torch.ones(2, 12),
        f"{at}.lora_B.weight": torch.ones(24 if "fc1" in leaf else 12, 2),
    }


PLAIN = kohya()
FILES: dict[str, dict[str, Tensor]] = {
    "one alpha": PLAIN,
    "one alpha that is not the rank": kohya(to_q=2.0, to_k=2.0, to_v=2.0, to_out_0=2.0, ff=2.0),
    "no alpha": kohya(to_q=None, to_k=None, to_v=None, to_out_0=None, ff=None),
    "an attention layer's own alpha": kohya(to_q=1.0),
    "an MLP's own alpha": kohya(ff=1.0),
    "some without alpha": kohya(to_q=2.0, to_k=2.0, to_v=2.0, to_out_0=None, ff=2.0),
    "mixed ranks": PLAIN | module(f"{K}_attn1_to_q", 4.0, rank=2),
    "text encoder, own alphas": PLAIN
    | _clip("self_attn_q_proj", 1.0)
    | _clip("self_attn_out_proj", 4.0)
    | _clip("mlp_fc1", 1.0),
    "text encoder, no out_proj": PLAIN | _clip("self_attn_q_proj") | _clip("mlp_fc1"),
    "text encoder, all attention": PLAIN
    | {k: v for p in ("q", "k", "v", "out") for k, v in _clip(f"self_attn_{p}_proj").items()},
    "text encoder, q alone": PLAIN | _clip("self_attn_q_proj"),
    "text encoder, MLP alone": PLAIN | _clip("mlp_fc1"),
    "text encoder, PEFT's spelling, MLP alone": _clip_peft("mlp.fc1"),
    "text encoder, PEFT's spelling, both": _clip_peft("mlp.fc1") | _clip_peft("self_attn.v_proj"),
    "dora_scale": PLAIN | {f"{K}_attn1_to_q.dora_scale": torch.ones(16, 1)},
    "lora_mid": PLAIN | {f"{K}_attn1_to_q.lora_mid.weight": torch.ones(4, 4, 1, 1)},
    "loha": {f"{K}_attn1_to_q.hada_w{i}_{h}": torch.ones(16, 4) if h == "a" else torch.ones(4, 16)
             for i in "12" for h in "ab"},
    "lycoris": {k.replace("lora_unet_", "lycoris_"): v for k, v in PLAIN.items()},
    "diffusers": {f"{BLOCK}.attn1.to_q.lora_A.weight": torch.ones(2, 16),
                  f"{BLOCK}.attn1.to_q.lora_B.weight": torch.ones(16, 2)},
    "diffusers with an alpha": {f"{BLOCK}.attn1.to_q.lora_A.weight": torch.ones(2, 16),
                                f"{BLOCK}.attn1.to_q.lora_B.weight": torch.ones(16, 2),
                                f"{BLOCK}.attn1.to_q.alpha": torch.tensor(1.0)},
    "no component": {f"{BLOCK[5:]}.attn1.to_q.lora_A.weight": torch.ones(2, 16),
                     f"{BLOCK[5:]}.attn1.to_q.lora_B.weight": torch.ones(16, 2)},
    "peft": {f"base_model.model.{BLOCK[5:]}.attn1.to_q.lora_A.weight": torch.ones(2, 16),
             f"base_model.model.{BLOCK[5:]}.attn1.to_q.lora_B.weight": torch.ones(16, 2)},
}  # fmt: skip


def said(folder: Path, tensors: dict[str, Tensor], target: str, name: str = "x.safetensors") -> list[Finding]:
    stf.write(folder / name, tensors, {})
    source = open_source(folder / name if "adapter_model" not in name else folder)
    return [f for f in findings(source) if f.target == target]


def scales_in(model: Any, prefix: str) -> dict[str, float]:
    """Path -> the scale that peft's layers have at work."""
    return {
        f"{prefix}{n}": float(m.scaling[a])
        for n, m in model.named_modules()
        if hasattr(m, "scaling")
        for a in m.active_adapters
    }


@pytest.fixture(scope="module")
def drawn() -> Any:
    return pipe()


@pytest.mark.filterwarnings("ignore:The following alpha_pattern keys did not match")
@pytest.mark.parametrize("name", FILES)
def test_diffusers_does_what_is_said(name: str, tmp_path: Path, drawn: Any) -> None:
    tensors = FILES[name]
    found = said(tmp_path, tensors, "diffusers")
    refused = [f for f in found if f.effect == REFUSES]
    try:
        drawn.load_lora_weights(tmp_path, weight_name="x.safetensors", adapter_name="a")
    except ValueError:
        assert refused, name
        return
    finally:
        held = scales_in(drawn.unet, "unet.") | scales_in(drawn.text_encoder, "text_encoder.")
        drawn.unload_lora_weights()
    assert not refused
    heads = {k.partition(".lora_")[0].partition(".dora")[0].removesuffix(".alpha") for k in tensors}
    flat = {p.replace(".", "_"): s for p, s in held.items()}
    lost = {p for f in found if f.effect == DROPS for p in f.modules if "dora" not in f.text}
    wrong = {p for f in found if f.effect == SCALES for p in f.modules}
    for head in heads:
        path = head.removeprefix("base_model.model.").replace("lora_unet_", "unet_").replace(".", "_")
        at = next((p for p in flat if path.endswith(p.removeprefix("unet_")) or _te(path) == p), None)
        if at is None:
            assert head in lost, (head, sorted(flat))
            continue
        assert head not in lost
        A = tensors.get(f"{head}.lora_down.weight", tensors.get(f"{head}.lora_A.weight"))
        assert A is not None
        alpha = tensors.get(f"{head}.alpha")
        meant = float(alpha) / len(A) if alpha is not None else 1.0
        assert (abs(flat[at] - meant) > 1e-6) == (head in wrong), (head, flat[at], meant)
    if name == "dora_scale":
        assert any("dora_scale" in f.text and f.effect == DROPS for f in found)


def _te(path: str) -> str:
    return path.replace("lora_te_text_model_", "text_encoder_").replace(
        "text_encoder_text_model_", "text_encoder_"
    )


@pytest.mark.parametrize("name", ["one alpha", "no alpha", "one alpha that is not the rank", "diffusers"])
def test_nothing_is_said_of_a_file_that_is_right(name: str, tmp_path: Path) -> None:
    assert said(tmp_path, FILES[name], "diffusers") == []


def test_names_that_diffusers_passes_over(tmp_path: Path) -> None:
    from diffusers.loaders.lora_base import _best_guess_weight_name

    for word in ("checkpoint", "scheduler", "optimizer"):
        folder = tmp_path / word
        found = said(folder, PLAIN, "diffusers", f"my-{word}-500.safetensors")
        assert [f.effect for f in found] == [NOTE] and word in found[0].text
        stf.write(folder / "other.safetensors", PLAIN, {})
        assert _best_guess_weight_name(folder) == "other.safetensors"


@pytest.mark.parametrize("case", ["good", "alphas", "no prefix", "no config", "other name"])
def test_peft_does_what_is_said(case: str, tmp_path: Path) -> None:
    from peft import PeftModel

    path = f"base_model.model.{BLOCK[5:]}.attn1.to_q"
    tensors = {f"{path}.lora_A.weight": torch.ones(2, 16), f"{path}.lora_B.weight": torch.ones(16, 2)}
    if case == "alphas":
        tensors[f"{path}.alpha"] = torch.tensor(1.0)
    if case == "no prefix":
        tensors = {k.removeprefix("base_model.model."): v for k, v in tensors.items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": [f"{BLOCK[5:]}.attn1.to_q"]}
    if case != "no config":
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    name = "other.safetensors" if case == "other name" else "adapter_model.safetensors"
    found = said(tmp_path, tensors, "peft", name) if case != "no config" else _no_config(tmp_path, tensors)
    effects = {f.effect for f in found}
    if case in ("no config", "other name"):
        assert effects == {REFUSES}
        with pytest.raises((ValueError, OSError)):
            PeftModel.from_pretrained(unet(), tmp_path)
        return
    if case == "no prefix":
        with pytest.warns(UserWarning, match="missing adapter keys"):
            model = PeftModel.from_pretrained(unet(), tmp_path)
        assert effects == {DROPS}
    else:
        model = PeftModel.from_pretrained(unet(), tmp_path)
        assert effects == (set() if case == "good" else {SCALES})
    ups = [p for n, p in model.named_parameters() if "attn1.to_q.lora_B" in n]
    assert all(bool(p.any()) == (case != "no prefix") for p in ups[:1])
    assert set(scales_in(model, "").values()) == {1.0}  # of the config, whatever the tensor says


def _no_config(folder: Path, tensors: dict[str, Tensor]) -> list[Finding]:
    stf.write(folder / "adapter_model.safetensors", tensors, {})
    source = open_source(folder / "adapter_model.safetensors")
    return [f for f in findings(source) if f.target == "peft"]


COMFY: dict[str, tuple[str, bool]] = {
    "kohya": (f"{K}_attn1_to_q.lora_up.weight", True),
    "kohya, SDXL's own names": ("lora_unet_input_blocks_4_1_proj_in.lora_up.weight", True),
    "old diffusers attention": (f"{BLOCK}.attn1.processor.to_q_lora.up.weight", True),
    "new diffusers attention": (f"{BLOCK}.attn1.to_q.lora_B.weight", False),
    "new diffusers MLP": (f"{BLOCK}.ff.net.2.lora_B.weight", True),
    "diffusers text encoder": (
        "text_encoder.text_model.encoder.layers.0.mlp.fc1.lora_linear_layer.up.weight",
        True,
    ),
    "transformers 5 text encoder": ("text_encoder.encoder.layers.0.mlp.fc1.lora_B.weight", False),
    "peft": (f"base_model.model.{BLOCK[5:]}.attn1.to_q.lora_B.weight", False),
    "flux": ("transformer.single_transformer_blocks.0.attn.to_q.lora_B.weight", True),
    "generic": ("diffusion_model.double_blocks.0.img_attn.qkv.lora_B.weight", True),
    "lycoris loha": ("lycoris_x.hada_w1_a", True),
    "loha": (f"{K}_attn1_to_q.hada_w1_a", True),
    "ia3": (f"{K}_attn1_to_q.on_input", False),
    "nothing known": ("something.lora_B.weight", False),
}


@pytest.mark.parametrize("name", COMFY)
def test_comfyui_looks_for_these_keys_only(name: str, tmp_path: Path) -> None:
    key, known = COMFY[name]
    found = said(tmp_path, {key: torch.ones(16, 4)}, "comfyui")
    assert any(f.effect == DROPS for f in found) != known


def test_comfyui_reads_no_config(tmp_path: Path) -> None:
    """A diffusers file whose header says alpha 2 at rank 4 comes out twice as strong; not so with .alpha tensors."""
    path = "unet.down_blocks.0.attentions.0.proj_in"
    tensors = {f"{path}.lora_A.weight": torch.ones(4, 16), f"{path}.lora_B.weight": torch.ones(16, 4)}
    header = {io.diffusers.HEADER: json.dumps({"unet.r": 4, "unet.lora_alpha": 2})}
    stf.write(tmp_path / "x.safetensors", tensors, header)
    found = [f for f in findings(open_source(tmp_path / "x.safetensors")) if f.target == "comfyui"]
    assert [f.effect for f in found] == [SCALES] and "2 times as strong" in found[0].text
    assert found[0].modules == (path,)
    assert said(tmp_path, kohya(to_q=2.0), "comfyui") == []
    (found,) = said(
        tmp_path, kohya(to_q=0.0), "comfyui"
    )  # alpha 0 is the rank to kohya, and nothing to ComfyUI
    assert found.effect == SCALES and "0 times" in found.text and found.modules == (f"{K}_attn1_to_q",)


def test_an_adapter_of_a_language_model_is_for_peft_alone(tmp_path: Path) -> None:
    tensors = {}
    for part, out in (("q_proj", 4096), ("k_proj", 1024)):
        at = f"base_model.model.model.layers.0.self_attn.{part}"
        tensors |= {f"{at}.lora_A.weight": torch.ones(1, 4096), f"{at}.lora_B.weight": torch.ones(out, 1)}
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1, "lora_alpha": 1}))
    stf.write(tmp_path / "adapter_model.safetensors", tensors, {})
    found = findings(open_source(tmp_path))
    assert {f.target for f in found if f.effect == REFUSES} == {"diffusers", "comfyui"}
    assert not [f for f in found if f.target == "peft"]


def test_what_lolgen_writes_is_taken_as_it_is(tmp_path: Path) -> None:
    x = lora(scale=0.3)
    source = open_source(io.save(x, tmp_path / "k.safetensors", "kohya"))
    assert {f.target for f in findings(source)} == {"peft"}  # which has no config there
    folder = open_source(io.save(x, tmp_path / "p", "peft"))
    assert not [f for f in findings(folder) if f.target == "peft"]
    assert [f.effect for f in findings(folder) if f.target == "diffusers"] == [NOTE]
