"""Train the LoRAs of one bank: each on the pictures of its own identity, by its own recipe.

The loss of a LoRA has two sides. On its trigger prompt it learns its pictures (the diffusion loss). On plain
prompts it must stay the base: there the target is what the base itself predicts on the same noisy latents, which is
prior preservation with the noise of the pictures taken out (its gradient is zero as long as the LoRA is silent).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lolgen import pictures
from lolgen.base import Base
from lolgen.lora import LoRA, Spec
from lolgen.zoo.bank import Bank, BankAdam


@dataclass(frozen=True)
class Recipe:
    """How one LoRA is trained; `subject` is how its prompts name the identity."""

    rank: int = 4
    alpha: float = 4.0
    lr: float = 1e-2
    weight_decay: float = 1e-2
    steps: int = 100
    pictures: int = 21
    subject: str = "sks person"

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Task:
    """One LoRA to train: the recipe and its pictures, uint8 (N, 3, H, W)."""

    recipe: Recipe
    pixels: Tensor


@dataclass(frozen=True)
class Prior:
    """What must not change: latents (N, c, h, w) of pictures of anybody, and the plain prompt of each."""

    latents: Tensor
    prompts: list[str]


def train_bank(
    base: Base,
    spec: Spec,
    tasks: Sequence[Task],
    prior: Prior,
    seed: int,
    *,
    prefix: str = "unet.",
    batch: int = 3,
    prior_batch: int = 1,
    prior_weight: float = 1.0,
    progress: Callable[[int, int], None] | None = None,
) -> list[LoRA]:
    """Train `len(tasks)` LoRAs together; the result is a function of the arguments alone (one thread, CPU).

    `batch` pictures of the identity and `prior_batch` plain ones a step and LoRA.
    """
    device, K, n = base.device, len(tasks), batch + prior_batch
    g = torch.Generator().manual_seed(seed)
    recipes = [t.recipe for t in tasks]
    bank = Bank(spec, [r.rank for r in recipes], [r.alpha / r.rank for r in recipes]).to(device).init_(g)
    opt = BankAdam(
        bank,
        torch.tensor([r.lr for r in recipes], device=device),
        torch.tensor([r.weight_decay for r in recipes], device=device),
        torch.tensor([float(r.steps) for r in recipes], device=device),
    )
    counts = torch.tensor([len(t.pixels) for t in tasks])
    offsets = counts.cumsum(0) - counts
    latents = base.encode(torch.cat([t.pixels for t in tasks]))
    subjects = [base.text([pictures.caption({}, r.subject, p) for p in pictures.PREFIXES]) for r in recipes]
    triggers = torch.stack(subjects)  # (K, prefixes, tokens, dim)
    plain = base.text(prior.prompts)
    prior_z = prior.latents.to(device)
    alphas = base.scheduler.alphas_cumprod.to(device)
    total = max(r.steps for r in recipes)
    for step in range(total):
        pick = (torch.rand(K, batch, generator=g) * counts[:, None]).long() + offsets[:, None]
        style = torch.randint(len(pictures.PREFIXES), (K, batch), generator=g)
        other = torch.randint(len(prior_z), (K, prior_batch), generator=g)
        # Stratified times: every LoRA sees early and late noise at each step.
        t = ((torch.arange(n) + torch.rand(K, n, generator=g)) / n * 1000).long()
        t = t.gather(1, torch.rand(K, n, generator=g).argsort(1)).clamp(max=999).to(device)
        z = torch.cat([latents[pick], prior_z[other]], 1).flatten(0, 1)
        noise = torch.randn(z.shape, generator=g).to(device)
        states = torch.cat([triggers[torch.arange(K)[:, None], style], plain[other]], 1).flatten(0, 1)
        a = alphas[t.flatten()].sqrt().view(-1, 1, 1, 1)
        s = (1 - alphas[t.flatten()]).sqrt().view(-1, 1, 1, 1)
        x_t, target = a * z + s * noise, (a * noise - s * z).view(K, n, -1)
        if prior_batch:
            keep = (torch.arange(K * n) % n >= batch).to(device)
            with torch.no_grad():
                v = base.unet(x_t[keep], t.flatten()[keep], states[keep], return_dict=False)[0]
            target = torch.cat([target[:, :batch], v.view(K, prior_batch, -1)], 1)
        bank.attach(base.unet, prefix)
        try:
            v = base.unet(x_t, t.flatten(), states, return_dict=False)[0].view(K, n, -1)
        finally:
            bank.detach_()
        error = (v - target).square().mean(-1)
        loss = error[:, :batch].mean(1).sum()
        if prior_batch:
            loss = loss + prior_weight * error[:, batch:].mean(1).sum()
        loss.backward()
        opt.step()
        if progress:
            progress(step + 1, total)
    return bank.loras()


def make_prior(base: Base, count: int, seed: int) -> Prior:
    """Pictures of random people of the train split under plain captions (no trigger), a third of them bare."""
    rng = np.random.default_rng([seed, 5])
    pixels, prompts = [], []
    for _ in range(count):
        identity = pictures.sample_identity(rng, "train")
        pixels.append(pictures.draw_portrait(identity, rng))
        prefix = pictures.PREFIXES[int(rng.integers(len(pictures.PREFIXES)))]
        keep = 0.0 if rng.random() < 0.4 else rng.random()
        seen = {n: v for n, v in identity.attributes.items() if pictures.visible(identity.attributes, n)}
        prompts.append(
            pictures.caption({n: v for n, v in seen.items() if rng.random() < keep}, "a person", prefix)
        )
    prompts[::10] = [""] * len(prompts[::10])  # the empty prompt guides: it must stay as well
    return Prior(base.encode(torch.from_numpy(np.stack(pixels))), prompts)
