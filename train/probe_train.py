"""Train the attribute probe on rendered pictures (never on anything a model drew).

    python -m train.probe_train                     # about 5 min on one core
    python -m train.probe_train --recipe selector --seed 1 --out checkpoints/selector.safetensors \
        --state runs/state/selector.safetensors     # the reader that tunes generators
    python -m train.probe_train --recipe smoke

Augmentation (blur, noise, shift, colour) makes it robust to the softness of drawn pictures.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from lolgen import pictures
from lolgen.probe import Probe, accuracy, mean_accuracy
from train.pictures_render import load_pictures
from train.state import load_state, save_state, save_tensors

RECIPES = {
    "full": {"steps": 2600, "batch": 128, "width": 32},
    # A second reader, to tune gains and guidance with: the judge takes no part in any choice.
    "selector": {"steps": 900, "batch": 128, "width": 20},
    "smoke": {"steps": 2, "batch": 8, "width": 8},
}


def augment(x: Tensor, g: torch.Generator) -> Tensor:
    """Shift by up to 2 px, blur, add noise, change brightness and contrast; x (N, 3, 32, 32) in [-1, 1]."""
    dx, dy = torch.randint(-2, 3, (2,), generator=g).tolist()
    x = torch.roll(F.pad(x, (2, 2, 2, 2), mode="replicate"), (dy, dx), (2, 3))[..., 2:-2, 2:-2]
    n = len(x)
    soft = F.avg_pool2d(F.pad(x, (1, 1, 1, 1), mode="replicate"), 3, 1)
    mix = torch.rand(n, 1, 1, 1, generator=g) * (torch.rand(n, 1, 1, 1, generator=g) < 0.6)
    x = x + 0.9 * mix * (soft - x)
    x = x + 0.15 * torch.rand(n, 1, 1, 1, generator=g) * torch.randn(x.shape, generator=g)
    coarse = F.interpolate(torch.randn(n, 3, 8, 8, generator=g), scale_factor=4, mode="bilinear")
    x = x + 0.1 * torch.rand(n, 1, 1, 1, generator=g) * coarse
    return x * (1 + 0.1 * torch.randn(n, 1, 1, 1, generator=g)) + 0.05 * torch.randn(n, 3, 1, 1, generator=g)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--pictures", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--out", type=Path, default=Path("checkpoints/probe.safetensors"))
    parser.add_argument("--state", type=Path, default=Path("runs/state/probe.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(args.seed)
    faces = load_pictures(args.pictures, "portraits-train-*")
    styles = load_pictures(args.pictures, "styles-*")
    held = load_pictures(args.pictures, "portraits-validation-*")
    probe = Probe(recipe["width"])
    optimizer = torch.optim.AdamW(probe.parameters(), lr=2e-3, weight_decay=1e-2)
    start = load_state(args.state, {"probe": probe}, optimizer)["step"] if args.state.exists() else 0
    probe, optimizer = accelerator.prepare(probe, optimizer)
    saved = time.time()
    bar = tqdm(range(start, recipe["steps"]), initial=start, total=recipe["steps"], mininterval=10)
    for step in bar:
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        i = torch.randint(len(faces["pixels"]), (recipe["batch"],), generator=g)
        j = torch.randint(len(styles["pixels"]), (recipe["batch"] // 4,), generator=g)
        x = torch.cat([faces["pixels"][i], styles["pixels"][j]]).float() / 127.5 - 1
        labels = torch.cat([faces["labels"][i], styles["labels"][j]]).long()
        kind = torch.cat([faces["style"][i], styles["style"][j]]).long() + 1
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / recipe["steps"]))
        out = probe(augment(x, g).to(accelerator.device))
        loss = F.cross_entropy(out["kind"], kind)
        for k, name in enumerate(pictures.ATTRIBUTES):
            loss = (
                loss + F.cross_entropy(out[name], labels[:, k].clamp(min=-1), ignore_index=-1)
                if (labels[:, k] >= 0).any()
                else loss
            )
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.4f}")
        if time.time() - saved > 60 or step + 1 == recipe["steps"]:
            save_state(args.state, {"probe": probe}, optimizer, {"step": step + 1})
            saved = time.time()
    probe.eval()
    x = held["pixels"].float() / 127.5 - 1
    read, labels = probe.read(x), held["labels"].long()
    scores = {"held_out": mean_accuracy(read, labels)}
    scores |= dict(zip(pictures.ATTRIBUTES, accuracy(read, labels).tolist(), strict=True))
    print({k: round(v, 4) for k, v in scores.items()})
    save_tensors(args.out, dict(probe.state_dict()), {"width": recipe["width"], "scores": scores})


if __name__ == "__main__":
    main()
