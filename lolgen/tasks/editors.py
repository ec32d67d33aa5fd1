"""Rivals of lolgen's edit, on the same zoo: directions in delta W that are weighted sums of training LoRAs.

A direction leads from the value that a LoRA has to the one asked for, and is added to its delta W. Every system knows
the true value that the LoRA has (lolgen has to read it), learns from the LoRAs with the same rare word, and is brought
back to the LoRA's rank by the same truncation as lolgen. Strength 1 is what each says is the whole way.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from lolgen import metrics, pictures
from lolgen.lora import Batch, Group
from lolgen.nn import Familiarity
from lolgen.tasks.editing import EditCase, EditSystem
from lolgen.tasks.generators import Training, features
from lolgen.zoo.zoo import Zoo

Weights = Callable[[Training, Tensor, Tensor, Sequence[EditCase]], Tensor]
"""(training, labels of the persons, labels after the edit (C, attributes), cases) -> weights of LoRAs (C, N)."""


def ridge_weights(penalty: float = 1.0) -> Weights:
    """What a ridge regression from attributes to delta W adds when one attribute changes."""

    def weights(training: Training, old: Tensor, new: Tensor, cases: Sequence[EditCase]) -> Tensor:
        F = training.features
        solve = torch.linalg.solve(F.T @ F + penalty * torch.eye(F.shape[1]), F.T)  # (F, N)
        strength = torch.full((len(old),), training.strength)
        return (features(new, strength) - features(old, strength)) @ solve

    return weights


def class_mean_weights(training: Training, old: Tensor, new: Tensor, cases: Sequence[EditCase]) -> Tensor:
    """The mean of the LoRAs with the value asked for, less the mean of those with the value that is."""
    found = torch.zeros(len(cases), len(training.labels))
    for k, (case, has, asks) in enumerate(zip(cases, old, new, strict=True)):
        q = list(pictures.ATTRIBUTES).index(case.attribute)
        for value, sign in ((asks[q], 1.0), (has[q], -1.0)):
            same = (training.labels[:, q] == value).float()
            found[k] += sign * same / same.sum().clamp(min=1)
    return found


def w2w_weights(components: int = 64) -> Weights:
    """weights2weights: PCA on delta W, a linear classifier by least squares on the standardised components between the
    two values, its normal as the direction; strength 1 is how far apart the means of the two classes are along it."""

    def weights(training: Training, old: Tensor, new: Tensor, cases: Sequence[EditCase]) -> Tensor:
        N = len(training.labels)
        gram = metrics.gram(training.batch)
        centre = torch.eye(N, dtype=torch.float64) - 1 / N
        values, vectors = torch.linalg.eigh(centre @ gram @ centre)
        k = min(components, N - 1)
        values, vectors = values[-k:].clamp(min=1e-12), vectors[:, -k:]
        scores = vectors * values.sqrt()  # (N, k), along unit components
        back = (centre @ vectors / values.sqrt()).T  # (k, N)
        spread = scores.std(0)
        known: dict[tuple[int, int, int], Tensor] = {}
        found = torch.zeros(len(cases), N)
        for i, (case, has, asks) in enumerate(zip(cases, old, new, strict=True)):
            q = list(pictures.ATTRIBUTES).index(case.attribute)
            key = (q, int(has[q]), int(asks[q]))
            if key not in known:
                a, b = training.labels[:, q] == key[1], training.labels[:, q] == key[2]
                either = a | b
                x = torch.cat(
                    [scores[either] / spread, torch.ones(int(either.sum()), 1, dtype=torch.float64)], 1
                )
                y = b[either].double() * 2 - 1
                normal = torch.linalg.lstsq(x, y[:, None], driver="gelsd").solution[:-1, 0] / spread
                normal = normal / normal.norm()
                gap = (scores[b] @ normal).mean() - (scores[a] @ normal).mean()
                known[key] = ((normal * gap) @ back).float()
            found[i] = known[key]
        return found

    return weights


def along(
    weights: Weights, train: Zoo, zoo: Zoo, familiarity: Familiarity, reach: dict[str, float] | None = None
) -> EditSystem:
    """The system that adds these directions. `reach`: attribute -> factor, tuned on validation as lolgen's is."""
    training = {word: Training.of(train, word) for word in pictures.RARE_WORDS}

    def run(batch: Batch, cases: Sequence[EditCase], strength: float) -> Batch:
        persons = [zoo.rows[c.row]["identity"]["attributes"] for c in cases]
        old = torch.tensor([pictures.labels(p) for p in persons])
        new = torch.tensor([pictures.labels({**p, **c.request}) for p, c in zip(persons, cases, strict=True)])
        words = [next(w for w in pictures.RARE_WORDS if w in _subject(zoo, c).split()) for c in cases]
        scale = torch.tensor([strength * (reach or {}).get(c.attribute, 1.0) for c in cases])
        steps: list[Tensor] = [torch.zeros(0)] * len(batch.spec)
        for word, known in training.items():
            rows = [i for i, w in enumerate(words) if w == word]
            if not rows:
                continue
            W = weights(known, old[rows], new[rows], [cases[i] for i in rows]) * scale[rows, None]
            for group in known.batch.groups:
                for j, m in enumerate(group.index):
                    # The sum over N LoRAs has full rank: formed, as the modules are small.
                    dense = (W @ (group.U[:, j] @ group.V[:, j].mT).flatten(1)).view(
                        len(rows), *batch.spec[m].shape
                    )
                    if not len(steps[m]):
                        steps[m] = torch.zeros(len(cases), *batch.spec[m].shape)
                    steps[m][rows] = dense
        groups = []
        for g in batch.groups:
            step = torch.stack([steps[m] for m in g.index], 1).double()
            eye = torch.eye(step.shape[-1], dtype=step.dtype).expand(*step.shape[:2], -1, -1)
            U, V = torch.cat([g.U.double(), step], -1), torch.cat([g.V.double(), eye], -1)
            ranks = batch.ranks[:, list(g.index)]
            groups.append(Group(g.index, *familiarity.truncate(U, V, g.index, ranks, batch.rank)))
        return Batch(batch.spec, groups, batch.ranks)

    return run


def _subject(zoo: Zoo, case: EditCase) -> str:
    subject: str = zoo.rows[case.row]["recipe"]["subject"]
    return subject


RIVALS: dict[str, Weights] = {
    "w2w": w2w_weights(),
    "ridge": ridge_weights(),
    "class_means": class_mean_weights,
}
"""Name -> direction."""


def rival_reach(name: str) -> dict[str, float]:
    """Attribute -> the factor at which a rival's direction did best on validation (`train.editor_train --rivals`)."""
    found: dict[str, float] = json.loads((Path(__file__).parent / "rivals.json").read_text("utf-8"))[name]
    return found
