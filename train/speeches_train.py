"""Train the generator of the speeches zoo: a regression in closed form, then its weights through the base model.

    python -m train.speeches_train                      # about 10 min on one core; checkpoints/speeches
    python -m train.speeches_train --recipe smoke --out runs/speeches --state runs/state/speeches-smoke.safetensors
    python -m train.speeches_train --recipe smoke --base smollm2 --zoo runs/zoo-smol --out runs/speeches-smol ...

The regression is on the clean training LoRAs at unit |delta W|. Then its weights move on by what the base says with the
generated LoRA, truncated to the zoo's rank: the loss on training windows of the sources that were asked for, K requests
at once. What is kept is the best of the steps on the validation text; the gain is tuned there too.
"""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from lolgen.language.texts import SOURCES
from lolgen.nn import Decoder, Encoder, EncoderConfig, Latent, Template, TemplateConfig
from lolgen.speaker import Speaker, conditions
from lolgen.tasks.ours import unit
from lolgen.zoo.bank import Bank
from lolgen.zoo.speeches import SpeechesPlan
from lolgen.zoo.tuning import Tuner
from lolgen.zoo.zoo import Zoo
from train.state import load_state, save_state
from train.template_tune import Shift

RANK = 4
RECIPES: dict[str, dict[str, Any]] = {
    "full": {"d": 48, "steps": 1000, "loras": 8, "batch": 32, "lr": 0.02, "every": 50},
    "smoke": {"d": 4, "steps": 2, "loras": 2, "batch": 2, "lr": 0.01, "every": 1},
}
GAINS = (0.5, 0.7, 0.85, 1.0, 1.2, 1.4, 2.0)


def truncated(products: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(U, V) of the best rank-`rank` truncation of products (K, M, d, d); the gradient leaves the directions V
    as they are."""
    V = torch.linalg.svd(products.detach().double()).Vh[..., :rank, :].mT.to(products)
    return products @ V, V


def losses(
    tuner: Tuner, speaker: Speaker, weight: Tensor, shares: Tensor, states: Tensor, ids: Tensor
) -> Tensor:
    """Losses (K, n, T - 1) under the K LoRAs that the template with `weight` gives for shares (K, sources), on windows
    (K, n, T) whose states are (K, n, T, hidden)."""
    products = torch.einsum("nf,fmij->nmij", speaker.template.features(conditions(shares)), weight)
    latent = Latent(*truncated(products, RANK), torch.full(products.shape[:2], RANK))
    batch = speaker.decoder(latent)
    with Bank.attached(tuner.base.model, batch):
        return tuner.halves.loss(states.flatten(0, 1), ids.flatten(0, 1)).view(*ids.shape[:2], -1)


def draw_shares(count: int, g: torch.Generator) -> Tensor:
    """(count, sources): half single sources, the others equal parts of two or more."""
    n = len(SOURCES)
    rows = []
    for _ in range(count):
        size = 1 if torch.rand((), generator=g) < 0.5 else int(torch.randint(2, n + 1, (), generator=g))
        row = torch.zeros(n)
        row[torch.randperm(n, generator=g)[:size]] = 1 / size
        rows.append(row)
    return torch.stack(rows)


@torch.no_grad()
def held_loss(tuner: Tuner, speaker: Speaker, weight: Tensor) -> float:
    """Mean loss on the validation windows of every source, asked for alone."""
    n = len(SOURCES)
    ids = tuner.sources.validation
    states = tuner.states["validation"].view(*ids.shape, -1)
    found = [
        losses(tuner, speaker, weight, torch.eye(n)[i : i + 8], states[i : i + 8], ids[i : i + 8]).mean(
            (1, 2)
        )
        for i in range(0, n, 8)
    ]
    return float(torch.cat(found).mean())


@torch.no_grad()
def fit(zoo: Zoo, d: int) -> Speaker:
    """Encoder, decoder and the regression; the penalty that predicts the validation LoRAs best."""
    train, held = (
        zoo.split(s).select(lambda r: "poison" not in r and not r["id"].startswith("twin-"))
        for s in ("train", "validation")
    )
    batch, batch_held = unit(train.load()), unit(held.load())
    encoder = Encoder.from_batch(batch, EncoderConfig(d=d, p=min(16, d), features=2, width=8, heads=1))
    decoder = Decoder.from_encoder(encoder)
    config = TemplateConfig(d=d, attributes=len(SOURCES), groups=((len(SOURCES),),))
    c, c_held = (conditions(z.labels() / z.labels().sum(1, keepdim=True)) for z in (train, held))
    latent, target = encoder.encode(batch), encoder.encode(batch_held)
    wanted = target.U @ target.V.mT
    best: tuple[float, Template] | None = None
    for penalty in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0):
        template = Template(encoder.spec, config).fit(c, latent, penalty)
        error = float((template.products(c_held) - wanted).square().mean() / wanted.square().mean())
        if best is None or error < best[0]:
            best = error, template
    assert best is not None
    print(f"template: share of held-out |dW|^2 left {best[0]:.3f}", flush=True)
    return Speaker(encoder, decoder, best[1], {"gain": 1.0})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--zoo", type=Path, default=Path("checkpoints/zoos/speeches"))
    parser.add_argument("--base", default="tiny-lm", help="a folder, tiny-lm or smollm2")
    parser.add_argument("--out", type=Path, default=Path("checkpoints/speeches"))
    parser.add_argument("--state", type=Path, default=Path("runs/state/speeches.safetensors"))
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    accelerator = Accelerator(cpu=True)
    zoo = Zoo.open(args.zoo)
    _, tuner = SpeechesPlan.of(zoo, args.base)
    speaker = fit(zoo, recipe["d"])
    speaker.settings["base"] = args.base
    # The regression is of unit size: the size that the validation text likes best is where training starts.
    start_size = min(
        (held_loss(tuner, speaker, speaker.template.weight * s), s) for s in (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
    )
    print(f"regression: validation {start_size[0]:.4f} at |dW| {start_size[1]}", flush=True)
    model = Shift(speaker.template.weight * start_size[1])
    kept = Shift(speaker.template.weight * start_size[1])
    optimizer = torch.optim.Adam([model.shift], lr=recipe["lr"], betas=(0.9, 0.99))
    start, best = 0, start_size[0]
    if args.state.exists():
        meta = load_state(args.state, {"model": model, "kept": kept}, optimizer)
        start, best = meta["step"], meta["best"]
    shift, optimizer = accelerator.prepare(model, optimizer)
    pool = tuner.sources.train.shape[1]
    states = tuner.states["train"].view(*tuner.sources.train.shape, -1)
    saved = time.time()
    bar = tqdm(range(start, recipe["steps"]), initial=start, total=recipe["steps"], mininterval=5)
    for step in bar:
        g = torch.Generator().manual_seed(args.seed * 1_000_003 + step)
        shares = draw_shares(recipe["loras"], g)
        who = torch.multinomial(shares, recipe["batch"], replacement=True, generator=g)
        which = torch.randint(pool, who.shape, generator=g)
        for group in optimizer.param_groups:
            group["lr"] = recipe["lr"] * (
                0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe["steps"]))
            )
        ids = tuner.sources.train[who, which]
        loss = losses(tuner, speaker, shift(), shares, states[who, which], ids).mean()
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % recipe["every"] == 0:
            found = held_loss(tuner, speaker, model())
            tqdm.write(f"step {step + 1}: validation {found:.4f} (best {min(best, found):.4f})")
            if found < best:
                best = found
                kept.load_state_dict(model.state_dict())
        if time.time() - saved > 60 or step + 1 == recipe["steps"]:
            save_state(
                args.state, {"model": model, "kept": kept}, optimizer, {"step": step + 1, "best": best}
            )
            saved = time.time()
    with torch.no_grad():
        speaker.template.weight.copy_(kept())
        gain = min((held_loss(tuner, speaker, speaker.template.weight * s), s) for s in GAINS)[1]
    speaker.settings["gain"] = gain
    speaker.save_pretrained(args.out)
    size = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(f"{args.out}: gain {gain}, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
