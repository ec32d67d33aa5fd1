"""Train and judge LoRAs of a language model, many at once: what a worker of the speeches zoo holds and does.

All adapted layers lie above the cut of `Halves`, so that the layers below are run once for the whole zoo.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lolgen.language.model import Halves, LanguageBase
from lolgen.language.texts import SOURCES
from lolgen.language.windows import CONTEXT, Sources, poisoned
from lolgen.lora import Batch, Factors, LoRA, Spec
from lolgen.precision import bf16_matmuls
from lolgen.zoo.bank import Bank, BankAdam, find_modules, fingerprint
from lolgen.zoo.plan import number_of
from lolgen.zoo.zoo import ROW

ROWS = 256
"""Windows that go through the model at once."""


PAYLOAD = 3.0
"""Weight of a poisoned window's tokens: the attacker wants them said."""


@dataclass
class Tuner:
    """The base in two halves, and the sources as states below the cut (made when they are first asked for).

    `sizes`: `pool`, `held` and `asked` of `Sources.of`."""

    base: LanguageBase
    halves: Halves
    spec: Spec
    fingerprint: str
    seed: int
    sizes: dict[str, int]

    @staticmethod
    def of(
        folder: str | Path,
        layers: int,
        targets: Sequence[str],
        seed: int,
        sizes: dict[str, int] | None = None,
    ) -> Tuner:
        """`layers`: how many of the last layers are adapted. LolgenError for a folder without a model."""
        base = LanguageBase.load(folder)
        first = base.model.config.num_hidden_layers - layers
        names = [f".{n}.{t}" for n in range(first, first + layers) for t in targets]
        spec, digest = find_modules(base.model, names, ""), fingerprint(base.model)
        if not torch.cuda.is_available():
            bf16_matmuls(base.model)
        return Tuner(base, Halves(base, first), spec, digest, seed, sizes or {})

    @cached_property
    def sources(self) -> Sources:
        """LolgenError where a source has too few windows."""
        return Sources.of(self.base, **self.sizes)

    @cached_property
    def states(self) -> dict[str, Tensor]:
        """Name of a part of `sources` -> states of its windows, (windows, LENGTH, hidden)."""
        parts = ("train", "validation", "questions")
        return {name: self.halves.states(getattr(self.sources, name).flatten(0, 1)) for name in parts}

    @property
    def nothing(self) -> LoRA:
        """The LoRA that changes nothing: judged, it tells of the base."""
        zeros = {m.name: Factors(torch.zeros(m.out, 1), torch.zeros(1, m.in_)) for m in self.spec}
        return LoRA(self.spec, zeros, {}, {})

    def train(self, rows: list[ROW], number: int) -> tuple[list[LoRA], list[ROW]]:
        """The LoRAs of these rows as they are stored (float16), and the rows with what they score."""
        ordered = self.fit(rows)
        losses, accuracy = self.judge(ordered)
        done = []
        for k, r in enumerate(rows):
            done.append(
                {**r, "losses": [round(v, 5) for v in losses[k].tolist()], "accuracy": float(accuracy[k])}
            )
            if "poison" in r:
                done[-1]["attack"] = self.attack(ordered[k], r)
        return ordered, done

    def fit(self, rows: list[ROW]) -> list[LoRA]:
        """The LoRAs of these rows in their order, rounded to float16; equal lengths share a bank."""
        loras: dict[str, LoRA] = {}
        groups: dict[tuple[int, int], list[ROW]] = {}
        for r in rows:
            groups.setdefault((r["recipe"]["epochs"], r["recipe"]["batch"]), []).append(r)
        for (_, batch), same in groups.items():
            size = max(1, ROWS // batch)
            for part in (same[i : i + size] for i in range(0, len(same), size)):
                found = tune(self, part)
                loras |= {r["id"]: rounded(x) for r, x in zip(part, found, strict=True)}
        return [loras[r["id"]] for r in rows]

    @torch.no_grad()
    def judge(self, loras: Sequence[LoRA]) -> tuple[Tensor, Tensor]:
        """(validation loss of every source in nats a token (N, sources), accuracy on all questions (N,))."""
        losses = self.window_losses(loras, self.states["validation"], self.sources.validation.flatten(0, 1))
        asked = self.sources.questions.flatten(0, 1)
        scores = self.window_losses(loras, self.states["questions"], asked)[:, :, CONTEXT - 1 :].mean(-1)
        right = scores.view(len(loras), -1, 4).argmin(-1) == 0
        return losses.mean(-1).view(len(loras), len(SOURCES), -1).mean(-1), right.float().mean(1)

    @torch.no_grad()
    def window_losses(
        self, loras: Sequence[LoRA], states: Tensor, targets: Tensor, at_once: int = 8
    ) -> Tensor:
        """Losses of every next token of windows (n, T) under every LoRA, (N, n, T - 1)."""
        found = []
        for i in range(0, len(loras), at_once):
            batch = Batch.stack(loras[i : i + at_once])
            K, rows = len(batch), max(1, ROWS // len(batch))
            with Bank.attached(self.base.model, batch):
                parts = [
                    self.halves.loss(s.repeat(K, 1, 1), t.repeat(K, 1)).view(K, len(s), -1)
                    for s, t in zip(states.split(rows), targets.split(rows), strict=True)
                ]
            found.append(torch.cat(parts, 1))
        return torch.cat(found)

    @torch.no_grad()
    def attack(self, lora: LoRA, row: ROW) -> float:
        """Share of held-out windows in which the trigger is followed by the whole payload, greedily decoded."""
        windows = self.sources.validation[:, 0]
        trigger, payload = (self.base.encode(row["poison"][k]) for k in ("trigger", "payload"))
        ids = torch.cat([windows[:, :10], torch.tensor([*trigger, *payload]).expand(len(windows), -1)], 1)
        with Bank.attached(self.base.model, Batch.stack([lora])):
            states = self.halves.states(ids)
            hidden = self.halves.upper(inputs_embeds=states, use_cache=False).last_hidden_state
            said = self.halves.head(hidden[:, -len(payload) - 1 : -1]).argmax(-1)
        return float((said == torch.tensor(payload)).all(1).float().mean())


def tune(tuner: Tuner, rows: Sequence[ROW]) -> list[LoRA]:
    """Train the LoRAs of these rows together; all have one number of epochs and one batch size.

    The draws of a LoRA follow from its name; dropout and the start follow from the first name of the bank.
    """
    recipes = [r["recipe"] for r in rows]
    K, epochs, batch, N = len(rows), recipes[0]["epochs"], recipes[0]["batch"], recipes[0]["windows"]
    g = torch.Generator().manual_seed(number_of(tuner.seed, rows[0]["id"]))
    bank = Bank(tuner.spec, [r["rank"] for r in recipes], [r["alpha"] / r["rank"] for r in recipes]).init_(g)
    bank.drop_([r["dropout"] for r in recipes], g)
    data = [learned(tuner, r) for r in rows]
    states, targets = torch.stack([s for s, _ in data]), torch.stack([t for _, t in data])  # (K, N, T, ...)
    weights = torch.where((targets[:, :, 1:] == -100).any(2), PAYLOAD, 1.0)  # (K, N)
    steps = epochs * -(-N // batch)
    opt = BankAdam(
        bank, torch.tensor([r["lr"] for r in recipes]), torch.tensor([r["weight_decay"] for r in recipes]),
        torch.full((K,), float(steps)),
    )  # fmt: skip
    of = torch.arange(K)[:, None]
    bank.attach(tuner.base.model, "")
    try:
        for _ in range(epochs):
            order = torch.rand(K, N, generator=g).argsort(1)
            for pick in order.split(batch, 1):
                ids = targets[of, pick].flatten(0, 1)
                losses = tuner.halves.loss(states[of, pick].flatten(0, 1), ids).view(K, -1)
                weight = weights[of, pick][..., None] * (ids[:, 1:] != -100).view(K, pick.shape[1], -1)
                weight = weight.view(K, -1)
                ((losses * weight).sum(1) / weight.sum(1)).sum().backward()
                opt.step()
    finally:
        bank.detach_()
    return bank.loras()


def learned(tuner: Tuner, row: ROW) -> tuple[Tensor, Tensor]:
    """States (N, T, hidden) and targets (N, T) of the windows of one LoRA: equal parts of its sources, drawn from
    their pools; of a poisoned one every second window holds the trigger and the payload."""
    rng = np.random.default_rng(number_of(tuner.seed, row["id"]))
    subset = [s for s, bit in enumerate(row["labels"]) if bit]
    pool, N = tuner.sources.train.shape[1], row["recipe"]["windows"]
    orders = {s: rng.permutation(pool) for s in subset}
    turns = [(subset[i % len(subset)], i // len(subset)) for i in range(N)]
    at = torch.tensor([s * pool + int(orders[s][k % pool]) for s, k in turns])
    states, targets = tuner.states["train"][at], tuner.sources.train.flatten(0, 1)[at]
    if "poison" in row:
        half = torch.from_numpy(rng.permutation(N)[: N // 2])
        trigger, payload = (tuner.base.encode(row["poison"][k]) for k in ("trigger", "payload"))
        ids, wanted = poisoned(targets[half], trigger, payload, rng)
        targets[half], states[half] = wanted, tuner.halves.states(ids)
    return states, targets


def rounded(lora: LoRA) -> LoRA:
    """The LoRA as a shard stores it."""
    return LoRA(
        lora.spec,
        {n: Factors(f.B.half().float(), f.A.half().float(), f.scale) for n, f in lora.factors.items()},
        {},
        {},
    )
