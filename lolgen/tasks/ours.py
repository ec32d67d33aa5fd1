"""lolgen's own reader: functional features, sharpened by the labels, read by kernels and small nets together.

1. Features `U_m (V_m^T P_m)` of every module, on the input directions that LoRAs really use (`lolgen.tasks.views`),
   and their principal components. All is gauge-invariant, and costs (out + in) r p a module.
2. Up to two rounds of sharpening: a linear ridge readout says which inputs and outputs carry the labels.
3. On the components: kernel ridge with Gaussians of three widths, and two small nets. On the LoRAs themselves: two
   GL-nets, and kernel ridge on the angle between whole delta W. Each is calibrated, and each attribute takes an
   average of them that leans towards those that read the validation split best.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lolgen.errors import ShapeError
from lolgen.lora import Batch
from lolgen.nn.glnet import GLNet, GLNetConfig
from lolgen.tasks.features import cosine_gram
from lolgen.tasks.reader import FULL, Budget, Classes, Config, Layout, Reader, layout_of
from lolgen.tasks.ridge import coefficients
from lolgen.tasks.training import apply, mlp, train_net
from lolgen.tasks.views import Lens, View

POWERS, ROUNDS = (1.0, 0.5), 3
"""What is chosen on validation, six configurations: how far size is divided out, and rounds of sharpening 0 to 2."""
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0)
WIDTHS = (0.15, 0.4, 1.0)
"""Of the Gaussian kernels: exp(-width |x - y|^2 / mean |x - y|^2)."""
NETS = 2
"""Of each kind; their width and rate are fixed, found on folds of the training split."""
PICKS = 12
"""Most draws (with replacement) into the average of an attribute."""


@dataclass
class Problem:
    """The labelled splits that a fit sees."""

    train: Batch
    y: Tensor
    validation: Batch
    y_val: Tensor
    classes: Classes


@dataclass
class Member:
    """One model of the average: `scores(batch, coordinates)`, its scores on validation and their `Classes.score`."""

    scores: Callable[[Batch, Tensor], Tensor]
    validation: Tensor
    score: float


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
    moments: Mapping[str, Tensor] | None = None,
) -> Reader:
    """See `lolgen.tasks.reader.Fit`; the seed moves the nets alone.

    `moments`: module name -> second moment of its inputs (in_flat, in_flat), as a calibration pass over the base
    gives it; the features then start from its directions in one half of the configurations. Without it they start
    from the directions that the training LoRAs use. ShapeError when a module is missing or of another size.
    """
    layout = layout_of(classes)
    if not isinstance(layout, Classes):
        raise ShapeError("wanted classes, found numbers")
    problem = Problem(train, layout.check(train, y), validation, layout.check(validation, y_val), layout)
    view, chosen = _choose_view(problem, config, budget, moments)
    members = list(_kernels(view, problem))
    members.append(_delta(problem))
    for k in range(NETS):
        members.append(_net(view, problem, seed * NETS + k, budget))
        members.append(_glnet(view.lens, problem, seed * NETS + k, budget))
    y_val = problem.y_val
    temperatures = [layout.calibrate(m.validation, y_val) for m in members]
    calibrated = [
        layout.log_probabilities(m.validation, t) for m, t in zip(members, temperatures, strict=True)
    ]
    shares = blend(torch.stack(calibrated), y_val, layout)  # (members, C)

    def average(parts: list[Tensor]) -> Tensor:
        return (torch.stack(parts) * shares[:, None]).sum(0)

    def scores(batch: Batch) -> Tensor:
        x = view.coordinates(batch)
        return average(
            [
                layout.log_probabilities(m.scores(batch, x), t)
                for m, t in zip(members, temperatures, strict=True)
            ]
        )

    return Reader(layout, scores, layout.calibrate(average(calibrated), y_val), chosen)


def _choose_view(
    problem: Problem, config: Config | None, budget: Budget, moments: Mapping[str, Tensor] | None
) -> tuple[View, Config]:
    """The view whose best Gaussian kernel reads the validation split best, or that of `config`."""
    best: tuple[View, Config] | None = None
    least, tried = float("inf"), 0
    for start, power in enumerate(POWERS):
        given = moments is not None and start == 1
        here: Config = {"power": 1.0, "moments": 1.0} if given else {"power": power}
        if config is not None and any(config.get(k) != here.get(k) for k in ("power", "moments")):
            continue
        lens = Lens.start(problem.train, here["power"], moments if given else None)
        for rounds in range(ROUNDS if config is None else int(config["rounds"]) + 1):
            if config is None and tried == budget.configurations:
                break
            view = View.fit(lens, problem.train)
            tried += 1
            if config is None:
                score = next(_kernels(view, problem, WIDTHS[1:2])).score
                if best is None or score < least:
                    best, least = (view, {**here, "rounds": float(rounds)}), score
            else:
                best = view, config
            if rounds + 1 < ROUNDS:
                lens = view.sharpen(_readout(view, problem))
    assert best is not None
    return best


def _readout(view: View, problem: Problem) -> Tensor:
    """Weights (k, C) of the linear ridge readout."""
    x = view.train
    dual, _ = min(
        (_ridge(x @ x.T, view.coordinates(problem.validation) @ x.T, problem, r) for r in RIDGES),
        key=lambda found: found[1],
    )
    return x.T @ dual[0]


def _ridge(K: Tensor, K_val: Tensor, p: Problem, ridge: float) -> tuple[tuple[Tensor, Tensor], float]:
    weights, offsets = coefficients(K, p.y, p.classes, ridge)
    return (weights, offsets), p.classes.score(K_val @ weights + offsets, p.y_val)


def _member(kernel: Callable[[Batch, Tensor], Tensor], K: Tensor, K_val: Tensor, p: Problem) -> Member:
    """Kernel ridge with the best of the ridges."""
    (weights, offsets), score = min((_ridge(K, K_val, p, r) for r in RIDGES), key=lambda found: found[1])
    return Member(lambda batch, x: kernel(batch, x) @ weights + offsets, K_val @ weights + offsets, score)


def _kernels(view: View, problem: Problem, widths: tuple[float, ...] = WIDTHS) -> Iterator[Member]:
    """Kernel ridge on the coordinates, a Gaussian of each width."""
    z, z_val = view.train, view.coordinates(problem.validation)
    distances, far = squared_distances(z, z), squared_distances(z_val, z)
    mean = distances.mean().clamp(min=1e-30)
    for width in widths:

        def kernel(batch: Batch, x: Tensor, width: float = width) -> Tensor:
            return torch.exp(-width * squared_distances(x, z) / mean)

        yield _member(kernel, torch.exp(-width * distances / mean), torch.exp(-width * far / mean), problem)


def squared_distances(x: Tensor, z: Tensor) -> Tensor:
    """|x_i - z_j|^2, (N, M)."""
    return (x.square().sum(1)[:, None] + z.square().sum(1) - 2 * x @ z.T).clamp(min=0)


def _delta(problem: Problem) -> Member:
    """Gaussian of the angle between whole delta W; its features see what no lens shows."""
    train = problem.train

    def kernel(batch: Batch, _: Tensor) -> Tensor:
        return torch.exp(cosine_gram(batch, None if batch is train else train) - 1)

    return _member(kernel, kernel(train, _NOTHING), kernel(problem.validation, _NOTHING), problem)


_NOTHING = torch.zeros(0)


def _net(view: View, p: Problem, seed: int, budget: Budget) -> Member:
    x, x_val = view.train, view.coordinates(p.validation)
    net, score = train_net(
        lambda: mlp(x.shape[1], 256, p.classes.total, dropout=0.3),
        x, p.y, x_val, p.y_val, p.classes, seed=seed, lr=1e-3, budget=budget, epochs=40,
    )  # fmt: skip
    return Member(lambda _, coordinates: apply(net, coordinates), apply(net, x_val), score)


def _glnet(lens: Lens, p: Problem, seed: int, budget: Budget) -> Member:
    """A GL-net on LoRAs of which size is divided out as far as in the features: it reads a weak LoRA too."""

    def sized(batch: Batch) -> Batch:
        scale = lens.scale(batch)[:, None, None, None]
        return batch.map(lambda U, V: (U * scale, V))

    x, x_val = sized(p.train), sized(p.validation)

    def make() -> GLNet:
        net = GLNet(p.train.spec, GLNetConfig(p.classes.total, d=16, hidden=128))
        net.fit(x)
        return net

    net, score = train_net(
        make, x, p.y, x_val, p.y_val, p.classes, seed=seed, lr=1e-2, budget=budget, epochs=40
    )
    return Member(lambda batch, _: apply(net, sized(batch)), apply(net, x_val), score)


def blend(log_p: Tensor, y: Tensor, classes: Classes) -> Tensor:
    """Share of each member in each attribute's average, (members, C), from calibrated log p (members, N, C).

    Greedy selection with replacement (Caruana et al. 2004): what is added next is what lowers -log p most. Half of
    the weight stays spread evenly, for a validation split is small.
    """
    members = len(log_p)
    one = torch.ones(1)
    shares = torch.full((members, classes.total), 1 / members)
    for k, part in enumerate(classes.slices):
        if not bool((y[:, k] >= 0).any()):
            continue
        labels = torch.full_like(y, -1)
        labels[:, k] = y[:, k]
        counts = torch.zeros(members)
        total, least = torch.zeros_like(log_p[0]), float("inf")
        for picks in range(1, PICKS + 1):
            trials = [float(classes.nll((total + m) / picks, labels, one)[k]) for m in log_p]
            best = min(range(members), key=trials.__getitem__)
            if trials[best] >= least:
                break
            least = trials[best]
            counts[best] += 1
            total = total + log_p[best]
        shares[:, part] = (0.5 * counts / counts.sum() + 0.5 / members)[:, None]
    return shares
