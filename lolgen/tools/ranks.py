"""Which singular values to keep: a rank, a share of the energy or an error, of each module or of all together."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import isfinite

import torch
from torch import Tensor

from lolgen import gl
from lolgen.errors import LolgenError

PER = ("module", "overall")
LOSSLESS = torch.finfo(torch.float32).eps
"""Without a target, singular values up to this share of a module's largest go: less than float32 rounds."""


@dataclass(frozen=True)
class Target:
    """What to keep. `energy` in (0, 1]: the share of |delta W|^2; `error` in [0, 1]: |difference| / |delta W|.

    `per`: "module" (each meets the target for itself) or "overall" (all together meet it, with the fewest
    parameters). `rank` is, with `energy` or `error`, the most a module gets; alone, the rank of every module, or
    overall, the rank whose parameters are the budget. With nothing given, all is kept that is not rounding.

    Raises LolgenError for values out of range, or two targets.
    """

    rank: int | None = None
    energy: float | None = None
    error: float | None = None
    per: str = "module"

    def __post_init__(self) -> None:
        if self.rank is not None and self.rank < 1:
            raise LolgenError(f"rank: found {self.rank}, wanted 1 or more")
        if self.energy is not None and self.error is not None:
            raise LolgenError("energy and error are two ways to say the same: give one of them")
        if self.energy is not None and not (isfinite(self.energy) and 0 < self.energy <= 1):
            raise LolgenError(f"energy: found {self.energy}, wanted a share above 0, at most 1")
        if self.error is not None and not (isfinite(self.error) and 0 <= self.error <= 1):
            raise LolgenError(f"error: found {self.error}, wanted a relative error between 0 and 1")
        if self.per not in PER:
            raise LolgenError(f"per: found {self.per!r}, wanted one of {', '.join(PER)}")

    @property
    def given(self) -> bool:
        return not (self.rank is None and self.energy is None and self.error is None)

    @property
    def allowed(self) -> float | None:
        """The share of |delta W|^2 that may go; None when only a rank is given, or nothing."""
        if self.error is not None:
            return self.error**2
        return None if self.energy is None else 1 - self.energy


def choose(
    spectra: Mapping[str, Tensor], cost: Mapping[str, int], target: Target, eps: Mapping[str, float]
) -> dict[str, int]:
    """The rank of every module, at least 1 (a file needs a pair of each).

    `spectra`: singular values, descending; `cost`: parameters of one more rank, out + in; `eps`: the relative
    size up to which a module's singular values are rounding of its inputs.
    """
    if target.per == "overall" and target.given:
        return _overall(spectra, cost, target, eps)
    ranks = {}
    for name, S in spectra.items():
        if target.allowed is not None:
            k = int(gl.ranks_needed(S, target.energy, target.error, eps[name]))
            ranks[name] = max(1, k if target.rank is None else min(k, target.rank))
        elif target.rank is not None:
            ranks[name] = target.rank
        else:
            ranks[name] = max(1, int(gl.ranks_needed(S, None, 0.0, min(eps[name], LOSSLESS))))
    return ranks


def _overall(
    spectra: Mapping[str, Tensor], cost: Mapping[str, int], target: Target, eps: Mapping[str, float]
) -> dict[str, int]:
    """Joint choice over all modules: a knapsack, of items `s^2` at the price `out + in`.

    Within a module singular values descend, so taking items by `s^2 / (out + in)` never takes one before its
    elder, and every prefix of that order is optimal for what it keeps: no choice of as few parameters keeps
    more. Between two prefixes the problem is a true knapsack; there the cheapest single rank that closes the
    gap is taken, and ranks that turn out not to be needed are given back, dearest first. The result meets the
    target, with less than one rank of one module more than the optimum.
    """
    names = list(spectra)
    most = target.rank if target.allowed is not None else None
    items = _Items.of(names, spectra, cost, eps, most)
    if target.allowed is None:
        assert target.rank is not None
        taken = items.within(target.rank * sum(cost.values()))
    else:
        taken = items.closing(target.allowed)
    return dict(zip(names, taken.tolist(), strict=True))


@dataclass(eq=False)
class _Items:
    """Singular values of all modules past the first of each (which is always kept), by density, descending.

    `value` (n,): s^2; `price` (n,); `module` (n,): positions. `rest`: the squares that a rank cap rules out.
    """

    value: Tensor
    price: Tensor
    module: Tensor
    first: Tensor  # (M,) squares of the ones always kept
    costs: Tensor  # (M,)
    rest: float

    @classmethod
    def of(
        cls,
        names: list[str],
        spectra: Mapping[str, Tensor],
        cost: Mapping[str, int],
        eps: Mapping[str, float],
        most: int | None,
    ) -> _Items:
        values, modules, first, rest = [], [], [], 0.0
        for i, name in enumerate(names):
            S = spectra[name]
            square = torch.where(eps[name] * S[:1] < S, S, torch.zeros_like(S)).square()
            if most is not None:
                rest += float(square[most:].sum())
                square = square[:most]
            first.append(square[:1].sum())
            tail = square[1:][square[1:] > 0]
            values.append(tail)
            modules.append(torch.full((len(tail),), i))
        costs = torch.tensor([cost[n] for n in names])
        value, module = torch.cat(values), torch.cat(modules)
        price = costs[module]
        # Stable: among equal densities a module's elder value comes first.
        order = (value / price).argsort(descending=True, stable=True)
        return cls(value[order], price[order], module[order], torch.stack(first), costs, rest)

    def counts(self, n: int) -> Tensor:
        """(M,) the ranks when the n densest items are kept."""
        return 1 + self.module[:n].bincount(minlength=len(self.costs))

    def closing(self, allowed: float) -> Tensor:
        """The ranks that leave out at most `allowed` of the whole."""
        # Summed from the small end, so that a small remainder is not lost next to the total.
        tail = torch.cat([self.value.flip(0).cumsum(0).flip(0), self.value.new_zeros(1)])  # (n + 1,)
        limit = allowed * float(self.first.sum() + tail[0] + self.rest) - self.rest
        meets = (tail <= limit).nonzero()
        if not len(meets):  # the rank cap forbids it: all there is
            return self.counts(len(self.value))
        n = int(meets[0])
        if n == 0:
            return self.counts(0)
        ranks = self.counts(n - 1)
        heads = self._heads(ranks)
        gap = float(tail[n - 1]) - limit
        close = [(int(self.price[j]), -float(self.value[j]), j) for j in heads if float(self.value[j]) >= gap]
        # The n-th item closes the gap; rounding must not hide it.
        _, _, chosen = min([*close, (int(self.price[n - 1]), -float(self.value[n - 1]), n - 1)])
        ranks[self.module[chosen]] += 1
        return self._given_back(ranks, limit - (float(tail[n - 1]) - float(self.value[chosen])))

    def _given_back(self, ranks: Tensor, slack: float) -> Tensor:
        while True:
            # The last item of a module at rank r > 1 is its item number r - 2.
            lasts = [self._places[i][r - 2] for i, r in enumerate(ranks.tolist()) if r > 1]
            spare = [
                (int(self.price[j]), -float(self.value[j]), j) for j in lasts if float(self.value[j]) <= slack
            ]
            if not spare:
                return ranks
            _, value, j = max(spare)
            ranks[self.module[j]] -= 1
            slack += value

    def within(self, budget: int) -> Tensor:
        """The ranks that keep most with at most `budget` parameters; the first rank of each is never dropped."""
        left = budget - int(self.costs.sum())
        n = int((self.price.cumsum(0) <= left).sum())
        ranks = self.counts(n)
        left -= int(self.price[:n].sum())
        while True:
            fits = [j for j in self._heads(ranks) if int(self.price[j]) <= left]
            if not fits:
                return ranks
            j = min(fits)  # the densest
            ranks[self.module[j]] += 1
            left -= int(self.price[j])

    def _heads(self, ranks: Tensor) -> list[int]:
        """Of each module the densest item that is not kept."""
        return [
            place[r - 1] for place, r in zip(self._places, ranks.tolist(), strict=True) if r - 1 < len(place)
        ]

    @cached_property
    def _places(self) -> list[list[int]]:
        """Per module, its items in order."""
        places: list[list[int]] = [[] for _ in self.costs]
        for j, i in enumerate(self.module.tolist()):
            places[i].append(j)
        return places
