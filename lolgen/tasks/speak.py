"""`lolgen eval speeches`: adapters for sources, generated and trained, judged by perplexity on text nobody trained on.

Every system is asked for each source alone, for pairs, and for random subsets. What the rivals give is brought to the
size of delta W that does best on validation text, one factor for all adapters of a rival; lolgen comes as it ships. The
judge is the base in float32 with the adapter, on windows of the test split of the sources asked for; `gain` is a
system's drop in log-perplexity, summed over requests, as a share of that of real adapters.

    real         trained on the sources asked for; the learning rate is the best of three on validation
    all_sources  one adapter trained on everything, likewise
    average      the mean delta W of the zoo's clean training LoRAs, each at unit size
    ridge        ridge regression from shares of sources to the same
    mlp          a hypernetwork from shares of sources to their canonical factors
    lolgen       the shipped generator

The generator saw, besides the zoo's LoRAs, the training text of the sources, as real and all_sources did.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor
from tqdm import tqdm

from lolgen.io.atomic import write_file
from lolgen.language.texts import SOURCES
from lolgen.language.windows import LENGTH, source_windows
from lolgen.lora import Batch, Group, LoRA
from lolgen.paths import checkpoints_dir
from lolgen.precision import bf16_matmuls
from lolgen.speaker import Speaker
from lolgen.tasks.generators import combine, hypernetwork
from lolgen.tasks.ours import unit
from lolgen.zoo.speeches import SpeechesPlan
from lolgen.zoo.tuning import Tuner
from lolgen.zoo.zoo import Zoo, shard_tensors

RANK = 4
NAMES = ("lolgen", "real", "average", "all_sources", "ridge", "mlp")
SIZES = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4, 2.0, 2.8, 4.0, 5.6, 8.0)
RATES = (2e-3, 5e-3, 1e-2)
WINDOWS = 150
"""Most test windows of a source."""
LONG = 128
"""Tokens of longer test windows, as long as those that tiny-lm was trained on; so many of the source's."""
LONG_WINDOWS = 40
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


def at_work(zoo: Zoo, base: str | Path) -> tuple[SpeechesPlan, Tuner]:
    """`SpeechesPlan.of`, its states as the zoo's builder has them, and the model as a user's is."""
    plan, tuner = SpeechesPlan.of(zoo, base)
    assert tuner.states  # in bf16
    bf16_matmuls(tuner.base.model, False)
    return plan, tuner


def known(zoo: Zoo) -> tuple[Batch, Tensor, Batch, Tensor]:
    """What rivals know: the clean training LoRAs at unit size and their shares (N, sources), the validation's too."""
    train, held = (zoo.split(s).select(lambda r: "poison" not in r) for s in ("train", "validation"))
    shares, held_shares = (z.labels() / z.labels().sum(1, keepdim=True) for z in (train, held))
    return unit(train.load()), shares, unit(held.load()), held_shares


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


def mlp(batch: Batch, shares: Tensor, steps: int = 1500) -> System:
    """The `hypernetwork` of shares, without noise."""
    make = hypernetwork(batch, shares, steps=steps, width=256, noise=0)
    return lambda s: make(s, torch.zeros(len(s), 0))


def learn(
    tuner: Tuner, plan: SpeechesPlan, name: str, kind: str, shares: Tensor, lr: float, folder: Path
) -> Batch:
    """The trained rivals, as the zoo trains: an adapter for every request (real), or one on everything for all of them
    (all_sources). Kept in `folder`, so that a killed evaluation does not train them again."""
    n = len(SOURCES)
    bits = (shares > 0).long().tolist() if name == "real" else [[1] * n]
    rows = [
        {
            "id": f"{name}-{kind}-{k}-{lr}", "split": "eval", "rank": RANK, "labels": labels,
            "recipe": {"rank": RANK, "alpha": float(RANK), "lr": lr, "weight_decay": 1e-4, "epochs": max(plan.epochs),
                       "batch": min(plan.batches), "dropout": 0.05, "windows": plan.windows},
        }
        for k, labels in enumerate(bits)
    ]  # fmt: skip
    key = hashlib.sha256(json.dumps([tuner.fingerprint, rows], sort_keys=True).encode()).hexdigest()[:16]
    path = folder / f"{key}.safetensors"
    if not path.is_file():
        bf16_matmuls(tuner.base.model)
        tensors = shard_tensors(tuner.spec, tuner.fit(rows), torch.float16)
        bf16_matmuls(tuner.base.model, False)
        folder.mkdir(parents=True, exist_ok=True)
        write_file(path, serialise(tensors))
    t = load_file(path)
    groups = [
        Group(index, t[f"B.{g}"].float(), t[f"A.{g}"].float().mT)
        for g, (_, index) in enumerate(tuner.spec.groups)
    ]
    batch = Batch(tuner.spec, groups, torch.full((len(rows), len(tuner.spec)), RANK))
    return batch if name == "real" else batch[torch.zeros(len(shares), dtype=torch.long)]


class Judge:
    """Windows of one split of every source, and losses on them."""

    def __init__(self, tuner: Tuner, split: str, count: int, length: int = LENGTH) -> None:
        self.tuner = tuner
        g = torch.Generator().manual_seed(3)
        self.ids, self.states = [], []
        for s in SOURCES:
            rows = source_windows(tuner.base, s, split, length=length)
            rows = rows[torch.randperm(len(rows), generator=g)[:count]]
            self.ids.append(rows)
            self.states.append(tuner.halves.states(rows))
        self.base = torch.stack([self._loss(tuner.nothing, s) for s in range(len(SOURCES))])

    @torch.no_grad()
    def _loss(self, lora: LoRA, source: int) -> Tensor:
        return self.tuner.window_losses([lora], self.states[source], self.ids[source]).mean()

    def each(self, batch: Batch, wanted: Tensor) -> Tensor:
        """(N, sources): how much every LoRA lowers log-perplexity on the sources `wanted` (N, sources) marks; 0 at the
        others."""
        found = torch.zeros(len(batch), len(SOURCES))
        for row, lora, marks in zip(found, batch.unstack(), wanted, strict=True):
            for s in marks.nonzero()[:, 0].tolist():
                row[s] = self.base[s] - self._loss(lora, s)
        return found

    def drops(self, batch: Batch, shares: Tensor) -> Tensor:
        """(N,): how much every LoRA lowers log-perplexity, mean over the sources asked for by their shares."""
        return (self.each(batch, shares > 0) * shares).sum(1)


def scaled(batch: Batch, size: float) -> Batch:
    return batch.map(lambda U, V: (U * size, V))


def evaluate(
    zoo: str | Path,
    out: str | Path = "reports",
    *,
    quick: bool = False,
    model: str | Path | None = None,
    base: str | Path = "tiny-lm",
) -> str:
    """Fit, train, judge; write speeches.json and speeches.md, and give the Markdown.

    `model`: folder of the speaker, the shipped one by default; `base`: what the zoo's adapters are of.
    `quick`: five sources, few windows, one learning rate, to see that everything works."""
    found_zoo, out = Zoo.open(zoo), Path(out)
    plan, tuner = at_work(found_zoo, base)
    batch, shares, held_batch, held_shares = known(found_zoo)
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
        "lolgen": lambda s: speaker.batch(s, RANK),
        "average": average(batch),
        "ridge": ridge(batch, shares, held_batch, held_shares),
        "mlp": mlp(batch, shares, steps=20 if quick else 1500),
    }
    kept = out / ".cache" / "speeches"
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
                tries[lr] = learn(tuner, plan, name, "single", single, lr, kept)
            lr = max(rates, key=lambda r: float(validation.drops(tries[r], single).mean()))
            bank = {
                k: tries[lr] if k == "single" else learn(tuner, plan, name, k, s, lr, kept)
                for k, s in asked.items()
            }
            chosen = {"lr": lr}
        # lolgen comes as it ships: its size was tuned by its training.
        sizes = (1.0,) if quick or name == "lolgen" else SIZES
        size = max(
            sizes, key=lambda s: float(validation.drops(scaled(bank["single"], s), asked["single"]).mean())
        )
        made[name] = {k: scaled(b, size) for k, b in bank.items()}, {**chosen, "size": size}
        bar.update()
    bar.close()
    drops = {n: {k: test.drops(b, asked[k]) for k, b in made[n][0].items()} for n in NAMES}
    long = Judge(tuner, "test", 2 if quick else LONG_WINDOWS, LONG)
    for name in NAMES:
        entry: dict[str, Any] = {
            "gain": round(float(drops[name]["single"].sum() / drops["real"]["single"].sum()), 4),
            **{f"gain_{k}": round(float(d.sum() / drops["real"][k].sum()), 4) for k, d in drops[name].items()},
            **{f"drop_{k}": round(float(d.mean()), 5) for k, d in drops[name].items()},
            "drop_long": round(float(long.drops(made[name][0]["single"], asked["single"]).mean()), 5),
            "perplexity": {
                s: round(float((test.base[k] - drops[name]["single"][k]).exp()), 3)
                for k, s in enumerate(list(SOURCES)[: len(asked["single"])])
            },
            **made[name][1],
        }  # fmt: skip
        found[name] = entry
    report = {
        "command": f"lolgen eval speeches{' --quick' if quick else ''}",
        "base": Path(base).name,
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
        f"`{report['command']}`: {report['base']} with an adapter of rank {RANK}, on text of the asked sources that "
        "neither base nor adapters were trained on. `gain`: drop in log-perplexity as a share of that of real "
        "adapters. Learning rates and the size of delta W are chosen on validation text for every rival; lolgen "
        "comes as it ships. "
        f"Adapters are trained, and judged, on windows of {LENGTH} tokens; `in {LONG} tokens`: the drop on longer "
        "ones.",
        "",
        "| system | gain, one source | two sources | five to twelve | drop, one source (nats) "
        f"| in {LONG} tokens | size |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        *(
            f"| {n} | {s['gain']:.3f} | {s['gain_pair']:.3f} | {s['gain_subset']:.3f} | {s['drop_single']:.4f} "
            f"| {s['drop_long']:.4f} | {s['size']:g} |"
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
