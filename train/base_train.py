"""Train the UNet of tiny-sd on cached latents, then assemble the pipeline.

    python -m train.base_train                                              # one process
    accelerate launch --cpu --num_processes 2 -m train.base_train           # two cores
    python -m train.base_train --recipe smoke

The text encoder is frozen (train.clip_train). v-prediction with a zero-terminal-SNR schedule, so that flat
backgrounds come out in their colours. Portrait captions of the train split only; one caption in ten is empty
for classifier-free guidance. What ships is the exponential moving average of the weights.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextModel, CLIPTokenizer

from lolgen import pictures
from lolgen.precision import bf16_matmuls
from train.pictures_render import load_pictures
from train.state import load_state, load_tensors, save_state, save_tensors

RECIPES: dict[str, dict[str, Any]] = {
    "full": {"pictures": 370_000, "batch": 64, "lr": 1.2e-3, "width": (64, 128)},
    "smoke": {"pictures": 16, "batch": 4, "lr": 1e-3, "width": (16, 16)},
}


def build_unet(width: tuple[int, ...], text_width: int) -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=width,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(width),
        up_block_types=("CrossAttnUpBlock2D",) * len(width),
        cross_attention_dim=text_width,
        attention_head_dim=4,  # the number of heads, despite its name
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    return DDIMScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,
    )


@torch.no_grad()
def encode_latents(vae: AutoencoderKL, pixels: Tensor, path: Path) -> Tensor:
    """Posterior means of all pictures, (N, 4, 8, 8) float16, cached in `path`."""
    if not path.exists():
        chunks = tqdm(pixels.split(256), desc="encode", mininterval=10)
        z = torch.cat([vae.encode(c.float() / 127.5 - 1).latent_dist.mode().half() for c in chunks])
        save_tensors(path, {"latents": z}, {})
    return load_tensors(path)[0]["latents"]


def draw_captions(labels: Tensor, style: Tensor, rng: np.random.Generator) -> list[str]:
    texts = []
    for row, s in zip(labels.tolist(), style.tolist(), strict=True):
        if rng.random() < 0.1:
            texts.append("")
        elif s >= 0:
            texts.append(pictures.style_caption(s, str(rng.choice(pictures.PREFIXES))))
        else:
            attributes = {n: v[max(k, 0)] for (n, v), k in zip(pictures.ATTRIBUTES.items(), row, strict=True)}
            texts.append(pictures.random_caption(attributes, rng))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--pictures", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-sd"))
    parser.add_argument("--state", type=Path, default=Path("runs/state/base.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(args.seed)

    vae = AutoencoderKL.from_pretrained(args.out / "vae").eval().requires_grad_(False)
    text_encoder = CLIPTextModel.from_pretrained(args.out / "text_encoder").eval().requires_grad_(False)
    tokenizer = CLIPTokenizer.from_pretrained(args.out / "tokenizer")
    faces = load_pictures(args.pictures, "portraits-train-*")
    styles = load_pictures(args.pictures, "styles-*")
    with accelerator.main_process_first():
        face_z = encode_latents(vae, faces["pixels"], args.state.parent / "latents-faces.safetensors")
        style_z = encode_latents(vae, styles["pixels"], args.state.parent / "latents-styles.safetensors")

    scheduler = build_scheduler()
    alphas = scheduler.alphas_cumprod.to(accelerator.device)
    unet = build_unet(recipe["width"], text_encoder.config.hidden_size)
    ema = build_unet(recipe["width"], text_encoder.config.hidden_size)
    ema.load_state_dict(unet.state_dict())
    optimizer = torch.optim.AdamW(unet.parameters(), lr=recipe["lr"], weight_decay=1e-2, betas=(0.9, 0.99))
    start = 0
    if args.state.exists():
        start = load_state(args.state, {"unet": unet, "ema": ema}, optimizer)["pictures"]
    if not torch.cuda.is_available():
        bf16_matmuls(unet.to(memory_format=torch.channels_last))
    ema.to(accelerator.device)
    text_encoder.to(accelerator.device)
    net, optimizer = accelerator.prepare(unet, optimizer)
    world, rank = accelerator.num_processes, accelerator.process_index
    batch, total = recipe["batch"], recipe["pictures"]
    n_style = batch // 3
    saved, losses = time.time(), []
    bar = tqdm(total=total, initial=start, unit="pic", mininterval=10, disable=rank > 0)
    for done in range(start, total, batch * world):
        g = torch.Generator().manual_seed((args.seed * 1_000_003 + done) * 16 + rank)
        rng = np.random.default_rng([args.seed, done, rank])
        i = torch.randint(len(face_z), (batch - n_style,), generator=g)
        j = torch.randint(len(style_z), (n_style,), generator=g)
        z = torch.cat([face_z[i], style_z[j]]).float()
        texts = draw_captions(
            torch.cat([faces["labels"][i], styles["labels"][j]]),
            torch.cat([faces["style"][i], styles["style"][j]]),
            rng,
        )
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
        noise = torch.randn(z.shape, generator=g)
        t = torch.randint(0, 1000, (batch,), generator=g)
        z, noise, t, ids = (v.to(accelerator.device) for v in (z, noise, t, ids))
        with torch.no_grad():
            states = text_encoder(ids).last_hidden_state
        a = alphas[t].sqrt().view(-1, 1, 1, 1)
        s = (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        lr = (
            recipe["lr"]
            * min(1, (done + 1) / 20_000)
            * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * done / total)))
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        v = net(a * z + s * noise, t, states, return_dict=False)[0]
        loss = F.mse_loss(v, a * noise - s * z)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        seen = done + batch * world
        decay = min(0.9995, (seen / batch / world + 1) / (seen / batch / world + 20))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(unet.parameters()), 1 - decay)
        losses.append(float(loss.detach()))
        bar.update(batch * world)
        if len(losses) == 100:
            bar.set_postfix(loss=f"{sum(losses) / 100:.4f}", lr=f"{lr:.1e}")
            losses = []
        if rank == 0 and (time.time() - saved > 120 or seen >= total):
            save_state(args.state, {"unet": unet, "ema": ema}, optimizer, {"pictures": seen})
            saved = time.time()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        assemble(args.out, ema.cpu(), vae, text_encoder.cpu(), tokenizer)


def assemble(
    out: Path,
    unet: UNet2DConditionModel,
    vae: AutoencoderKL,
    text_encoder: CLIPTextModel,
    tokenizer: CLIPTokenizer,
) -> None:
    """Write a stock StableDiffusionPipeline folder."""
    StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out)


if __name__ == "__main__":
    main()
