"""Small LoRAs and small base models that the tests of files share."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lolgen.lora import Factors, LoRA, ModuleSpec, Spec

ATTENTION = "unet.down_blocks.0.attentions.0.transformer_blocks.0"
SD = Spec(
    (
        ModuleSpec("text_encoder.text_model.encoder.layers.0.mlp.fc1", 16, 8),
        ModuleSpec("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", 8, 8),
        ModuleSpec("unet.conv_in", 8, 4, (3, 3), "conv"),
        ModuleSpec("unet.down_blocks.0.attentions.0.proj_in", 8, 8, (1, 1), "conv"),
        ModuleSpec(f"{ATTENTION}.attn1.to_out.0", 8, 8),
        ModuleSpec(f"{ATTENTION}.attn1.to_q", 8, 8),
        ModuleSpec(f"{ATTENTION}.attn2.to_v", 8, 6),
        ModuleSpec("unet.down_blocks.10.resnets.0.conv1", 5, 4, (3, 3), "conv"),
    )
)
"""Linear, 3x3 and 1x1 conv modules of a UNet and a CLIP text encoder, in the order of a loaded file."""
UNET = Spec(tuple(m for m in SD if m.name.startswith("unet.")))
LLM = Spec(
    (
        ModuleSpec("model.embed_tokens", 8, 20, (), "embedding"),
        ModuleSpec("model.layers.0.self_attn.q_proj", 8, 8),
        ModuleSpec("model.layers.1.mlp.up_proj", 16, 8),
    )
)


def random(
    spec: Spec,
    ranks: int | Mapping[str, int] = 4,
    scale: float = 0.7,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> LoRA:
    """A LoRA with random factors, one rank for all or one a module."""
    g = torch.Generator().manual_seed(seed)
    factors = {}
    for m in spec:
        r = ranks if isinstance(ranks, int) else ranks.get(m.name, 4)
        B = torch.randn(m.out, r, generator=g, dtype=torch.float64)
        A = torch.randn(r, m.in_flat, generator=g, dtype=torch.float64)
        factors[m.name] = Factors(B.to(dtype), A.to(dtype), scale)
    return LoRA(spec, factors)


def mixed(spec: Spec) -> dict[str, int]:
    """Ranks 1, 2, 3, 4, 4, ... over the modules."""
    return {name: min(i + 1, 4) for i, name in enumerate(spec.names)}


def relative(found: Tensor, wanted: Tensor) -> float:
    """Relative Frobenius error, in float64."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-30))


def assert_same(found: LoRA, wanted: LoRA, error: float = 1e-6) -> None:
    """The same modules in the same order, and delta W within a relative error."""
    assert found.spec == wanted.spec
    assert found.ranks == wanted.ranks
    for name in wanted.names:
        assert relative(double(found[name]), double(wanted[name])) <= error, name


def double(factors: Factors) -> Tensor:
    """delta W in float64."""
    return factors.scale * factors.B.double() @ factors.A.double()


def tree(folder: Path) -> dict[str, bytes]:
    """Every file under a folder and what is in it."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


class Mixed(nn.Module):
    """One of every kind of layer that PEFT adapts; gives one vector a row of token numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv1d = nn.Conv1d(8, 6, 3, padding=1)
        self.conv2d = nn.Conv2d(1, 4, 3, padding=1)
        self.conv1x1 = nn.Conv2d(4, 2, 1)
        self.fc = nn.Linear(2 * 6 * 5, 7)
        self.inner = nn.ModuleDict({"fc": nn.Linear(7, 9)})
        self.head = nn.Linear(9, 3)

    def forward(self, ids: Tensor, **_: Any) -> Tensor:
        x = self.conv1d(self.embed(ids).mT)  # (N, 6, 5)
        x = self.conv1x1(self.conv2d(x[:, None]))  # (N, 2, 6, 5)
        return self.head(self.inner["fc"](self.fc(x.flatten(1)).tanh()).tanh())


def unet() -> Any:
    """A diffusers UNet2DConditionModel of two blocks."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=6,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def text_encoder() -> Any:
    """A CLIPTextModel of two layers."""
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(1)
    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=40,
            hidden_size=6,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    ).eval()


def pipeline() -> Any:
    """A StableDiffusionPipeline with the two models above and no tokenizer (prompts go in as embeddings)."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline

    torch.manual_seed(2)
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8)
    return StableDiffusionPipeline(
        vae.eval(),
        text_encoder(),
        None,
        unet(),
        DDIMScheduler(steps_offset=1, clip_sample=False),
        None,
        None,
        requires_safety_checker=False,
    )


def linear_spec(model: nn.Module, prefix: str, ends: tuple[str, ...]) -> Spec:
    """Spec of the linear and conv layers of a model whose path ends so."""
    found = []
    for name, m in model.named_modules():
        if not name.endswith(ends):
            continue
        if isinstance(m, nn.Linear):
            found.append(ModuleSpec(prefix + name, m.out_features, m.in_features))
        elif isinstance(m, nn.Conv2d):
            kernel = (m.kernel_size[0], m.kernel_size[1])
            found.append(ModuleSpec(prefix + name, m.out_channels, m.in_channels, kernel, "conv"))
    return Spec(tuple(found))
