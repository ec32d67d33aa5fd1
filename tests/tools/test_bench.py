"""The benchmark measures what it says: the true modules of SDXL, and a report that holds together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lolgen.lora import ModuleSpec, Spec
from train.tools_bench import one_module, sdxl_spec, table, whole_lora


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_the_modules_are_those_of_sdxls_unet() -> None:
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(
            block_out_channels=(320, 640, 1280),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10),
            attention_head_dim=(5, 10, 20),
            cross_attention_dim=2048,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=256,
            projection_class_embeddings_input_dim=2816,
        )
    wanted = {
        f"unet.{name}": (m.out_features, m.in_features)
        for name, m in unet.named_modules()
        if isinstance(m, torch.nn.Linear) and ".attentions." in name
    }
    assert {m.name: m.shape for m in sdxl_spec()} == wanted and len(wanted) == 722


def test_a_small_run(tmp_path: Path) -> None:
    at = "unet.mid_block.attentions.0"
    spec = Spec((ModuleSpec(f"{at}.proj_in", 80, 80), ModuleSpec(f"{at}.proj_out", 80, 90)))
    report = {
        "command": "x",
        "module": one_module([1], side=96),
        "sdxl": whole_lora([1], tmp_path, spec),
    }
    for name, e in report["module"]["errors"].items():
        assert e["above"] < 1e-5, name
        assert 0 < e["optimum"] < 1
    text = table(report)
    assert "One 96 x 96 module at rank 64" in text and "2 modules, rank 64" in text
