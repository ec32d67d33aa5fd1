"""Train tiny-sd further, on new pictures: the second base of the cross-model row (what SD1.5 is to SD1.4).

    python -m train.base_further                     # 5 min on one core; checkpoints/tiny-sd-further

Only the UNet moves. Portraits are of the train split, as before, but drawn anew.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from lolgen import pictures
from lolgen.base import Base
from lolgen.paths import checkpoints_dir
from lolgen.precision import bf16_matmuls
from lolgen.quiet import load_stock_pipeline
from train.base_train import draw_captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/tiny-sd-further"))
    parser.add_argument("--portraits", type=int, default=4000)
    parser.add_argument("--styles", type=int, default=1000)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=101)
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = args.base or checkpoints_dir() / "tiny-sd"
    base = Base.load(folder)
    rng = np.random.default_rng(args.seed)
    people = [pictures.sample_identity(rng, "train") for _ in range(args.portraits)]
    kinds = rng.integers(0, len(pictures.STYLES), args.styles)
    pixels = [pictures.draw_portrait(p, rng) for p in people] + [
        pictures.draw_style(int(s), rng) for s in kinds
    ]
    latents = base.encode(torch.from_numpy(np.stack(pixels)))
    labels = torch.tensor(
        [pictures.labels(p.attributes) for p in people] + [[-2] * len(pictures.ATTRIBUTES)] * args.styles
    )
    style = torch.tensor([-1] * args.portraits + kinds.tolist())

    unet = base.unet.requires_grad_(True)
    before = {n: p.detach().clone() for n, p in unet.named_parameters()}
    bf16_matmuls(unet)
    average = {n: p.detach().clone() for n, p in unet.named_parameters()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=args.lr, weight_decay=1e-2, betas=(0.9, 0.99))
    alphas = base.scheduler.alphas_cumprod
    g = torch.Generator().manual_seed(args.seed)
    for step in (bar := tqdm(range(args.steps), mininterval=5)):
        for group in optimizer.param_groups:
            group["lr"] = args.lr * min(1, (step + 1) / 50) * (1 - step / args.steps)
        i = torch.randint(len(latents), (args.batch,), generator=g)
        z, noise = latents[i], torch.randn(args.batch, *latents.shape[1:], generator=g)
        t = torch.randint(0, 1000, (args.batch,), generator=g)
        states = base.text(draw_captions(labels[i], style[i], rng))
        a, s = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        loss = F.mse_loss(unet(a * z + s * noise, t, states, return_dict=False)[0], a * noise - s * z)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for n, p in unet.named_parameters():
                average[n].lerp_(p, 0.01)
        bar.set_postfix(loss=f"{float(loss):.4f}")
    moved = sum(float((average[n] - before[n]).square().sum()) for n in before)
    size = sum(float(p.square().sum()) for p in before.values())
    print(f"weights moved by {(moved / size) ** 0.5:.3f} of their size")

    staged = args.out.with_name(f".{args.out.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    pipe = load_stock_pipeline(str(folder))
    pipe.unet.load_state_dict(average)
    for part in (pipe.unet, pipe.vae):
        part.half()
    pipe.save_pretrained(staged)
    for path in staged.rglob("*.json"):
        # diffusers writes down the folder that it loaded from.
        facts = json.loads(path.read_text("utf-8"))
        if isinstance(facts, dict) and facts.pop("_name_or_path", None):
            path.write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    shutil.copytree(folder / "clip", staged / "clip")
    shutil.rmtree(args.out, ignore_errors=True)
    staged.rename(args.out)


if __name__ == "__main__":
    main()
