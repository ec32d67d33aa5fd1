"""Train the autoencoder of tiny-sd: 32 x 32 pictures to 8 x 8 latents of 4 channels.

    python -m train.vae_train                       # 93,000 pictures, about 13 min on one core
    python -m train.vae_train --recipe smoke        # two steps

Loss: L1 + squared error + L1 of the spatial gradients + a small KL (flat cartoons have sharp edges, and
edges carry the attributes). At the end the latents are brought to mean 0 and deviation 1 per channel by
folding the affine map into the two 1 x 1 convolutions around them, since a pipeline knows one scalar only.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from train.pictures_render import load_pictures
from train.state import load_state, save_state

RECIPES: dict[str, dict[str, Any]] = {
    "full": {"steps": 2900, "batch": 32, "lr": 1.5e-3, "width": (32, 64, 64)},
    "smoke": {"steps": 2, "batch": 4, "lr": 1e-3, "width": (8, 8, 8)},
}


def build_vae(width: tuple[int, ...]) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=width,
        down_block_types=("DownEncoderBlock2D",) * len(width),
        up_block_types=("UpDecoderBlock2D",) * len(width),
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=1,
        sample_size=32,
        scaling_factor=1.0,
    )


def gradient_loss(a: Tensor, b: Tensor) -> Tensor:
    dx = (a[..., 1:] - a[..., :-1]) - (b[..., 1:] - b[..., :-1])
    dy = (a[..., 1:, :] - a[..., :-1, :]) - (b[..., 1:, :] - b[..., :-1, :])
    return dx.abs().mean() + dy.abs().mean()


@torch.no_grad()
def psnr(vae: AutoencoderKL, x: Tensor) -> float:
    y = torch.cat([vae.decode(vae.encode(c).latent_dist.mode()).sample.clamp(-1, 1) for c in x.split(64)])
    return float((-10 * ((x - y) / 2).square().flatten(1).mean(1).log10()).mean())


@torch.no_grad()
def standardise_latents(vae: AutoencoderKL, x: Tensor) -> None:
    """Fold `z -> (z - mean) / std` per channel into quant_conv, and its inverse into post_quant_conv."""
    z = torch.cat([vae.encode(c).latent_dist.mode() for c in x.split(64)])
    mean, std = z.mean((0, 2, 3)), z.std((0, 2, 3))
    n = len(mean)
    q, p = vae.quant_conv, vae.post_quant_conv
    q.weight[:n] /= std[:, None, None, None]
    q.bias[:n] = (q.bias[:n] - mean) / std
    q.bias[n:] -= 2 * std.log()  # the log-variance moves with the scale
    p.bias += p.weight[:, :, 0, 0] @ mean  # before the weight is rescaled: W(std z + mean) + b
    p.weight *= std[None, :, None, None]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--pictures", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-sd/vae"))
    parser.add_argument("--state", type=Path, default=Path("runs/state/vae.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(args.seed)

    faces = load_pictures(args.pictures, "portraits-train-*")["pixels"]
    styles = load_pictures(args.pictures, "styles-*")["pixels"]
    held = load_pictures(args.pictures, "portraits-validation-*")["pixels"][:512].float() / 127.5 - 1
    vae = build_vae(recipe["width"]).to(memory_format=torch.channels_last)
    ema = build_vae(recipe["width"])
    ema.load_state_dict(vae.state_dict())
    optimizer = torch.optim.AdamW(vae.parameters(), lr=recipe["lr"], weight_decay=1e-3, betas=(0.9, 0.99))
    start = 0
    if args.state.exists():
        start = load_state(args.state, {"vae": vae, "ema": ema}, optimizer)["step"]
    vae, optimizer = accelerator.prepare(vae, optimizer)
    saved = time.time()
    bar = tqdm(range(start, recipe["steps"]), initial=start, total=recipe["steps"], mininterval=10)
    for step in bar:
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        n_style = int(recipe["batch"] * 0.3)
        x = torch.cat(
            [
                faces[torch.randint(len(faces), (recipe["batch"] - n_style,), generator=g)],
                styles[torch.randint(len(styles), (n_style,), generator=g)],
            ]
        )
        x = (x.float() / 127.5 - 1).to(accelerator.device, memory_format=torch.channels_last)
        lr = (
            recipe["lr"]
            * min(1, (step + 1) / 100)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe["steps"])))
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        with torch.autocast(accelerator.device.type, torch.bfloat16):
            posterior = vae.encode(x).latent_dist
            z = posterior.mean.float() + posterior.std.float() * torch.randn(
                posterior.mean.shape, generator=g
            ).to(x)
            y = vae.decode(z).sample
        y = y.float()
        loss = F.l1_loss(y, x) + F.mse_loss(y, x) + gradient_loss(y, x)
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        accelerator.backward(loss + 1e-3 * kl)
        accelerator.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.999, (step + 1) / (step + 10))
        with torch.no_grad():
            for p, q in zip(ema.parameters(), vae.parameters(), strict=True):
                p.lerp_(q, 1 - decay)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.4f}", kl=f"{float(kl.detach()):.2f}")
        if (step + 1) % 500 == 0:
            tqdm.write(f"step {step + 1}: PSNR {psnr(ema, held):.2f} dB")
        if time.time() - saved > 120 or step + 1 == recipe["steps"]:
            save_state(args.state, {"vae": vae, "ema": ema}, optimizer, {"step": step + 1})
            saved = time.time()
    standardise_latents(ema, torch.cat([held, styles[:256].float() / 127.5 - 1]))
    print(f"PSNR on held-out portraits: {psnr(ema, held):.2f} dB")
    ema.to(memory_format=torch.contiguous_format).save_pretrained(args.out)


if __name__ == "__main__":
    main()
