"""Speed of the zoo builder against a loop over peft, on the same machine in the same run.

    python -m train.zoo_bench --out reports        # zoo_bench.json; about 2 min on one core

Both train the same recipe (rank 4 on the same layers, the same pictures a step, Adam, one thread, the same precision of
the base). The loop is what a user would write: `get_peft_model` on the UNet, a `torch.optim.AdamW`, one LoRA after
the other.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, get_peft_model

from lolgen import pictures
from lolgen.base import Base
from lolgen.paths import checkpoints_dir
from lolgen.precision import bf16_matmuls
from lolgen.zoo.bank import find_modules
from lolgen.zoo.plan import Plan
from lolgen.zoo.training import Prior, Recipe, Task, make_prior, train_bank


def peft_loop(base: Base, task: Task, prior: Prior, plan: Plan) -> None:
    """Train one LoRA as `train_bank` does, with peft."""
    r = task.recipe
    config = LoraConfig(r=r.rank, lora_alpha=int(r.alpha), target_modules=list(plan.targets))
    net = get_peft_model(copy.deepcopy(base.unet), config)
    optimizer = torch.optim.AdamW(
        [p for p in net.parameters() if p.requires_grad], lr=r.lr, weight_decay=r.weight_decay
    )
    latents = base.encode(task.pixels)
    trigger = base.text([pictures.caption({}, r.subject)])
    plain = base.text(prior.prompts)
    alphas = base.scheduler.alphas_cumprod
    for _ in range(r.steps):
        i, j = torch.randint(len(latents), (plan.batch,)), torch.randint(len(plain), (plan.prior_batch,))
        z, states = (
            torch.cat([latents[i], prior.latents[j]]),
            torch.cat([trigger.expand(plan.batch, -1, -1), plain[j]]),
        )
        noise, t = torch.randn_like(z), torch.randint(0, 1000, (len(z),))
        a, s = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        target = a * noise - s * z
        with torch.no_grad(), net.disable_adapter():
            kept = net(
                (a * z + s * noise)[plan.batch :], t[plan.batch :], states[plan.batch :], return_dict=False
            )[0]
        v = net(a * z + s * noise, t, states, return_dict=False)[0]
        error = (v - torch.cat([target[: plan.batch], kept])).square().flatten(1).mean(1)
        (error[: plan.batch].mean() + plan.prior_weight * error[plan.batch :].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--loras", type=int, default=40)
    parser.add_argument("--loop", type=int, default=6, help="LoRAs trained with peft")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("reports"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    plan, rng = Plan(), np.random.default_rng(0)
    base = Base.load(checkpoints_dir() / "tiny-sd")
    bf16_matmuls(base.unet)
    prior = make_prior(base, 64, 0)
    tasks = []
    for _ in range(args.loras):
        identity = pictures.sample_identity(rng, "train")
        pixels = np.stack([pictures.draw_portrait(identity, rng) for _ in range(plan.pictures)])
        tasks.append(Task(Recipe(steps=args.steps), torch.from_numpy(pixels)))
    spec = find_modules(base.unet, plan.targets, "unet.")
    start = time.perf_counter()
    train_bank(
        base,
        spec,
        tasks,
        prior,
        0,
        batch=plan.batch,
        prior_batch=plan.prior_batch,
        prior_weight=plan.prior_weight,
    )
    bank = (time.perf_counter() - start) / len(tasks)
    start = time.perf_counter()
    for task in tasks[: args.loop]:
        peft_loop(base, task, prior, plan)
    loop = (time.perf_counter() - start) / args.loop
    report = {
        "command": "python -m train.zoo_bench",
        "seconds_per_lora": {"bank": round(bank, 4), "peft_loop": round(loop, 4)},
        "times_faster": round(loop / bank, 2),
        "steps": args.steps,
        "bank": args.loras,
        "threads": 1,
    }
    print(json.dumps(report, indent=1))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "zoo_bench.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
