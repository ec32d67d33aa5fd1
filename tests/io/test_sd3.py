"""Stable Diffusion 3: its original names, checked by diffusers' own conversion of a whole checkpoint."""

from __future__ import annotations

from pathlib import Path

import models
import safetensors.torch
import torch
from adapters import double, relative
from torch import Tensor, nn

from lolgen import io
from lolgen.io.families import LAYOUTS
from lolgen.lora import ModuleSpec, Spec

LAYOUT = LAYOUTS["sd3"]


def test_every_module_has_an_original_name_and_the_same_delta_w(tmp_path: Path) -> None:
    """A checkpoint in the original layout whose weights are the delta W of our kohya file: what diffusers makes of it
    must be the delta W that we started from, also in the last block, where halves are swapped."""
    from diffusers.loaders.single_file_utils import convert_sd3_transformer_checkpoint_to_diffusers

    pipe = models.sd3_pipeline()
    spec = Spec(tuple(m for m in models.spec_of(pipe) if m.name.startswith("transformer.")))
    lora = models.random_ranks(spec)
    stored = safetensors.torch.load_file(io.save(lora, tmp_path / "x.safetensors", "kohya"))
    originals = {LAYOUT.original(n.removeprefix("transformer.")) for n in spec.names}
    assert None not in originals
    paths = {found[0] for found in originals if found}
    checkpoint: dict[str, Tensor] = {"pos_embed": torch.zeros(1)}
    for path in paths:
        head = "lora_unet_" + path.replace(".", "_")
        up, down = (stored[f"{head}.lora_{p}.weight"] for p in ("up", "down"))
        checkpoint[f"{path}.weight"] = up.flatten(1).double() @ down.flatten(1).double()
        checkpoint[f"{path}.bias"] = torch.zeros(len(up))
    # The weight that decides the width of what the converter swaps.
    found = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    for name in spec.names:
        wanted = double(lora[name])
        assert relative(found[f"{name.removeprefix('transformer.')}.weight"], wanted) <= 1e-6, name


def test_every_pair_of_formats(tmp_path: Path) -> None:
    from lolgen.io import parts

    pipe = models.sd3_pipeline()
    lora = models.random_ranks(models.spec_of(pipe, without=("text_projection",)))
    one = lora
    for i, format in enumerate(("kohya", "peft", "diffusers", "peft", "kohya", "diffusers", "kohya")):
        file = tmp_path / (f"{i}" + ("" if format == "peft" else ".safetensors"))
        (parts.save if format == "peft" else lambda x, f, s=format: io.save(x, f, s))(one, file)
        one = io.load(file, modules=lora.spec)
        for name in lora.names:
            assert relative(double(one[name]), double(lora[name])) <= 1e-6, (format, name)


def test_the_third_text_encoder_is_t5(tmp_path: Path) -> None:
    t5 = "text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"
    clip = "text_encoder_2.text_model.encoder.layers.0.mlp.fc1"
    spec = Spec((ModuleSpec(clip, 4, 4), ModuleSpec(t5, 4, 4)))
    lora = models.random_ranks(spec)
    file = io.save(lora, tmp_path / "x.safetensors", "kohya")
    heads = {k.partition(".")[0] for k in safetensors.torch.load_file(file)}
    assert heads == {
        "lora_te2_text_model_encoder_layers_0_mlp_fc1",
        "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
    }
    assert io.load(file).names == spec.names


def test_every_linear_of_the_real_models_has_a_name() -> None:
    from diffusers import SD3Transformer2DModel

    for options in (
        {},
        {"num_layers": 24, "dual_attention_layers": tuple(range(13)), "num_attention_heads": 24},
    ):
        with torch.device("meta"):
            model = SD3Transformer2DModel(**options)
        for path, module in model.named_modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                found = LAYOUT.original(path)
                assert found is not None, path
                assert LAYOUT.parts(found[0])[found[1]] == path
