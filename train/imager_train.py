"""Train the reader that inverts a picture: attributes and drawings off rendered portraits.

    python -m train.imager_train                     # about 6 min on one core; checkpoints/faces/imager.safetensors
    python -m train.imager_train --recipe smoke

Portraits of the train split are rendered by the way (a minute), with the drawing of every part known; pictures of the
ten styles teach it what is no portrait. Held-out accuracy is on portraits of the validation split.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from lolgen import pictures
from lolgen.conditions import DRAWINGS
from lolgen.imager import Imager
from lolgen.probe import accuracy, mean_accuracy
from train.probe_train import augment
from train.state import load_state, save_state, save_tensors

RECIPES = {
    "full": {"steps": 1500, "batch": 128, "width": 24, "portraits": 24000, "styles": 3000, "held": 2000},
    "smoke": {"steps": 2, "batch": 8, "width": 8, "portraits": 20, "styles": 10, "held": 10},
}


def render(split: str, count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(pixels (N, 3, 32, 32) uint8, labels (N, 6), drawings (N, 7)), -1 where not visible."""
    rng = np.random.default_rng([seed, 23, len(split)])
    pixels, labels, drawings = [], [], []
    for _ in tqdm(range(count), desc=f"{split} portraits", mininterval=5):
        identity = pictures.sample_identity(rng, split)
        pixels.append(pictures.draw_portrait(identity, rng))
        labels.append(pictures.labels(identity.attributes))
        drawings.append(
            [
                getattr(identity, part) if shown is None or identity.attributes[attribute] == shown else -1
                for part, attribute, shown, _ in DRAWINGS
            ]
        )
    return torch.from_numpy(np.stack(pixels)), torch.tensor(labels), torch.tensor(drawings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/faces/imager.safetensors"))
    parser.add_argument("--state", type=Path, default=Path("runs/state/imager.safetensors"))
    parser.add_argument("--seed", type=int, default=2)
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(args.seed)
    pixels, labels, drawings = render("train", recipe["portraits"], args.seed)
    rng = np.random.default_rng([args.seed, 29])
    kinds = torch.arange(recipe["styles"]) % len(pictures.STYLES)
    others = torch.from_numpy(np.stack([pictures.draw_style(k, rng) for k in kinds.tolist()]))
    model = Imager(recipe["width"])
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=1e-2)
    start = load_state(args.state, {"imager": model}, optimizer)["step"] if args.state.exists() else 0
    model, optimizer = accelerator.prepare(model, optimizer)
    saved = time.time()
    bar = tqdm(range(start, recipe["steps"]), initial=start, total=recipe["steps"], mininterval=10)
    for step in bar:
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        i = torch.randint(len(pixels), (recipe["batch"],), generator=g)
        j = torch.randint(len(others), (recipe["batch"] // 8,), generator=g)
        x = augment(torch.cat([pixels[i], others[j]]).float() / 127.5 - 1, g).to(accelerator.device)
        for group in optimizer.param_groups:
            group["lr"] = 2e-3 * 0.5 * (1 + math.cos(math.pi * step / recipe["steps"]))
        out = model(x)
        loss = F.cross_entropy(out["kind"], torch.cat([torch.zeros_like(i), kinds[j] + 1]))
        n = len(i)
        for k, name in enumerate(pictures.ATTRIBUTES):
            loss = loss + F.cross_entropy(out[name][:n], labels[i, k], ignore_index=-1)
        for k in range(len(DRAWINGS)):
            if (drawings[i, k] >= 0).any():
                loss = loss + F.cross_entropy(out[f"drawing.{k}"][:n], drawings[i, k], ignore_index=-1)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.4f}")
        if time.time() - saved > 60 or step + 1 == recipe["steps"]:
            save_state(args.state, {"imager": model}, optimizer, {"step": step + 1})
            saved = time.time()
    model.eval()
    held, held_labels, held_drawings = render("validation", recipe["held"], args.seed)
    x = held.float() / 127.5 - 1
    read = model.read(x)
    scores = {"attributes": mean_accuracy(read, held_labels)}
    with torch.no_grad():
        out = {k: torch.cat([model(c)[k] for c in x.split(256)]) for k in model(x[:1])}
    guess = torch.stack([out[f"drawing.{k}"].argmax(1) for k in range(len(DRAWINGS))], 1)
    each = accuracy(guess, held_drawings).tolist()
    scores |= {
        f"{part} {shown or ''}".strip(): a for (part, _, shown, _), a in zip(DRAWINGS, each, strict=True)
    }
    print({k: round(v, 4) for k, v in scores.items()})
    save_tensors(args.out, dict(model.half().state_dict()), {"width": recipe["width"], "scores": scores})


if __name__ == "__main__":
    main()
