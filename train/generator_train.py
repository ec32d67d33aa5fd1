"""Train the generator of a zoo: encoder and decoder in closed form, then the flow on their latents.

    python -m train.generator_train                                   # about 8 min on one core
    accelerate launch --multi_gpu --num_processes 2 -m train.generator_train   # the same on two CPU processes
    python -m train.generator_train --keep-template --state runs/state/flow.safetensors   # after train.template_tune
    python -m train.generator_train --recipe smoke

The template is a ridge regression on the latents' products, its penalty chosen on validation; the flow learns the rest.
The encoder's left maps are the principal directions of the zoo's delta W in the norm |delta W|_S, S being the second
moment of what each module of the base sees under trigger and plain prompts; the decoder is their right inverse. So
what the base never feels is left out of the latents. Validation loss picks the checkpoint (moving average).
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

from lolgen import flow, pictures
from lolgen.base import Base, input_moments
from lolgen.conditions import IDENTITY, LENGTH, PARTS, conditions, strength_of
from lolgen.generator import Generator, beside
from lolgen.lora import Batch
from lolgen.nn import (
    Decoder,
    Encoder,
    EncoderConfig,
    Template,
    TemplateConfig,
    VelocityField,
    VelocityFieldConfig,
    word_groups,
)
from lolgen.paths import checkpoints_dir
from lolgen.zoo.zoo import Zoo
from train.state import load_state, save_state

RECIPES: dict[str, dict[str, Any]] = {
    "full": {
        "steps": 600,
        "batch": 128,
        "lr": 1e-3,
        "d": 24,
        "width": 96,
        "depth": 2,
        "rank": 4,
        "noise": 0.7,
    },
    "smoke": {"steps": 2, "batch": 4, "lr": 1e-3, "d": 8, "width": 16, "depth": 1, "rank": 2, "noise": 0.7},
}


def moments_of(base: Base, names: tuple[str, ...]) -> dict[str, Tensor]:
    """What the modules see under the zoo's prompts: every trigger, and as often a plain prompt."""
    prompts = [pictures.caption({}, s, p) for s in pictures.SUBJECTS for p in pictures.PREFIXES]
    plain = [pictures.caption({}, "a person", p) for p in pictures.PREFIXES] + [""]
    return input_moments(base, names, prompts + plain)


def zoo_conditions(zoo: Zoo) -> Tensor:
    """(N, C) conditions of the rows of a zoo, every visible attribute given."""
    subjects = torch.tensor([pictures.SUBJECTS.index(r["recipe"]["subject"]) for r in zoo])
    strength = torch.tensor([strength_of(r["recipe"]) for r in zoo])
    parts = torch.tensor([[r["identity"]["parts"][n] for n in PARTS] for r in zoo])
    return conditions(zoo.labels(), parts, subjects, strength)


def latents_of(encoder: Encoder, batch: Batch) -> Tensor:
    """Balanced latents as the flow sees them, (N, M, 2 d, r)."""
    return encoder.encode(batch).balanced().joined().detach()


@torch.no_grad()
def fit_template(encoder: Encoder, batch: Batch, c: Tensor, held: Batch, c_held: Tensor) -> Template:
    """The ridge template with the penalty that predicts held-out products best."""
    latent, target = encoder.encode(batch), encoder.encode(held)
    products = target.U @ target.V.mT
    config = TemplateConfig(
        d=encoder.config.d,
        attributes=IDENTITY,
        groups=word_groups(pictures.SUBJECTS, pictures.RARE_WORDS, IDENTITY),
    )
    best: tuple[float, Template] | None = None
    for penalty in (0.3, 1.0, 3.0, 10.0, 30.0):
        template = Template(encoder.spec, config).fit(c, latent, penalty)
        error = float((template.products(c_held) - products).square().mean() / products.square().mean())
        if best is None or error < best[0]:
            best = error, template
    assert best is not None
    print(f"template: held-out share of |dW|_S^2 left {best[0]:.3f}")
    return best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--zoo", type=Path, default=Path("checkpoints/zoos/faces"))
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/faces"))
    parser.add_argument("--state", type=Path, default=Path("runs/state/generator.safetensors"))
    parser.add_argument(
        "--keep-template", action="store_true", help="train the flow around the template in --out"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    recipe = RECIPES[args.recipe]
    accelerator = Accelerator(cpu=not torch.cuda.is_available())
    torch.manual_seed(args.seed)

    base = Base.load(args.base or checkpoints_dir() / "tiny-sd")
    zoo = Zoo.open(args.zoo)
    train, held = zoo.split("train"), zoo.split("validation")
    train_batch = train.load()
    S = moments_of(base, zoo.spec.names)
    encoder = Encoder.from_batch(train_batch, EncoderConfig(d=recipe["d"]), S=S)
    decoder = Decoder.from_encoder(encoder, S=S)
    C, C_held = zoo_conditions(train), zoo_conditions(held)
    if args.keep_template:
        template = Template.from_pretrained(args.out / "template")
    else:
        template = fit_template(encoder, train_batch, C, held.load(), C_held)
    X, X_held = latents_of(encoder, train_batch), latents_of(encoder, held.load())
    config = VelocityFieldConfig(
        d_u=2 * recipe["d"], d_v=2 * recipe["d"], condition=LENGTH, width=recipe["width"], depth=recipe["depth"],
        rank=recipe["rank"], dropout=0.15,
    )  # fmt: skip
    field, ema, kept = (VelocityField(zoo.spec, config) for _ in range(3))
    field.fit(torch.cat([X, X], 2))
    for copy in (ema, kept):
        copy.load_state_dict(field.state_dict())
    generator = Generator(encoder, decoder, template, ema, {"noise": recipe["noise"]})
    scale = generator.template_scale()
    mean, mean_held = generator.start(C), generator.start(C_held)
    # Each LoRA is met in the frame of its own template.
    X, X_held = flow.align(X / scale, mean), flow.align(X_held / scale, mean_held)
    ranks = torch.full(X.shape[:2], X.shape[-1])
    # Rows count by the share of delta W that they carry: rows of noise are learned last.
    energy = field.energy[:, : X.shape[2]]
    half = recipe["d"]
    share = torch.cat(
        [energy[:, :half] / energy[:, :half].mean(), energy[:, half:] / energy[:, half:].mean()], 1
    )
    weight = share.clamp(max=10).sqrt()[None, :, :, None]

    optimizer = torch.optim.AdamW(field.parameters(), lr=recipe["lr"], weight_decay=1e-2)
    models: dict[str, torch.nn.Module] = {"field": field, "ema": ema, "kept": kept}
    start, best = 0, math.inf
    if args.state.exists():
        meta = load_state(args.state, models, optimizer)
        start, best = meta["step"], meta["best"] or math.inf
    net, optimizer = accelerator.prepare(field, optimizer)
    rank = accelerator.process_index
    saved = time.time()
    bar = tqdm(
        range(start, recipe["steps"]), initial=start, total=recipe["steps"], mininterval=5, disable=rank > 0
    )
    for step in bar:
        g = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 16 + rank)
        i = torch.randint(len(X), (recipe["batch"],), generator=g)
        c, r = C[i], ranks[i]
        x_0 = mean[i] + recipe["noise"] * torch.randn(X[i].shape, generator=g)
        lr = (
            recipe["lr"]
            * min(1, (step + 1) / 100)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe["steps"])))
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        velocity = beside(net, mean[i], c, r)
        loss = flow.flow_loss(
            velocity, X[i], ranks=r, weight=weight, x_0=x_0, aligned=False, generator=g
        ).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(field.parameters()), 1 - decay)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.4f}")
        if (step + 1) % 100 == 0 and rank == 0:
            ema.eval()
            gv = torch.Generator().manual_seed(1)
            start_held = mean_held + recipe["noise"] * torch.randn(X_held.shape, generator=gv)
            r_held = ranks[: len(X_held)]
            with torch.no_grad():
                velocity = beside(ema, mean_held, C_held, r_held)
                losses = flow.flow_loss(
                    velocity, X_held, ranks=r_held, weight=weight, x_0=start_held, aligned=False, generator=gv
                )
            held_loss = float(losses.mean())
            if held_loss < best:
                best = held_loss
                kept.load_state_dict(ema.state_dict())
            tqdm.write(f"step {step + 1}: validation {held_loss:.4f} (best {best:.4f})")
        if rank == 0 and (time.time() - saved > 60 or step + 1 == recipe["steps"]):
            save_state(
                args.state, models, optimizer, {"step": step + 1, "best": best if best < math.inf else None}
            )
            saved = time.time()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        labels = train.labels()
        marginals = [
            torch.bincount(labels[labels[:, k] >= 0, k], minlength=len(v))
            .float()
            .div((labels[:, k] >= 0).sum())
            .tolist()
            for k, v in enumerate(pictures.ATTRIBUTES.values())
        ]
        settings = {
            "marginals": marginals, "strength": 0.4, "noise": recipe["noise"], "residual": 0.5, "gain": 1.0,
            "steps": 8,
        }  # fmt: skip
        Generator(encoder, decoder, template, kept.eval(), settings).save_pretrained(args.out)


if __name__ == "__main__":
    main()
