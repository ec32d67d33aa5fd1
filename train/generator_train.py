"""Train the generator of a zoo: encoder and decoder in closed form, then the flow on their latents.

    python -m train.generator_train                                   # about 8 min on one core
    accelerate launch --multi_gpu --num_processes 2 -m train.generator_train   # the same on two CPU processes
    python -m train.generator_train --recipe smoke

The encoder's left maps are the principal directions of the zoo's delta W in the norm |delta W|_S, S being the second
moment of what each module of the base sees under trigger and plain prompts; the decoder is their right inverse. So
what the base never feels is left out of the latents. Validation loss picks the checkpoint (moving average).
"""

from __future__ import annotations

import argparse
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from lolgen import flow, pictures
from lolgen.base import Base, input_moments
from lolgen.conditions import LENGTH, conditions, drop_attributes, strength_of
from lolgen.generator import Generator
from lolgen.lora import Batch
from lolgen.nn import Decoder, Encoder, EncoderConfig, VelocityField, VelocityFieldConfig
from lolgen.paths import checkpoints_dir
from lolgen.zoo.zoo import Zoo
from train.state import load_state, save_state

RECIPES: dict[str, dict[str, Any]] = {
    "full": {"steps": 3000, "batch": 128, "lr": 1.5e-3, "d": 24, "width": 128, "depth": 2, "rank": 8},
    "smoke": {"steps": 2, "batch": 4, "lr": 1e-3, "d": 8, "width": 16, "depth": 1, "rank": 2},
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
    return conditions(zoo.labels(), subjects, strength)


def latents_of(encoder: Encoder, batch: Batch) -> Tensor:
    """Balanced latents as the flow sees them, (N, M, 2 d, r)."""
    return encoder.encode(batch).balanced().joined().detach()


def _velocity(net: torch.nn.Module, c: Tensor, ranks: Tensor, x: Tensor, t: Tensor) -> Tensor:
    v: Tensor = net(x, t, c, ranks)
    return v


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--recipe", choices=RECIPES, default="full")
    parser.add_argument("--zoo", type=Path, default=Path("checkpoints/zoos/faces"))
    parser.add_argument("--base", type=Path, default=None)
    parser.add_argument("--out", type=Path, default=Path("checkpoints/faces"))
    parser.add_argument("--state", type=Path, default=Path("runs/state/generator.safetensors"))
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
    X, X_held = latents_of(encoder, train_batch), latents_of(encoder, held.load())
    C, C_held = zoo_conditions(train), zoo_conditions(held)
    config = VelocityFieldConfig(
        d_u=recipe["d"], d_v=recipe["d"], condition=LENGTH, width=recipe["width"], depth=recipe["depth"],
        rank=recipe["rank"], dropout=0.1,
    )  # fmt: skip
    field, ema = VelocityField(zoo.spec, config), VelocityField(zoo.spec, config)
    field.fit(X)
    ema.load_state_dict(field.state_dict())
    ranks = torch.full(X.shape[:2], X.shape[-1])
    X = field.normalise(X, ranks)
    X_held = field.normalise(X_held, ranks[:1].expand(len(X_held), -1))
    # Rows count by the share of delta W that they carry: rows of noise are learned last.
    energy = field.energy.clone()
    half = recipe["d"]
    share = torch.cat(
        [energy[:, :half] / energy[:, :half].mean(), energy[:, half:] / energy[:, half:].mean()], 1
    )
    weight = share.clamp(max=10).sqrt()[None, :, :, None]

    optimizer = torch.optim.AdamW(field.parameters(), lr=recipe["lr"], weight_decay=1e-2)
    start = (
        load_state(args.state, {"field": field, "ema": ema}, optimizer)["step"] if args.state.exists() else 0
    )
    net, optimizer = accelerator.prepare(field, optimizer)
    rank = accelerator.process_index
    saved, best = time.time(), math.inf
    bar = tqdm(
        range(start, recipe["steps"]), initial=start, total=recipe["steps"], mininterval=5, disable=rank > 0
    )
    for step in bar:
        g = torch.Generator().manual_seed((args.seed * 1_000_003 + step) * 16 + rank)
        i = torch.randint(len(X), (recipe["batch"],), generator=g)
        # Partial requests: for two rows in three a random share of the attributes is not asked for.
        share_dropped = torch.rand(len(i), 1, generator=g) * (torch.rand(len(i), 1, generator=g) < 0.66)
        drop = torch.rand(len(i), len(pictures.ATTRIBUTES), generator=g) < share_dropped
        nothing = torch.rand(len(i), 1, generator=g) < 0.1  # the unconditional velocity, for guidance
        c = drop_attributes(C[i], drop | nothing)
        lr = (
            recipe["lr"]
            * min(1, (step + 1) / 100)
            * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / recipe["steps"])))
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        r = ranks[i]
        velocity = partial(_velocity, net, c, r)
        loss = flow.flow_loss(velocity, X[i], ranks=r, weight=weight, generator=g).mean()
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(0.998, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(ema.parameters()), list(field.parameters()), 1 - decay)
        if step % 20 == 0:
            bar.set_postfix(loss=f"{float(loss.detach()):.4f}")
        if (step + 1) % 250 == 0 and rank == 0:
            ema.eval()
            gv = torch.Generator().manual_seed(1)
            with torch.no_grad():
                held_loss = float(
                    flow.flow_loss(
                        lambda x, t: ema(x, t, C_held, ranks[: len(C_held)]), X_held, ranks=ranks[: len(X_held)],
                        weight=weight, generator=gv,
                    ).mean()
                )  # fmt: skip
            best = min(best, held_loss)
            tqdm.write(f"step {step + 1}: validation {held_loss:.4f} (best {best:.4f})")
        if rank == 0 and (time.time() - saved > 60 or step + 1 == recipe["steps"]):
            save_state(args.state, {"field": field, "ema": ema}, optimizer, {"step": step + 1})
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
            "marginals": marginals,
            "strength": 1.0,
            "guidance": 1.5,
            "gain": 1.0,
            "steps": 12,
            "temperature": 1.0,
        }
        Generator(encoder, decoder, ema.eval(), settings).save_pretrained(args.out)


if __name__ == "__main__":
    main()
