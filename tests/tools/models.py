"""Small randomly initialised models that stock peft and diffusers load adapters into."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lolgen.lora import ModuleSpec, Spec


class Net(nn.Module):
    """An embedding, two convs and two linear layers; one vector a row of token numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 8)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.conv1x1 = nn.Conv2d(4, 2, 1)
        self.fc = nn.Linear(2 * 5 * 8, 12)
        self.head = nn.Linear(12, 9)

    def forward(self, ids: Tensor, **_: Any) -> Tensor:
        x = self.conv1x1(self.conv(self.embed(ids)[:, None]))  # (N, 2, 5, 8)
        return self.head(self.fc(x.flatten(1)).tanh())


NET = Spec(
    (
        ModuleSpec("embed", 8, 20, (), "embedding"),
        ModuleSpec("conv", 4, 1, (3, 3), "conv"),
        ModuleSpec("conv1x1", 2, 4, (1, 1), "conv"),
        ModuleSpec("fc", 12, 80),
        ModuleSpec("head", 9, 12),
    )
)
IDS = torch.arange(15).reshape(3, 5)


def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


def pipeline() -> Any:
    """A StableDiffusionPipeline with a UNet of two blocks and no text."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=6,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=40,
            hidden_size=6,
            intermediate_size=12,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )
    vae = AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4, sample_size=8)
    scheduler = DDIMScheduler(steps_offset=1, clip_sample=False)
    return StableDiffusionPipeline(
        vae.eval(),
        text.eval(),
        None,
        unet.eval(),
        scheduler,
        None,
        None,
        requires_safety_checker=False,
    )


def unet_spec(unet: nn.Module, ends: tuple[str, ...]) -> Spec:
    """The linear and conv layers of a UNet whose path ends so."""
    found = []
    for name, m in unet.named_modules():
        if name.endswith(ends) and isinstance(m, nn.Linear):
            found.append(ModuleSpec(f"unet.{name}", m.out_features, m.in_features))
        elif name.endswith(ends) and isinstance(m, nn.Conv2d):
            kernel = (m.kernel_size[0], m.kernel_size[1])
            found.append(ModuleSpec(f"unet.{name}", m.out_channels, m.in_channels, kernel, "conv"))
    return Spec(tuple(found))


def answer(unet: nn.Module) -> Tensor:
    """What a UNet says to one fixed noisy picture."""
    g = torch.Generator().manual_seed(1)
    x, states = torch.randn(1, 4, 8, 8, generator=g), torch.randn(1, 3, 6, generator=g)
    with torch.no_grad():
        found: Tensor = unet(x, torch.tensor([500]), states).sample
    return found
