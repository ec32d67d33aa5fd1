"""Functional features of a LoRA: what each module does to a few input directions, and how to find those that matter.

For module m, `x_m = Q_m^T U_m (V_m^T P_m)`, (q, p) numbers: invariant under the gauge, at a cost of (out + in) r p,
delta W never formed. P_m (in, p) starts as the leading eigenvectors of a second moment of inputs, weighted by a
power of their eigenvalues, and Q_m (out, q) as the identity. `sharpen` then learns both from the labels: it fits a
ridge readout and stretches inputs and outputs by how much the readout looks at them, which is the average outer
product of gradients (Radhakrishnan et al. 2024, recursive feature machines) kept separate for the two sides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lolgen import metrics
from lolgen.errors import ShapeError
from lolgen.lora import Batch, Group
from lolgen.tasks.features import Components

FLOOR = 1e-3
"""Share of the largest eigenvalue that `sharpen` leaves to every direction."""


def modules(batch: Batch) -> Iterator[tuple[int, Group, int]]:
    """(position in the spec, its group, place in the group) of every module."""
    for group in batch.groups:
        for j, m in enumerate(group.index):
            yield m, group, j


def input_moments(batch: Batch, scale: Tensor) -> dict[str, Tensor]:
    """Mean over the LoRAs of V U^T U V^T, each delta W times `scale` (N,): name -> (in_flat, in_flat)."""
    found = {}
    for m, group, j in modules(batch):
        U, V = group.U[:, j] * scale[:, None, None], group.V[:, j]
        left = (V @ (U.mT @ U)).permute(1, 0, 2).flatten(1)  # (in_flat, N r)
        found[batch.spec.names[m]] = left @ V.permute(1, 0, 2).flatten(1).T / len(batch)
    return found


def directions(S: Tensor, most: int, power: float) -> Tensor:
    """(in, p), the leading eigenvectors of S times (eigenvalue / largest) ** power; zero ones are left out."""
    values, vectors = torch.linalg.eigh(S.double())
    values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
    largest = values[0].clamp(min=1e-300)
    keep = values > 1e-9 * largest
    keep[0] = True
    return (vectors[:, keep] * (values[keep] / largest).clamp(min=0) ** power).float()


@dataclass
class Lens:
    """Which directions to look at: `P` (in_flat, p) and `Q` (out, q) of every module, in the spec's order, and
    `power`: each LoRA's features are multiplied by |delta W| ** -power (1: only its direction counts)."""

    P: list[Tensor]
    Q: list[Tensor | None]
    power: float
    size: float
    """The training LoRAs' geometric mean of |delta W|, so that features are near 1 in size for any power."""

    @staticmethod
    def start(
        train: Batch,
        power: float,
        moments: Mapping[str, Tensor] | None = None,
        most: int = 16,
        weight: float = 0.25,
    ) -> Lens:
        """Look at the leading `most` input directions of `moments` (default: of the training LoRAs themselves)."""
        size = _norms(train)
        lens = Lens([], [None] * len(train.spec), power, float(size.log().mean().exp()))
        found = input_moments(train, lens.scale(train)) if moments is None else moments
        for module in train.spec:
            if module.name not in found or found[module.name].shape != (module.in_flat,) * 2:
                wanted = (module.in_flat,) * 2
                raise ShapeError(f"moments of module {module.name!r}: wanted a tensor {wanted}")
            lens.P.append(directions(found[module.name], most, weight))
        return lens

    def scale(self, batch: Batch) -> Tensor:
        """(N,) factor of every LoRA's features."""
        return (_norms(batch) / self.size) ** -self.power

    def look(self, batch: Batch) -> Iterator[tuple[int, Tensor]]:
        """(module, features (N, q p)) one module at a time, so that memory stays at one module's."""
        scale = self.scale(batch)
        for m, group, j in modules(batch):
            U, V, Q = group.U[:, j], group.V[:, j], self.Q[m]
            left = U if Q is None else Q.T @ U
            yield m, ((left * scale[:, None, None]) @ (V.mT @ self.P[m])).flatten(1)

    def sharpen(self, readout: Mapping[int, Tensor], most: int = 16) -> Lens:
        """The lens that a linear readout suggests; `readout[m]` (q p, C) are its weights on the features of m."""
        P, Q = list(self.P), list(self.Q)
        for m, weights in readout.items():
            W = weights.view(-1, self.P[m].shape[1], weights.shape[1])  # (q, p, C)
            old = Q[m]
            left = _stretch(torch.einsum("qpc,spc->qs", W, W), W.shape[0])
            Q[m] = left if old is None else old @ left
            P[m] = P[m] @ _stretch(torch.einsum("qpc,qsc->ps", W, W), most)
        return Lens(P, Q, self.power, self.size)


def _norms(batch: Batch) -> Tensor:
    size = metrics.norm(batch).float()
    return torch.where(size > 0, size, torch.ones_like(size))


def _stretch(M: Tensor, most: int) -> Tensor:
    values, vectors = torch.linalg.eigh(M.double())
    values, vectors = values.flip(0)[:most], vectors.flip(1)[:, :most]
    values = values.clamp(min=0) / values[0].clamp(min=1e-300)
    return (vectors * (values + FLOOR) ** 0.25).float()


@dataclass
class View:
    """A lens and the principal components of what the training LoRAs show through it.

    `into[m]` (q p, k): from the features of a module to its share of the coordinates, `offset` (k,) to be
    subtracted. Of the training LoRAs nothing else is kept.
    """

    lens: Lens
    into: dict[int, Tensor]
    offset: Tensor
    train: Tensor
    """(N, k) coordinates of the training LoRAs, of unit mean square over rows and columns together."""

    @staticmethod
    def fit(lens: Lens, train: Batch, most: int = 512) -> View:
        """The first `most` components, exact, by the Gram trick; modules are looked at twice, never all at once."""
        K = torch.zeros(len(train), len(train))
        for _, x in lens.look(train):
            K += x @ x.T
        components = Components.fit(K, most)
        back = components.directions - components.directions.mean(0)  # centres the rows it is applied to
        back = back / components.variance.mean().sqrt().clamp(min=1e-30)
        into, coordinates = {}, torch.zeros(len(train), back.shape[1])
        for m, x in lens.look(train):
            into[m] = x.T @ back
            coordinates += x @ into[m]
        offset = coordinates.mean(0)
        return View(lens, into, offset, coordinates - offset)

    def coordinates(self, batch: Batch) -> Tensor:
        """(N, k)."""
        found = torch.zeros(len(batch), len(self.offset))
        for m, x in self.lens.look(batch):
            found += x @ self.into[m]
        return found - self.offset

    def sharpen(self, weights: Tensor) -> Lens:
        """The lens that a linear readout of the coordinates suggests, weights (k, C)."""
        return self.lens.sharpen({m: into @ weights for m, into in self.into.items()})
