"""lolgen's reader: one model for every task. Answers and sizes (`lolgen.tasks.traits`), read by kernels and small nets.

1. The head's symmetry is chosen first: sizes of the largest group, unless those of a smaller one read the validation
   split clearly better (what was learned is a function of delta W, how it was learned is not).
2. Kernel ridge on answers, on sizes, and on both, with Gaussians of several widths; on the cosine of whole delta W,
   whose readout is one matrix a module; each onto one-hot targets and, where classes may be ordered, onto their number.
3. Small nets on answers, on sizes, on both, and a GL-net.
4. Each is calibrated; a label takes the average of those that read it best: greedy selection with replacement
   (Caruana et al. 2004), over resampled validation splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lolgen.lora import Batch
from lolgen.nn.glnet import GLNet, GLNetConfig
from lolgen.tasks.features import cosine_gram, norms
from lolgen.tasks.reader import FULL, Budget, Classes, Config, Layout, Numbers, Reader, layout_of
from lolgen.tasks.training import apply, mlp, train_net
from lolgen.tasks.traits import TIERS, Traits, modules

RIDGES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""In units of the kernel's mean diagonal."""
WIDTHS: tuple[tuple[float, float], ...] = (
    (0.15, 0.0), (0.4, 0.0), (1.0, 0.0), (0.0, 0.1), (0.0, 0.4), (0.15, 0.1), (0.4, 0.05), (0.15, 0.4),
)  # fmt: skip
"""(of answers, of sizes): exp(-a |x - x'|^2 - s |z - z'|^2)."""
NETS: tuple[tuple[str, ...], ...] = (("answers",), ("answers",), ("sizes",), ("answers", "sizes"))
PICKS, BAGS = 15, 8
LEAST = 0.04
"""A smaller share in an average is none: the model stays small."""
MARGIN = 0.05
"""How much better, as a share of the score, a smaller group's sizes must read to be taken."""
NEIGHBOURS = 5
READOUT = 50_000_000
"""Most numbers in the cosine kernel's readout, as large as delta W for every column: beyond, there is no cosine."""


class Net(nn.Module):
    """A linear map beside an MLP, on noised inputs while it trains: of 1,600 LoRAs none is seen twice alike."""

    def __init__(self, inputs: int, outputs: int, noise: float) -> None:
        super().__init__()
        self.noise = noise
        self.linear, self.mlp = nn.Linear(inputs, outputs), mlp(inputs, 256, outputs, dropout=0.3)

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            x = x + self.noise * torch.randn_like(x)
        return self.linear(x) + self.mlp(x)


@dataclass
class Member:
    """One model of the average. `kind`: kernel, cosine, net, or glnet; `facts` say which inputs and how wide."""

    kind: str
    facts: dict[str, Any]
    tensors: dict[str, Tensor]
    net: nn.Module | None = None


@dataclass
class Ours:
    """A fitted reader: `scores` (N, C) are average log p (of classes) or average predictions (of numbers).

    `shares` (members, C), `temperatures` (members, attributes). `half` (targets,): half the width of the 95 %
    interval, standardised. `neighbours` (N, k): coordinates of the training LoRAs; `bounds` (2,): of `strangeness`.
    """

    layout: Layout
    traits: Traits
    members: list[Member]
    shares: Tensor
    temperatures: Tensor
    temperature: Tensor
    half: Tensor
    neighbours: tuple[Tensor, Tensor]
    bounds: Tensor
    config: Config

    def scores(self, batch: Batch) -> Tensor:
        """(N, C); members that no label uses are not run."""
        inputs = self.traits(batch)
        found = torch.zeros(len(batch), self.layout.total)
        for k, member in enumerate(self.members):
            if bool((self.shares[k] > 0).any()):
                found += self.shares[k] * self._calibrated(k, _scores(member, batch, inputs, self))
        return found

    def _calibrated(self, k: int, scores: Tensor) -> Tensor:
        if isinstance(self.layout, Numbers):
            return scores
        return self.layout.log_probabilities(scores, self.temperatures[k])

    def strangeness(self, batch: Batch) -> Tensor:
        """(N, 2): distance to the nearest training LoRAs by answers and by sizes, in units of what held-out LoRAs
        of the zoo have at most (their 99th percentile): above 1 is unlike the zoo."""
        return _distances(self.traits(batch), self.neighbours) / self.bounds


@dataclass
class OursReader(Reader):
    """`Reader` with intervals, and a word about inputs unlike the zoo."""

    model: Ours | None = None

    @torch.no_grad()
    def interval(self, batch: Batch) -> dict[str, Tensor]:
        """Target -> (N, 2), the 95 % interval in its own units; numbers only."""
        assert self.model is not None and isinstance(self.classes, Numbers)
        mean, half, c = self.scores(batch), self.model.half, self.classes
        both = torch.stack([mean - half, mean + half], 2) * c.std[:, None] + c.mean[:, None]
        return {n: both[:, k] for k, n in enumerate(c.counts)}

    @torch.no_grad()
    def familiar(self, batch: Batch) -> Tensor:
        """(N,) bool: False where a LoRA is unlike the zoo, and its reading a guess."""
        assert self.model is not None
        batch = batch if batch.dtype == torch.float32 else batch.to(torch.float32)
        return (self.model.strangeness(batch) <= 1).all(1)


def fit(
    train: Batch,
    y: Tensor,
    validation: Batch,
    y_val: Tensor,
    classes: Mapping[str, int] | Layout,
    seed: int = 0,
    *,
    config: Config | None = None,
    budget: Budget = FULL,
    directions: Tensor | None = None,
) -> OursReader:
    """See `lolgen.tasks.reader.Fit`; the seed moves the nets alone. What is chosen is `tier`, the symmetry of the head.

    `directions` (words, tokens, in): text states to listen at, see `lolgen.tasks.directions`; without them
    answers are to the inputs that the training LoRAs use.
    """
    layout = layout_of(classes)
    y, y_val = layout.check(train, y), layout.check(validation, y_val)
    targets = _Targets.of(layout, y)
    traits, chosen = _choose(train, validation, y_val, targets, config, budget, directions)
    inputs, held = traits(train), traits(validation)
    members, found = _kernels(inputs, held, y_val, targets)
    others = _nets(train, inputs, y, validation, held, y_val, layout, seed, budget)
    if sum(m.out * m.in_flat for m in train.spec) * layout.total <= READOUT:
        others.append(_cosine(train, validation, y_val, targets))
    for member, scores in others:
        members.append(member)
        found.append(scores)
    temperatures = torch.stack([layout.calibrate(s, y_val) for s in found])
    model = Ours(
        layout, traits, members, torch.zeros(0), temperatures, torch.ones(len(layout)), torch.ones(len(layout)),
        inputs, torch.ones(2), chosen,
    )  # fmt: skip
    calibrated = torch.stack([model._calibrated(k, s) for k, s in enumerate(found)])
    model.shares = blend(calibrated, y_val, layout, seed)
    pooled = (calibrated * model.shares[:, None]).sum(0)
    model.temperature = layout.calibrate(pooled, y_val)
    if isinstance(layout, Numbers):
        model.half = _half_width(pooled, y_val)
    model.bounds = torch.quantile(_distances(held, inputs), 0.99, dim=0).clamp(min=1e-9)
    return OursReader(layout, model.scores, model.temperature, chosen, model)


@dataclass
class _Targets:
    """What kernels regress onto: the layout's columns, then the number of the class of every attribute with more
    than two (its order may mean something)."""

    layout: Layout
    values: Tensor
    mean: Tensor
    ordinal: list[int]

    @staticmethod
    def of(layout: Layout, y: Tensor) -> _Targets:
        blocks, seen = [layout.targets(y)], [layout.seen(y)]
        ordinal: list[int] = []
        if isinstance(layout, Classes):
            ordinal = [k for k, n in enumerate(layout.counts.values()) if n > 2]
            blocks.append(y[:, ordinal].clamp(min=0).float())
            seen.append(y[:, ordinal] >= 0)
        values, known = torch.cat(blocks, 1), torch.cat(seen, 1)
        mean = (values * known).sum(0) / known.sum(0).clamp(min=1)
        # What cannot be seen is no evidence: its target is the mean of those that can.
        return _Targets(layout, torch.where(known, values, mean) - mean, mean, ordinal)

    def one_hot(self, raw: Tensor) -> Tensor:
        return raw[:, : self.layout.total]

    def ordered(self, raw: Tensor) -> Tensor:
        """(N, C) scores -(k - predicted number)^2; the one-hot scores of attributes without an order."""
        scores = raw[:, : self.layout.total].clone()
        for column, k in enumerate(self.ordinal):
            part = self.layout.slices[k]
            number = raw[:, self.layout.total + column, None]
            scores[:, part] = -((torch.arange(part.stop - part.start) - number) ** 2)
        return scores


def _squared(x: Tensor, z: Tensor) -> Tensor:
    return (x.square().sum(1)[:, None] + z.square().sum(1) - 2 * x @ z.T).clamp(min=0)


def _kernel(d: tuple[Tensor, Tensor], widths: tuple[float, float]) -> Tensor:
    return torch.exp(-widths[0] * d[0] - widths[1] * d[1])


def _ridge(K: Tensor, K_val: Tensor, y_val: Tensor, t: _Targets) -> tuple[Tensor, Tensor, float]:
    """Dual weights (N, C'), raw validation scores and their `Layout.score` at the best of RIDGES, from one
    eigendecomposition."""
    values, vectors = torch.linalg.eigh(K)
    right, left = vectors.T @ t.values, K_val @ vectors
    best: tuple[Tensor, Tensor, float] | None = None
    for ridge in RIDGES:
        weights = right / (values.clamp(min=0) + ridge * K.diagonal().mean().clamp(min=1e-12))[:, None]
        raw = left @ weights + t.mean
        score = min(t.layout.score(t.one_hot(raw), y_val), t.layout.score(t.ordered(raw), y_val))
        if best is None or score < best[2]:
            best = vectors @ weights, raw, score
    assert best is not None
    return best


def _choose(
    train: Batch, validation: Batch, y_val: Tensor, t: _Targets, config: Config | None, budget: Budget,
    directions: Tensor | None,
) -> tuple[Traits, Config]:  # fmt: skip
    """The traits of the largest group that reads as well as any smaller one, by one kernel on both blocks."""
    tiers = range(min(len(TIERS), budget.configurations)) if config is None else [int(config["tier"])]
    best: tuple[Traits, float] | None = None
    for tier in tiers:
        traits = Traits.fit(train, tier, directions)
        if len(tiers) == 1:
            return traits, {"tier": float(tier)}
        x, z = traits(train), traits(validation)
        d, far = (tuple(_squared(a, b) for a, b in zip(p, x, strict=True)) for p in (x, z))
        score = min(
            _ridge(_kernel((d[0], d[1]), w), _kernel((far[0], far[1]), w), y_val, t)[2]
            for w in ((0.15, 0.1), (0.0, 0.8))
        )
        if best is None or score < best[1] * (1 - MARGIN):
            best = traits, score
    assert best is not None
    return best[0], {"tier": float(best[0].tier)}


def _kernels(
    x: tuple[Tensor, Tensor], z: tuple[Tensor, Tensor], y_val: Tensor, t: _Targets
) -> tuple[list[Member], list[Tensor]]:
    d = _squared(x[0], x[0]), _squared(x[1], x[1])
    far = _squared(z[0], x[0]), _squared(z[1], x[1])
    members, found = [], []
    for widths in WIDTHS:
        weights, raw, _ = _ridge(_kernel(d, widths), _kernel(far, widths), y_val, t)
        for ordered in (False, True) if t.ordinal else (False,):
            facts = {"widths": list(widths), "ordered": ordered, "ordinal": t.ordinal}
            members.append(Member("kernel", facts, {"weights": weights, "mean": t.mean}))
            found.append(t.ordered(raw) if ordered else t.one_hot(raw))
    return members, found


def _cosine(train: Batch, validation: Batch, y_val: Tensor, t: _Targets) -> tuple[Member, Tensor]:
    """Kernel ridge on the cosine of delta W. It is linear in delta W / |delta W|, so its readout is one (in, out)
    matrix for every module and column: `sum(weight * U V^T)` is read off U^T weight V."""
    weights, raw, _ = _ridge(cosine_gram(train), cosine_gram(validation, train), y_val, t)
    C = t.layout.total
    tensors = {"mean": t.mean[:C]}
    scaled = weights[:, :C] / norms(train)[:, None]
    for m, group, j in modules(train):
        U, V = group.U[:, j].float(), group.V[:, j].float()
        right = (V[..., None] * scaled[:, None, None]).permute(0, 2, 1, 3).flatten(0, 1)  # (N r, in, C)
        left = U.permute(1, 0, 2).flatten(1)
        tensors[f"{m}"] = (left @ right.flatten(1)).view(U.shape[1], V.shape[1], C)
    return Member("cosine", {}, tensors), raw[:, :C]


def _nets(
    train: Batch, x: tuple[Tensor, Tensor], y: Tensor, validation: Batch, z: tuple[Tensor, Tensor], y_val: Tensor,
    layout: Layout, seed: int, budget: Budget,
) -> list[tuple[Member, Tensor]]:  # fmt: skip
    found: list[tuple[Member, Tensor]] = []
    for k, blocks in enumerate(NETS):
        scale = [_whitening(b) for b in x]
        a, b = _net_input(x, blocks, scale), _net_input(z, blocks, scale)
        noise = 0.6 if blocks == ("answers",) else 0.2
        net, _ = train_net(
            partial(Net, a.shape[1], layout.total, noise),
            a, y, b, y_val, layout, seed=seed * 16 + k, lr=2e-3, budget=budget, batch=128, patience=20,
        )  # fmt: skip
        tensors = {"answers": scale[0], "sizes": scale[1]}
        found.append((Member("net", {"blocks": list(blocks)}, tensors, net), apply(net, b)))
    sized, held = unit(train), unit(validation)

    def make() -> GLNet:
        net = GLNet(train.spec, GLNetConfig(layout.total, d=16, hidden=128))
        net.fit(sized)
        return net

    net, _ = train_net(
        make, sized, y, held, y_val, layout, seed=seed * 16 + 15, lr=5e-3, budget=budget, epochs=30
    )
    found.append((Member("glnet", {}, {}, net), apply(net, held)))
    return found


def _whitening(x: Tensor) -> Tensor:
    """(k,): half whitens: plain components drown the rare ones, fully white ones drown in noise."""
    s = x.std(0).clamp(min=1e-3 * float(x.std()))
    return 1 / (s.sqrt() * (x / s.sqrt()).std())


def _net_input(x: tuple[Tensor, Tensor], blocks: tuple[str, ...], scale: list[Tensor]) -> Tensor:
    parts = {"answers": x[0] * scale[0], "sizes": x[1] * scale[1]}
    return torch.cat([parts[b] for b in blocks], 1)


def unit(batch: Batch) -> Batch:
    """The LoRAs at unit |delta W|: a GL-net reads a weak LoRA too."""
    scale = (1 / norms(batch))[:, None, None, None]
    return batch.map(lambda U, V: (U * scale, V))


def _scores(member: Member, batch: Batch, x: tuple[Tensor, Tensor], model: Ours) -> Tensor:
    """Raw scores (N, C) of one member."""
    t = member.tensors
    if member.kind == "kernel":
        d = tuple(_squared(a, b) for a, b in zip(x, model.neighbours, strict=True))
        raw = _kernel((d[0], d[1]), tuple(member.facts["widths"])) @ t["weights"] + t["mean"]
        shape = _Targets(model.layout, raw, t["mean"], member.facts["ordinal"])
        return shape.ordered(raw) if member.facts["ordered"] else shape.one_hot(raw)
    if member.kind == "cosine":
        total = torch.zeros(len(batch), model.layout.total)
        for m, group, j in modules(batch):
            U, V = group.U[:, j].float(), group.V[:, j].float()
            low = torch.einsum("nir,oic->nroc", V, t[f"{m}"])
            total += torch.einsum("nroc,nor->nc", low, U)
        return total / norms(batch)[:, None] + t["mean"]
    assert member.net is not None
    if member.kind == "net":
        return apply(member.net, _net_input(x, tuple(member.facts["blocks"]), [t["answers"], t["sizes"]]))
    return apply(member.net, unit(batch))


def _distances(x: tuple[Tensor, Tensor], z: tuple[Tensor, Tensor]) -> Tensor:
    """(N, 2): mean distance to the NEIGHBOURS nearest rows, by answers and by sizes."""
    each = []
    for a, b in zip(x, z, strict=True):
        near = _squared(a, b).topk(min(NEIGHBOURS, len(b)), dim=1, largest=False).values
        each.append(near.sqrt().mean(1))
    return torch.stack(each, 1)


def _half_width(pooled: Tensor, y_val: Tensor) -> Tensor:
    """(targets,): the conformal 95 % quantile of |error| on the validation split (Vovk et al. 2005)."""
    out = []
    for k in range(y_val.shape[1]):
        known = ~y_val[:, k].isnan()
        error = (pooled[known, k] - y_val[known, k]).abs()
        level = min(1.0, 0.95 * (1 + 1 / max(1, len(error))))
        out.append(torch.quantile(error, level) if len(error) else torch.tensor(float("inf")))
    return torch.stack(out)


def blend(scores: Tensor, y: Tensor, layout: Layout, seed: int = 0) -> Tensor:
    """Share of each member in each label's average, (members, C), from calibrated scores (members, N, C).

    What is added next lowers the loss most; the mean over resampled splits, for one validation split is small.
    """
    members = len(scores)
    g = torch.Generator().manual_seed(seed)
    shares = torch.zeros(members, layout.total)
    for k, part in enumerate(layout.slices):
        known = ~y[:, k].isnan() if isinstance(layout, Numbers) else y[:, k] >= 0
        S, target = scores[:, known, part], y[known, k]
        if not len(target):
            shares[:, part] = 1 / members
            continue
        counts = torch.zeros(members)
        for _ in range(BAGS):
            rows = torch.randint(len(target), (len(target),), generator=g)
            counts += _greedy(S[:, rows], target[rows], isinstance(layout, Numbers))
        counts = torch.where(counts > LEAST * counts.sum(), counts, 0.0)
        shares[:, part] = (counts / counts.sum())[:, None]
    return shares


def _greedy(S: Tensor, target: Tensor, numbers: bool) -> Tensor:
    """How often each member is picked, (members,), summing to 1. S (members, n, classes), or (members, n, 1)."""
    counts, total = torch.zeros(len(S)), torch.zeros_like(S[0])
    least = float("inf")
    for picks in range(1, PICKS + 1):
        trial = (total + S) / picks
        if numbers:
            losses = (trial[..., 0] - target).square().mean(1)
        else:
            p = trial.log_softmax(-1)
            losses = -p.gather(-1, target[None, :, None].expand(len(S), -1, 1))[..., 0].mean(1)
        best = int(losses.argmin())
        if float(losses[best]) >= least:
            break
        least = float(losses[best])
        counts[best] += 1
        total = total + S[best]
    return counts / counts.sum()
