"""What the models of the table share: Gram matrices of delta W and the principal components that follow from them.

Several models and seeds read the same batches, and the Gram matrix of 1,600 LoRAs takes seconds, so it is kept for
as long as its batches live, and so are their norms. A batch must not be changed in place between two fits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lolgen import metrics
from lolgen.lora import Batch

_kept: WeakKeyDictionary[Batch, WeakKeyDictionary[Batch, Tensor]] = WeakKeyDictionary()
_SLICE = 1 << 24
"""Most numbers of a slice of LoRAs in `norms`; the zoos here are one slice."""
_sizes: WeakKeyDictionary[Batch, Tensor] = WeakKeyDictionary()


def gram(x: Batch, y: Batch | None = None) -> Tensor:
    """<delta W, delta W'> of every LoRA of x with every LoRA of y (of x without y), (N1, N2) float32, exact."""
    row = _kept.setdefault(x, WeakKeyDictionary())
    key = x if y is None else y
    if key not in row:
        row[key] = metrics.gram(x, y, dtype=torch.float32)
    return row[key]


def norms(x: Batch) -> Tensor:
    """|delta W| over all modules, (N,) float32; 1 for a zero LoRA, so that it can divide.

    Kept like `gram`: a kernel asks for those of its training LoRAs at every reading, which cost more than the reading.
    """
    if x not in _sizes:
        # Orthonormal factors of every LoRA at once would be five times the batch; a slice at a time is none of that.
        numbers = max(1, sum(g.U[:1].numel() + g.V[:1].numel() for g in x.groups))
        rows = max(1, _SLICE // numbers)
        size = torch.cat([metrics.norm(x[i : i + rows]) for i in range(0, max(1, len(x)), rows)])
        _sizes[x] = torch.where(size > 0, size, torch.ones_like(size)).float()
    return _sizes[x]


def cosine_gram(x: Batch, y: Batch | None = None) -> Tensor:
    """The cosine of every pair, (N1, N2)."""
    return gram(x, y) / norms(x)[:, None] / norms(x if y is None else y)


@dataclass
class Components:
    """Principal components by the Gram trick: exact, and never larger than N x N.

    `directions` (N, k): coefficients on the centred training rows; `mean` (N,) and `total`: the means of the
    training Gram matrix over rows and over all; `variance` (k,): of each component, descending.
    """

    directions: Tensor
    mean: Tensor
    total: Tensor
    variance: Tensor

    @staticmethod
    def fit(K: Tensor, most: int | None = None) -> Components:
        """All components of the training Gram matrix K (N, N) above rounding, or the first `most`."""
        K = K.double()
        mean, total = K.mean(1), K.mean()
        values, vectors = torch.linalg.eigh(K - mean - mean[:, None] + total)
        values, vectors = values.flip(0), vectors.flip(1)
        # float32 products are good to 1e-6 of the norms; what lies below is noise, and would be amplified.
        keep = int((values > 1e-6 * values[0].clamp(min=1e-300)).sum())
        keep = max(1, min(keep, most or keep))
        # Of rows that are all the same there is no direction: zeros, for 1 / sqrt would overflow.
        values = torch.where(values[:keep] > 1e-60, values[:keep], torch.zeros_like(values[:keep]))
        return Components(
            torch.where(values > 0, vectors[:, :keep] / values.clamp(min=1e-60).sqrt(), 0.0).float(),
            mean.float(),
            total.float(),
            (values / len(K)).float(),
        )

    def scores(self, K: Tensor) -> Tensor:
        """(N', N) products with the training rows -> (N', k): coordinates of the centred rows."""
        return (K - K.mean(1, keepdim=True) - self.mean + self.total) @ self.directions


def standard(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation (D,) of the rows of raw (N, D); a constant entry has deviation 1."""
    mean, std = raw.mean(0), raw.std(0, correction=0)
    return mean, torch.where(std > 0, std, torch.ones_like(std))


def memoised(make: Callable[[Batch], Tensor]) -> Callable[[Batch], Tensor]:
    """A feature map that remembers its last result of every living batch."""
    found: WeakKeyDictionary[Batch, Tensor] = WeakKeyDictionary()

    def features(batch: Batch) -> Tensor:
        if batch not in found:
            found[batch] = make(batch)
        return found[batch]

    return features
