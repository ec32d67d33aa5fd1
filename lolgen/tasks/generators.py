"""What generates a LoRA from attributes: lolgen and the systems it is compared with, behind one call.

Every system is a function `(requests, seeds) -> list[LoRA]` for the prompts "... sks person". The closed-form ones
(average, ridge, weights2weights) are weighted sums of training LoRAs, and differ in the weights alone. They train on
the LoRAs whose prompts hold the same rare word, as the others' directions are of no use to them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot

from lolgen import gl, metrics, pictures
from lolgen.conditions import WIDTHS, complete, strength_of
from lolgen.lora import Batch, Group, LoRA
from lolgen.zoo.zoo import Zoo

Request = Mapping[str, str]
System = Callable[[Sequence[Request], Sequence[int]], list[LoRA]]


@dataclass
class Training:
    """What the baselines learn from: LoRAs of one rare word, their features (N, F) and labels (N, attributes)."""

    batch: Batch
    features: Tensor
    labels: Tensor
    marginals: list[Tensor]
    strength: float

    @staticmethod
    def of(zoo: Zoo, rare: str = pictures.RARE_WORDS[0], strength: float = 1.0) -> Training:
        rows = zoo.split("train").select(lambda r: rare in r["recipe"]["subject"])
        labels = rows.labels()
        strengths = torch.tensor([strength_of(r["recipe"]) for r in rows])
        marginals = [
            torch.bincount(labels[labels[:, k] >= 0, k], minlength=w).float() for k, w in enumerate(WIDTHS)
        ]
        return Training(rows.load(), features(labels, strengths), labels, marginals, strength)

    def ask(self, requests: Sequence[Request], seeds: Sequence[int]) -> tuple[Tensor, Tensor]:
        """(features, labels) of complete requests: what is left open is drawn by the seed, as lolgen does."""
        rows = []
        for request, seed in zip(requests, seeds, strict=True):
            g = torch.Generator().manual_seed(int(seed))
            rows.append(pictures.labels(complete(request, self.marginals, g)))
        labels = torch.tensor(rows)
        return features(labels, torch.full((len(labels),), self.strength)), labels


def features(labels: Tensor, strength: Tensor) -> Tensor:
    """Attribute indicators, strength and a constant, (N, F)."""
    blocks = [
        one_hot(labels[:, k].clamp(min=0), w) * (labels[:, k : k + 1] >= 0) for k, w in enumerate(WIDTHS)
    ]
    return torch.cat([*[b.float() for b in blocks], strength[:, None].float(), torch.ones(len(labels), 1)], 1)


def combine(batch: Batch, weights: Tensor, rank: int) -> list[LoRA]:
    """The best rank-`rank` LoRAs of sums of delta W weighted by `weights` (R, N).

    The sum over N LoRAs has full rank: it is formed here, module by module (a baseline of small modules).
    """
    groups = []
    for group in batch.groups:
        us, vs = [], []
        for m in range(len(group.index)):
            U, V = group.U[:, m], group.V[:, m]  # (N, out, r), (N, in, r)
            out, in_ = U.shape[1], V.shape[1]
            dense = (weights @ (U @ V.transpose(1, 2)).flatten(1)).view(-1, out, in_)
            P, s, Q = torch.linalg.svd(dense, full_matrices=False)
            root = s[:, None, :rank].sqrt()
            us.append(P[..., :rank] * root)
            vs.append(Q[:, :rank].transpose(1, 2) * root)
        groups.append(Group(group.index, torch.stack(us, 1), torch.stack(vs, 1)))
    ranks = torch.full((len(weights), len(batch.spec)), rank)
    return Batch(batch.spec, groups, ranks).unstack()


def nearest_by_attributes(training: Training, labels: Tensor, seeds: Sequence[int], count: int) -> Tensor:
    """(R, count) rows of the training LoRAs that share most visible attributes; ties by chance of the seed."""
    same = (labels[:, None] == training.labels[None]).float().sum(-1)  # (R, N)
    n = len(training.labels)
    tie = torch.stack([torch.rand(n, generator=torch.Generator().manual_seed(int(s))) for s in seeds])
    return (same + 0.5 * tie).topk(count, dim=1).indices


def noised(training: Training, noise: float = 0.1) -> System:
    """The nearest training LoRA with Gaussian noise of `noise` times the size of each factor."""

    def run(requests: Sequence[Request], seeds: Sequence[int]) -> list[LoRA]:
        _, labels = training.ask(requests, seeds)
        pick = nearest_by_attributes(training, labels, seeds, 1)[:, 0]
        near = training.batch[pick]
        g = torch.Generator().manual_seed(int(sum(seeds)))

        def add(x: Tensor) -> Tensor:
            size = x.square().mean((-1, -2), keepdim=True).sqrt()
            return x + noise * size * torch.randn(x.shape, generator=g)

        return near.map(lambda U, V: (add(U), add(V))).unstack()

    return run


def average(training: Training, count: int = 5, rank: int = 4) -> System:
    """The mean delta W of the `count` training LoRAs nearest in attributes."""

    def run(requests: Sequence[Request], seeds: Sequence[int]) -> list[LoRA]:
        _, labels = training.ask(requests, seeds)
        near = nearest_by_attributes(training, labels, seeds, count)
        weights = torch.zeros(len(near), len(training.labels)).scatter_(1, near, 1 / count)
        return combine(training.batch, weights, rank)

    return run


def ridge(training: Training, penalty: float = 1.0, rank: int = 4) -> System:
    """Ridge regression from attributes to delta W in closed form: `W* = Phi^T (Phi Phi^T + penalty)^-1` weights."""
    F = training.features
    solve = torch.linalg.solve(F.T @ F + penalty * torch.eye(F.shape[1]), F.T)  # (F, N)

    def run(requests: Sequence[Request], seeds: Sequence[int]) -> list[LoRA]:
        asked, _ = training.ask(requests, seeds)
        return combine(training.batch, asked @ solve, rank)

    return run


def w2w(training: Training, components: int = 64, rank: int = 4) -> System:
    """weights2weights: PCA on delta W (by the Gram matrix), a linear map from attributes to the components, and what
    the map leaves open drawn from a Gaussian per component."""
    N = len(training.features)
    gram = metrics.gram(training.batch, training.batch).double()
    centre = torch.eye(N, dtype=torch.float64) - 1 / N
    values, vectors = torch.linalg.eigh(centre @ gram @ centre)
    k = min(components, N - 1)
    values, vectors = values[-k:].clamp(min=1e-12), vectors[:, -k:]
    scores = vectors * values.sqrt()  # (N, k) coordinates along unit components
    back = (centre @ vectors / values.sqrt()).T  # (k, N): component k as a weighted sum of LoRAs
    Phi = training.features.double()
    coefficients = torch.linalg.lstsq(Phi, scores, driver="gelsd").solution  # (F, k)
    spread = (scores - Phi @ coefficients).std(0)

    def run(requests: Sequence[Request], seeds: Sequence[int]) -> list[LoRA]:
        asked, _ = training.ask(requests, seeds)
        draws = torch.stack(
            [
                torch.randn(k, generator=torch.Generator().manual_seed(int(s) + 1), dtype=torch.float64)
                for s in seeds
            ]
        )
        weights = (asked.double() @ coefficients + draws * spread) @ back + 1 / N
        return combine(training.batch, weights.float(), rank)

    return run


Hypernetwork = Callable[[Tensor, Tensor], Batch]
"""(features (R, F), noise (R, n)) -> R LoRAs."""


def hypernetwork(
    batch: Batch, features: Tensor, seed: int = 0, steps: int = 600, width: int = 512, noise: int = 16
) -> Hypernetwork:
    """An MLP onto flattened factors: (features, noise) -> canonical U and V, by squared error."""
    torch.manual_seed(seed)
    canonical = gl.canonical_batch(batch)
    sizes = [(g.U.shape[1:], g.V.shape[1:]) for g in canonical.groups]
    flat = torch.cat([torch.cat([g.U.flatten(1), g.V.flatten(1)], 1) for g in canonical.groups], 1)
    mean, std = flat.mean(0), flat.std(0) + 1e-6
    target = (flat - mean) / std
    net = nn.Sequential(
        nn.Linear(features.shape[1] + noise, width), nn.GELU(), nn.Linear(width, width), nn.GELU(),
        nn.Linear(width, flat.shape[1]),
    )  # fmt: skip
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        i = torch.randint(len(target), (128,))
        x = torch.cat([features[i], torch.randn(len(i), noise)], 1)
        loss = (net(x) - target[i]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    @torch.no_grad()
    def make(asked: Tensor, z: Tensor) -> Batch:
        out = net(torch.cat([asked, z], 1)) * std + mean
        groups, at = [], 0
        for group, (u, v) in zip(canonical.groups, sizes, strict=True):
            U = out[:, at : at + u.numel()].view(-1, *u)
            V = out[:, at + u.numel() : at + u.numel() + v.numel()].view(-1, *v)
            at += u.numel() + v.numel()
            groups.append(Group(group.index, U.contiguous(), V.contiguous()))
        ranks = torch.full((len(out), len(canonical.spec)), groups[0].U.shape[-1])
        return Batch(canonical.spec, groups, ranks)

    return make


def mlp(training: Training, seed: int = 0, steps: int = 600, width: int = 512, noise: int = 16) -> System:
    """The `hypernetwork` of attributes; its noise is drawn by the seed of a request."""
    make = hypernetwork(training.batch, training.features, seed, steps, width, noise)

    def run(requests: Sequence[Request], seeds: Sequence[int]) -> list[LoRA]:
        asked, _ = training.ask(requests, seeds)
        z = torch.stack(
            [torch.randn(noise, generator=torch.Generator().manual_seed(int(s) + 1)) for s in seeds]
        )
        return make(asked, z).unstack()

    return run
