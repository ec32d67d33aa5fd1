"""Train the template through the base model: what its LoRAs draw, not how near they are to other LoRAs.

    python -m train.template_tune                    # about 10 min on one core; rewrites checkpoints/faces/template
    python -m train.template_tune --recipe smoke --model ... --base ...

The closed-form template is the mean of LoRAs trained on few pictures each. Here its weights move on by the loss that
those LoRAs were trained with (trigger prompts: the pictures; plain prompts: the base's own prediction), for identities
of the train split, K of them at once in one forward pass of the base. The products enter at full latent rank;
truncation to rank 4 comes after.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from lolgen import pictures
from lolgen.base import Base
from lolgen.conditions import PARTS, conditions
from lolgen.generator import Generator
from lolgen.nn import Latent
from lolgen.paths import checkpoints_dir
from lolgen.precision import bf16_matmuls
from lolgen.zoo.bank import Bank
from lolgen.zoo.training import Prior, make_prior
from train.state import load_state, save_state

RECIPES: dict[str, dict[str, Any]] = {
    "full": {"steps": 1800, "loras": 16, "batch": 3, "prior": 2, "identities": 3000, "each": 4, "lr": 4e-3},
    "smoke": {"steps": 2, "loras": 2, "batch": 1, "prior": 1, "identities": 4, "each": 1, "lr": 1e-3},
}
PRIOR_WEIGHT = 10.0


def render(base: Base, count: int, each: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """(latents (count, each, c, h, w), labels, parts) of random identities of the train split."""
    rng = np.random.default_rng([seed, 17])
    latents, labels, parts = [], [], []
    for _ in tqdm(range(count), desc="pictures", mininterval=5):
        identity = pictures.sample_identity(rng, "train")
        pixels = np.stack([pictures.draw_portrait(identity, rng) for _ in range(each)])
        latents.append(torch.from_numpy(pixels))
        labels.append(pictures.labels(identity.attributes))
        parts.append([getattr(identity, n) for n in PARTS])
    z = base.encode(torch.cat(latents)).unflatten(0, (count, each))
    return z, torch.tensor(labels), torch.tensor(parts)


class Shift(torch.nn.Module):
    """The template's weights plus a trained shift in units of their own size per module."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("start", weight.clone())
        self.register_buffer("size", weight.square().mean((0, 2, 3), keepdim=True).sqrt())
        self.shift = torch.nn.Parameter(torch.zeros_like(weight))
        self.start: Tensor
        self.size: Tensor

    def forward(self) -> Tensor:
        return self.start + self.size * self.shift


def loss_of(
    base: Base, generator: Generator, weight: Tensor, c: Tensor, z: Tensor, subjects: list[str], prior: Prior,
    recipe: dict[str, Any], g: torch.Generator,
) -> Tensor:  # fmt: skip
    """The LoRA loss of K generated LoRAs on the latents z (K, batch, c, h, w) of their identities."""
    K, n = len(c), recipe["batch"] + recipe["prior"]
    d = generator.template.config.d
    products = torch.einsum("nf,fmij->nmij", generator.template.features(c), weight)
    eye = torch.eye(d).expand_as(products)
    batch = generator.decoder(Latent(products, eye, torch.full(products.shape[:2], d)))
    other = torch.randint(len(prior.latents), (K, recipe["prior"]), generator=g)
    x = torch.cat([z, prior.latents[other]], 1).flatten(0, 1)
    prefixes = torch.randint(len(pictures.PREFIXES), (K, recipe["batch"]), generator=g).tolist()
    prompts = [
        p
        for k in range(K)
        for p in [
            *(pictures.caption({}, subjects[k], pictures.PREFIXES[i]) for i in prefixes[k]),
            *(prior.prompts[i] for i in other[k].tolist()),
        ]
    ]
    states = base.text(prompts)
    t = ((torch.arange(n) + torch.rand(K, n, generator=g)) / n * 1000).long()
    t = t.gather(1, torch.rand(K, n, generator=g).argsort(1)).clamp(max=999).flatten()
    noise = torch.randn(x.shape, generator=g)
    alphas = base.scheduler.alphas_cumprod[t].view(-1, 1, 1, 1)
    a, s = alphas.sqrt(), (1 - alphas).sqrt()
    x_t, target = a * x + s * noise, (a * noise - s * x).view(K, n, -1)
    keep = torch.arange(K * n) % n >= recipe["batch"]
    with torch.no_grad():
        v = base.unet(x_t[keep], t[keep], states[keep], return_dict=False)[0]
    target = torch.cat([target[:, : recipe["batch"]], v.view(K, recipe["prior"], -1)], 1)
    with Bank.attached(base.unet, batch, "unet."):
        v = base.unet(x_t, t, states, return_dict=False)[0].view(K, n, -1)
    error = (v - target).square().mean(-1)
    return error[:, : recipe["batch"]].mean() + PRIOR_WEIGHT * error[:, recipe["batch"] :].mean()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--model", type=Path, default=Path("checkpoints/faces"))
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--state", type=Path, default=Path("runs/state/template.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    accelerator = Accelerator(cpu=True)
    base = Base.load(args.base or checkpoints_dir() / "tiny-sd")
    bf16_matmuls(base.unet)
    generator = Generator.from_pretrained(args.model)
    shift = Shift(generator.template.weight)
    optimizer = torch.optim.Adam([shift.shift], lr=recipe["lr"], betas=(0.9, 0.99))
    start = load_state(args.state, {"shift": shift}, optimizer)["step"] if args.state.exists() else 0
    z, labels, parts = render(base, recipe["identities"], recipe["each"], args.seed)
    prior = make_prior(base, 20 if args.recipe == "smoke" else 2000, args.seed)
    shift, optimizer = accelerator.prepare(shift, optimizer)
    saved, recent = time.time(), []
    bar = tqdm(range(start, recipe["steps"]), initial=start, total=recipe["steps"], mininterval=5)
    for step in bar:
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        i = torch.randint(len(z), (recipe["loras"],), generator=g)
        pick = torch.randint(z.shape[1], (recipe["loras"], recipe["batch"]), generator=g)
        who = torch.randint(len(pictures.SUBJECTS), (recipe["loras"],), generator=g)
        c = conditions(labels[i], parts[i], who, torch.full((len(i),), generator.settings["strength"]))
        for group in optimizer.param_groups:
            group["lr"] = recipe["lr"] * (
                0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe["steps"]))
            )
        subjects = [pictures.SUBJECTS[k] for k in who.tolist()]
        loss = loss_of(base, generator, shift(), c, z[i[:, None], pick], subjects, prior, recipe, g)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(float(loss.detach()))
        if len(recent) == 25:
            bar.set_postfix(loss=f"{sum(recent) / 25:.4f}")
            recent = []
        if time.time() - saved > 60 or step + 1 == recipe["steps"]:
            save_state(args.state, {"shift": shift}, optimizer, {"step": step + 1})
            saved = time.time()
    with torch.no_grad():
        generator.template.weight.copy_(shift())
    generator.template.save_pretrained(args.model / "template")


if __name__ == "__main__":
    main()
