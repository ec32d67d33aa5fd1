"""Miniature base models of every diffusion family, their LoRAs, and the weights merged by hand as the reference."""

from __future__ import annotations

import copy
from typing import Any

import torch
from adapters import double, linear_spec, random, relative
from adapters import pipeline as sd1_pipeline
from torch import Tensor, nn

from lolgen.lora import LoRA, ModuleSpec, Spec

TEXT = {"vocab_size": 40, "intermediate_size": 12, "num_hidden_layers": 2, "num_attention_heads": 2,
        "max_position_embeddings": 8, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}  # fmt: skip


def clip(hidden: int, projection: bool) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    torch.manual_seed(1)
    config = CLIPTextConfig(hidden_size=hidden, projection_dim=6, **TEXT)
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def vae() -> Any:
    from diffusers import AutoencoderKL

    torch.manual_seed(2)
    return AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8).eval()


def sdxl_pipeline() -> Any:
    """SDXL's block structure (no attention in the first block, deeper transformers below), two text encoders."""
    from diffusers import DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=14,
        attention_head_dim=4,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=2,
        projection_class_embeddings_input_dim=6 + 6 * 2,
    )
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionXLPipeline(
        vae(), clip(6, False), clip(8, True), None, None, unet.eval(), scheduler, add_watermarker=False
    )


def flux_pipeline(heads: int = 2, width: int = 8, double_blocks: int = 2, single_blocks: int = 2) -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel

    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=double_blocks,
        num_single_layers=single_blocks,
        attention_head_dim=width,
        num_attention_heads=heads,
        joint_attention_dim=10,
        pooled_projection_dim=6,
        guidance_embeds=True,
        axes_dims_rope=(2, 2, width - 4),
    )
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), vae(), clip(6, False), None, None, None, transformer.eval()
    )


def sd3_pipeline() -> Any:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    torch.manual_seed(0)
    transformer = SD3Transformer2DModel(
        sample_size=8,
        patch_size=2,
        in_channels=4,
        num_layers=3,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=10,
        caption_projection_dim=16,
        pooled_projection_dim=12,
        out_channels=4,
        pos_embed_max_size=8,
        dual_attention_layers=(0,),
    )
    return StableDiffusion3Pipeline(
        transformer.eval(), FlowMatchEulerDiscreteScheduler(), vae(), clip(6, True), None, clip(8, True), None,
        None, None,
    )  # fmt: skip


PIPELINES = {
    "sd1": sd1_pipeline, "sdxl": sdxl_pipeline, "flux": flux_pipeline, "sd3": sd3_pipeline
}  # fmt: skip


def components(pipe: Any) -> dict[str, nn.Module]:
    """The models that adapters are for, by their component's name."""
    names = ("unet", "transformer", "text_encoder", "text_encoder_2")
    return {n: m for n in names if isinstance(m := getattr(pipe, n, None), nn.Module)}


def prefix(part: str, model: nn.Module) -> str:
    """What our names put before a model's own paths."""
    flat = part.startswith("text") and not any(n.startswith("text_model") for n, _ in model.named_modules())
    return f"{part}.text_model." if flat else f"{part}."


def spec_of(pipe: Any, ends: tuple[str, ...] = ("",), without: tuple[str, ...] = ()) -> Spec:
    """Every linear and conv module of a pipeline's models whose path ends so, in our names."""
    found: list[ModuleSpec] = []
    for part, model in components(pipe).items():
        found += [m for m in linear_spec(model, prefix(part, model), ends) if not m.name.endswith(without)]
    return Spec(tuple(found))


def random_ranks(spec: Spec, seed: int = 0) -> LoRA:
    """A LoRA of ranks 1 to 4."""
    g = torch.Generator().manual_seed(seed)
    ranks = {n: int(torch.randint(1, 5, (), generator=g)) for n in spec.names}
    return scaled(random(spec, ranks, seed=seed), 0.05)


def scaled(lora: LoRA, size: float) -> LoRA:
    from lolgen import gl

    return gl.scale(lora, size)


def inputs(part: str, model: Any) -> dict[str, Any]:
    """What to call a model with."""
    g = torch.Generator().manual_seed(3)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=g)

    if part == "unet":
        x: dict[str, Any] = {
            "sample": noise(2, 4, 8, 8),
            "timestep": torch.tensor(7),
            "encoder_hidden_states": noise(2, 5, model.config.cross_attention_dim),
        }
        if model.config.addition_embed_type:
            x["added_cond_kwargs"] = {"text_embeds": noise(2, 6), "time_ids": torch.ones(2, 6)}
        return x
    if part.startswith("text"):
        return {"input_ids": torch.tensor([[0, 5, 9, 11, 1, 2, 2, 2]])}
    if "dual_attention_layers" in model.config:
        return {
            "hidden_states": noise(2, 4, 8, 8),
            "encoder_hidden_states": noise(2, 5, 10),
            "pooled_projections": noise(2, 12),
            "timestep": torch.tensor([7.0, 9.0]),
        }
    return {
        "hidden_states": noise(2, 9, 4),
        "encoder_hidden_states": noise(2, 5, 10),
        "pooled_projections": noise(2, 6),
        "timestep": torch.tensor([0.3, 0.7]),
        "guidance": torch.tensor([2.0, 3.0]),
        "img_ids": noise(9, 3),
        "txt_ids": noise(5, 3),
    }


@torch.no_grad()
def output(part: str, model: Any) -> Tensor:
    """What a model gives for `inputs`, all in one row."""
    found = model(**inputs(part, model))
    return torch.cat([t.flatten() for t in found.to_tuple() if isinstance(t, Tensor)])


def merged(part: str, model: nn.Module, lora: LoRA) -> nn.Module:
    """A copy of the model with W + delta W, delta W added in float64 by hand."""
    model = copy.deepcopy(model)
    modules, before, hit = dict(model.named_modules()), prefix(part, model), 0
    for spec in lora.spec:
        if not spec.name.startswith(f"{part}."):
            continue
        weight: Any = modules[spec.name.removeprefix(before)].weight
        delta = double(lora[spec.name])
        delta = delta.T if weight.shape != spec.shape and weight.ndim == 2 else delta
        weight.data = (weight.data.double() + delta.reshape(weight.shape)).float()
        hit += 1
    assert hit, part
    return model


def assert_acts_like(
    pipe: Any, reference: dict[str, Tensor], plain: dict[str, Tensor], error: float = 1e-4
) -> None:
    """The pipeline's models, adapter and all, give the reference's outputs, which are not the plain ones.

    The outputs of networks in float32 differ by rounding through all layers, which is what `error` allows.
    """
    for part, wanted in reference.items():
        found = output(part, components(pipe)[part])
        moved = relative(plain[part], wanted)
        assert moved > 100 * error, f"{part}: the adapter does nothing that could be seen"
        assert relative(found, wanted) <= error, part
