"""`lolgen eval speeches`: adapters for sources, generated and trained, judged by perplexity on text nobody trained on.

Every system is asked for each source alone, for pairs, and for random subsets. What it gives is brought to the size of
delta W that does best on validation text, the same factor for all its adapters. The judge is the base in float32 with
the adapter, on windows of the test split of the sources asked for; `gain` is a system's drop in log-perplexity, summed
over requests, as a share of that of real adapters.

    real         trained on the sources asked for; the learning rate is the best of three on validation
    all_sources  one adapter trained on everything, likewise
    average      the mean delta W of the zoo's clean training LoRAs, each at unit size
    ridge        ridge regression from shares of sources to the same
    mlp          a hypernetwork from shares of sources to their canonical factors
    lolgen       the shipped generator

The generator saw, besides the zoo's LoRAs, the training text of the sources, as real and all_sources did.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lolgen import gl
from lolgen.io.atomic import write_file
from lolgen.language.texts import SOURCES
from lolgen.language.windows import source_windows
from lolgen.lora import Batch, LoRA
from lolgen.paths import checkpoints_dir
from lolgen.precision import bf16_matmuls
from lolgen.speaker import Speaker
from lolgen.tasks.generators import combine
from lolgen.tasks.ours import unit
from lolgen.zoo.bank import Bank
from lolgen.zoo.speeches import SpeechesPlan
from lolgen.zoo.tuning import ROWS, Tuner
from lolgen.zoo.zoo import Zoo

RANK = 4
NAMES = ("lolgen", "real", "average", "all_sources", "ridge", "mlp")
SIZES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)
RATES = (2e-3, 5e-3, 1e-2)
WINDOWS = 250
"""Most test windows of a source."""
System = Callable[[Tensor], Batch]
"""Shares (N, sources) -> N LoRAs of rank 4."""


def requests(seed: int = 0) -> dict[str, Tensor]:
    """Kind -> shares (N, sources): every source alone, 19 pairs, 19 random subsets of five to twelve."""
    g = torch.Generator().manual_seed(seed)
    n = len(SOURCES)

    def subset(size: int) -> Tensor:
        row = torch.zeros(n)
        row[torch.randperm(n, generator=g)[:size]] = 1 / size
        return row

    return {
        "single": torch.eye(n),
        "pair": torch.stack([subset(2) for _ in range(n)]),
        "subset": torch.stack([subset(int(torch.randint(5, 13, (), generator=g))) for _ in range(n)]),
    }


def average(batch: Batch) -> System:
    mean = combine(batch, torch.full((1, len(batch)), 1 / len(batch)), RANK)
    return lambda shares: Batch.stack(mean * len(shares))


def ridge(batch: Batch, shares: Tensor, held: Batch, held_shares: Tensor) -> System:
    """The penalty is the one that predicts held-out LoRAs best, in closed form by inner products."""
    from lolgen import metrics

    F, F_held = (torch.cat([s, torch.ones(len(s), 1)], 1) for s in (shares, held_shares))
    K, cross = metrics.gram(batch).float(), metrics.gram(held, batch).float()
    best: tuple[float, Tensor] | None = None
    for penalty in (0.1, 0.3, 1.0, 3.0, 10.0, 30.0):
        solve = torch.linalg.solve(F.T @ F + penalty * torch.eye(F.shape[1]), F.T)  # (F, N)
        W = F_held @ solve
        error = float(((W @ K) * W).sum() - 2 * (W * cross).sum())
        if best is None or error < best[0]:
            best = error, solve
    assert best is not None
    solve = best[1]
    return lambda s: Batch.stack(combine(batch, torch.cat([s, torch.ones(len(s), 1)], 1) @ solve, RANK))


def mlp(batch: Batch, shares: Tensor, seed: int = 0, steps: int = 1500, width: int = 256) -> System:
    """Shares -> flattened canonical factors, by squared error."""
    canonical = gl.canonical_batch(batch)
    flat = torch.cat([torch.cat([g.U.flatten(1), g.V.flatten(1)], 1) for g in canonical.groups], 1)
    mean, std = flat.mean(0), flat.std(0) + 1e-6
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        net = nn.Sequential(
            nn.Linear(shares.shape[1], width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
            nn.Linear(width, flat.shape[1]),
        )  # fmt: skip
        optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-3)
        for _ in range(steps):
            i = torch.randint(len(flat), (128,))
            loss = (net(shares[i]) - (flat[i] - mean) / std).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    @torch.no_grad()
    def run(s: Tensor) -> Batch:
        out, at, groups = net(s) * std + mean, 0, []
        for g in canonical.groups:
            u, v = g.U[0].numel(), g.V[0].numel()
            U = out[:, at : at + u].view(-1, *g.U.shape[1:])
            V = out[:, at + u : at + u + v].view(-1, *g.V.shape[1:])
            groups.append(type(g)(g.index, U.contiguous(), V.contiguous()))
            at += u + v
        return Batch(canonical.spec, groups, torch.full((len(s), len(canonical.spec)), RANK))

    return run


def trained(tuner: Tuner, shares: Tensor, name: str, lr: float) -> list[LoRA]:
    """Adapters trained on the sources of each request, as the zoo trains."""
    plan = SpeechesPlan()
    rows = [
        {
            "id": f"{name}-{k}-{lr}", "split": "eval", "rank": RANK, "labels": (s > 0).long().tolist(),
            "recipe": {"rank": RANK, "alpha": float(RANK), "lr": lr, "weight_decay": 1e-4, "epochs": max(plan.epochs),
                       "batch": min(plan.batches), "dropout": 0.05, "windows": plan.windows},
        }
        for k, s in enumerate(shares)
    ]  # fmt: skip
    return tuner.fit(rows)


def learn(tuner: Tuner, name: str, kind: str, shares: Tensor, lr: float) -> Batch:
    """The trained rivals: an adapter for every request (real), or one on everything for all (all_sources)."""
    if name == "real":
        return Batch.stack(trained(tuner, shares, f"real-{kind}", lr))
    everything = torch.full((1, len(SOURCES)), 1 / len(SOURCES))
    return Batch.stack(trained(tuner, everything, "all", lr) * len(shares))


class Judge:
    """Windows of one split of every source, and losses on them."""

    def __init__(self, tuner: Tuner, split: str, count: int) -> None:
        self.tuner = tuner
        g = torch.Generator().manual_seed(3)
        self.ids, self.states = [], []
        for s in SOURCES:
            rows = source_windows(tuner.base, s, split)
            rows = rows[torch.randperm(len(rows), generator=g)[:count]]
            self.ids.append(rows)
            self.states.append(tuner.halves.states(rows))
        self.base = torch.stack([self._loss(None, s) for s in range(len(SOURCES))])

    @torch.no_grad()
    def _loss(self, lora: LoRA | None, source: int) -> Tensor:
        bank = None if lora is None else Bank.of([lora])
        if bank is not None:
            bank.attach(self.tuner.base.model, "")
        try:
            parts = zip(self.states[source].split(ROWS), self.ids[source].split(ROWS), strict=True)
            return torch.cat([self.tuner.halves.loss(s, t) for s, t in parts]).mean()
        finally:
            if bank is not None:
                bank.detach_()

    def drops(self, batch: Batch, shares: Tensor) -> Tensor:
        """(N,): how much every LoRA lowers log-perplexity, mean over the sources asked for by their shares."""
        found = []
        for lora, share in zip(batch.unstack(), shares, strict=True):
            own = [s for s in range(len(SOURCES)) if share[s] > 0]
            found.append(sum(float(share[s]) * float(self.base[s] - self._loss(lora, s)) for s in own))
        return torch.tensor(found)


def scaled(batch: Batch, size: float) -> Batch:
    return batch.map(lambda U, V: (U * size, V))


def evaluate(
    zoo: str | Path, out: str | Path = "reports", *, quick: bool = False, model: Path | None = None
) -> str:
    """Fit, train, judge; write speeches.json and speeches.md, and give the Markdown.

    `quick`: five sources, few windows, one learning rate, to see that everything works."""
    found_zoo, out = Zoo.open(zoo), Path(out)
    plan = SpeechesPlan()
    tuner = Tuner.of(checkpoints_dir() / "tiny-lm", plan.layers, plan.targets, plan.seed)
    bf16_matmuls(tuner.base.model, False)  # judged in float32, as a user's model is
    train, held = (found_zoo.split(s).select(lambda r: "poison" not in r) for s in ("train", "validation"))
    batch, held_batch = unit(train.load()), unit(held.load())
    shares, held_shares = (z.labels() / z.labels().sum(1, keepdim=True) for z in (train, held))
    asked = requests()
    if quick:
        asked = {k: v[:5] for k, v in asked.items()}
    rates = RATES[:1] if quick else RATES
    validation, test = (
        Judge(tuner, "validation", 20 if quick else 80),
        Judge(tuner, "test", 20 if quick else WINDOWS),
    )
    speaker = Speaker.from_pretrained(model or checkpoints_dir() / "speeches")
    systems: dict[str, Any] = {
        "lolgen": lambda s: speaker.batch(s, RANK, 1.0),
        "average": average(batch),
        "ridge": ridge(batch, shares, held_batch, held_shares),
        "mlp": mlp(batch, shares, steps=20 if quick else 1500),
    }
    found: dict[str, dict[str, Any]] = {}
    made: dict[str, tuple[dict[str, Batch], dict[str, Any]]] = {}
    bar = tqdm(total=len(NAMES), desc="eval speeches", unit="system", mininterval=1)
    for name in NAMES:
        if name in systems:
            bank = {k: systems[name](s) for k, s in asked.items()}
            chosen: dict[str, Any] = {}
        else:
            single = asked["single"]
            tries = {}
            for lr in rates:
                tries[lr] = learn(tuner, name, "single", single, lr)
            lr = max(rates, key=lambda r: float(validation.drops(tries[r], single).mean()))
            bank = {k: tries[lr] if k == "single" else learn(tuner, name, k, s, lr) for k, s in asked.items()}
            chosen = {"lr": lr}
        sizes = (1.0,) if quick else SIZES
        size = max(
            sizes, key=lambda s: float(validation.drops(scaled(bank["single"], s), asked["single"]).mean())
        )
        made[name] = {k: scaled(b, size) for k, b in bank.items()}, {**chosen, "size": size}
        bar.update()
    bar.close()
    drops = {n: {k: test.drops(b, asked[k]) for k, b in made[n][0].items()} for n in NAMES}
    for name in NAMES:
        entry: dict[str, Any] = {
            "gain": round(float(drops[name]["single"].sum() / drops["real"]["single"].sum()), 4),
            **{f"gain_{k}": round(float(d.sum() / drops["real"][k].sum()), 4) for k, d in drops[name].items()},
            **{f"drop_{k}": round(float(d.mean()), 5) for k, d in drops[name].items()},
            "perplexity": {
                s: round(float((test.base[k] - drops[name]["single"][k]).exp()), 3)
                for k, s in enumerate(list(SOURCES)[: len(asked["single"])])
            },
            **made[name][1],
        }  # fmt: skip
        found[name] = entry
    report = {
        "command": f"lolgen eval speeches{' --quick' if quick else ''}",
        "base_perplexity": {s: round(float(test.base[k].exp()), 3) for k, s in enumerate(SOURCES)},
        "systems": found,
    }
    write_file(out / "speeches.json", (json.dumps(report, indent=1) + "\n").encode())
    text = markdown(report)
    write_file(out / "speeches.md", text.encode())
    return text


def markdown(report: dict[str, Any]) -> str:
    systems = report["systems"]
    lines = [
        "# Adapters for sources, judged by perplexity", "",
        f"`{report['command']}`: tiny-lm with an adapter of rank {RANK}, on text of the asked sources that neither "
        "base nor adapters were trained on. `gain`: drop in log-perplexity as a share of that of real adapters. "
        "Learning rates and the size of delta W are chosen on validation text for every system.", "",
        "| system | gain, one source | two sources | five to twelve | drop, one source (nats) | size |",
        "| --- | --- | --- | --- | --- | --- |",
        *(
            f"| {n} | {s['gain']:.3f} | {s['gain_pair']:.3f} | {s['gain_subset']:.3f} | {s['drop_single']:.4f} "
            f"| {s['size']:g} |"
            for n, s in systems.items()
        ),
        "", "Perplexity on the asked source:", "",
        "| source | base | " + " | ".join(systems) + " |", "| --- |" + " --- |" * (len(systems) + 1),
        *(
            f"| {s} | {report['base_perplexity'][s]:.2f} | "
            + " | ".join(f"{e['perplexity'][s]:.2f}" for e in systems.values()) + " |"
            for s in next(iter(systems.values()))["perplexity"]
        ),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"
