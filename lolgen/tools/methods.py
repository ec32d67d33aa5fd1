"""The merge methods. Each makes one core out of the inputs' cores, and none can see the inputs' gauges.

TIES (Yadav et al., arXiv 2306.01708) and DARE (Yu et al., arXiv 2311.03099) are defined on the entries of delta W.
On the entries of the factors, where PEFT applies them, they depend on the gauge and mean nothing. Here they act on
the entries of delta W in a basis of its own: the Tucker (higher-order SVD) basis of the inputs, whose left vectors
are those of `[W_1 W_2 ...]` side by side, the right ones those of the `W_i` on top of each other, as KnOTS
(Stoica et al., arXiv 2410.19735) does on the left side. It holds every input exactly and is made of delta W alone,
unique up to signs, which no method below minds, where the singular values of the two stacks are distinct. So this is
TIES and DARE in the shared subspace, not on the entries of the weights: an entry of a core is a direction.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from lolgen.errors import LolgenError
from lolgen.tools.thin import Frame, weighted_sum


@dataclass(frozen=True)
class Options:
    """`weights`: one an input; `density` in (0, 1]: the share that TIES and DARE keep; `seed`: of DARE."""

    weights: tuple[float, ...]
    density: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0 < self.density <= 1:
            raise LolgenError(f"density: found {self.density}, wanted a share above 0, at most 1")


class Made(NamedTuple):
    """A merged core (M, q, p), and for each input present the squared norm (M,) of what was used of it, before
    its weight."""

    core: Tensor
    used: list[Tensor]


Method = Callable[[Frame, Options], Made]


def plain_sum(frame: Frame, options: Options) -> Made:
    """The sum of `w_i delta W_i`, exact. PEFT's `linear` adds the factors instead, which has cross terms
    `B_i A_j` and needs equal ranks."""
    return Made(weighted_sum(frame, options.weights), [_squares(c) for c in _cores(frame)])


def average(frame: Frame, options: Options) -> Made:
    """The sum with weights divided by their sum; a module missing in an input counts as zero there."""
    total = sum(options.weights)
    if abs(total) <= 1e-12 * sum(map(abs, options.weights)):
        raise LolgenError("average: the weights add up to 0; wanted another sum, or the method sum")
    return plain_sum(frame, Options(tuple(w / total for w in options.weights)))


def ties(frame: Frame, options: Options) -> Made:
    """Trim, elect a sign, disjoint mean, on the cores in the Tucker basis.

    Of each input's core the `density` largest entries stay (counted in the numerical ranks of the two stacks). The sign
    of an entry is that of the weighted sum; the result is the mean of the inputs that have it, `sum(w_i C_i) /
    sum(|w_i|)` over those. So weights are relative, as in a mean: doubling all of them changes nothing.
    """
    P, Q, count = tucker_basis(frame)
    keep = (options.density * count).round().clamp(min=1)  # (M,)
    total = torch.zeros_like(P.mT @ frame.core(0) @ Q)
    trimmed = []
    for i in range(len(frame.index)):
        C = P.mT @ frame.core(i) @ Q
        trimmed.append(torch.where(_place(C.abs()) < keep[:, None, None], C, 0.0))
        total += options.weights[frame.index[i]] * trimmed[-1]
    numerator, denominator = torch.zeros_like(total), torch.zeros_like(total)
    used = []
    for i, C in zip(frame.index, trimmed, strict=True):
        weight = options.weights[i]
        agrees = (weight * C * total) > 0
        numerator += torch.where(agrees, weight * C, 0.0)
        denominator += agrees.to(C) * abs(weight)  # a bool times a float would be float32
        used.append(_squares(torch.where(agrees, C, 0.0)))
    core = numerator / torch.where(denominator > 0, denominator, 1.0)
    return Made(P @ core @ Q.mT, used)


def dare(frame: Frame, options: Options) -> Made:
    """Drop entries of each core in the Tucker basis at random, keep a share `density`, divide what stays by it,
    and add up: the mean over seeds is the plain sum.

    The draw for an entry depends on the seed, the module's name, the input's position and the entry's, on nothing
    else: not on the gauge, the rank, or what other modules there are.
    """
    P, Q, _ = tucker_basis(frame)
    core, used = 0.0 * frame.core(0), []
    for i, j in enumerate(frame.index):
        C = P.mT @ frame.core(i) @ Q
        kept = torch.stack([_uniform(options.seed, n, j, C.shape[-2], C.shape[-1]) for n in frame.names])
        C = torch.where(kept.to(C) < options.density, C, 0.0)
        used.append(_squares(C))
        core = core + options.weights[j] / options.density * (P @ C @ Q.mT)
    return Made(core, used)


def orthogonal(frame: Frame, options: Options) -> Made:
    """Each input without what lies in the column or row spaces of those before it: `sum w_i P_i delta W_i Q_i`,
    P_i and Q_i the projectors onto the complement of all earlier column and row spaces.

    Gram-Schmidt on subspaces, in the order given; O-LoRA (Wang et al., arXiv 2310.14152) trains for the same end.
    What the first LoRA reads and writes, it alone reads and writes: on its column space, and for inputs in its row
    space, the result is `w_1 delta W_1` exactly.
    """
    E0, F0 = frame.blocks[0]
    N_u, N_v = E0[..., :0], F0[..., :0]  # (M, q, 0), (M, p, 0)
    core, used = 0.0 * frame.core(0), []
    for i, j in enumerate(frame.index):
        E, F = frame.blocks[i]
        kept = _without(E, N_u) @ _without(F, N_v).mT
        used.append(_squares(kept))
        core = core + options.weights[j] * kept
        left, right = spaces(E, F, frame.eps)
        N_u, N_v = _joined(N_u, left, frame.eps), _joined(N_v, right, frame.eps)
    return Made(core, used)


METHODS: dict[str, Method] = {
    "sum": plain_sum,
    "average": average,
    "ties": ties,
    "dare": dare,
    "orthogonal": orthogonal,
}


def tucker_basis(frame: Frame) -> tuple[Tensor, Tensor, Tensor]:
    """(P (M, q, q'), Q (M, p, p'), count (M,)): orthonormal columns, all of the span of the inputs, by descending
    singular value of the stacks; `count`, the product of their numerical ranks."""
    left, right = [], []
    for E, F in frame.blocks:
        # C_i C_i^T = E R^T R E^T with the triangle R of F, so E R^T has the left singular pairs of C_i.
        left.append(E @ torch.linalg.qr(F, mode="r")[1].mT)
        right.append(F @ torch.linalg.qr(E, mode="r")[1].mT)
    bases, counts = [], []
    for stack in (left, right):
        P, S, _ = torch.linalg.svd(torch.cat(stack, -1), full_matrices=False)
        bases.append(P)
        counts.append(numerical_rank(S, frame.eps).sum(-1))
    return bases[0], bases[1], counts[0] * counts[1]


def spaces(E: Tensor, F: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Orthonormal bases of the column and row space of E F^T, (..., q, s) and (..., p, s); columns past the
    numerical rank are zero."""
    Qe, Re = torch.linalg.qr(E)
    Qf, Rf = torch.linalg.qr(F)
    P, S, Wh = torch.linalg.svd(Re @ Rf.mT, full_matrices=False)
    there = numerical_rank(S, eps)[..., None, :]
    return Qe @ P * there, Qf @ Wh.mT * there


def numerical_rank(S: Tensor, eps: float) -> Tensor:
    """Which singular values (..., s), descending, are more than what inputs known to `eps` leave open; booleans."""
    return (S[..., :1] * eps * (S.shape[-1] + 8)) < S


def _cores(frame: Frame) -> list[Tensor]:
    return [frame.core(i) for i in range(len(frame.index))]


def _squares(C: Tensor) -> Tensor:
    return C.square().sum((-2, -1))


def _place(size: Tensor) -> Tensor:
    """(M, q, p): how many entries of the same module are larger."""
    flat = size.flatten(1)
    order = flat.argsort(stable=True, dim=-1, descending=True)
    places = torch.empty_like(order).scatter_(-1, order, torch.arange(flat.shape[-1]).expand_as(order))
    return places.view_as(size)


def _uniform(seed: int, name: str, position: int, q: int, p: int) -> Tensor:
    """(q, p) numbers in [0, 1). The corner of a larger matrix is the smaller one: rank may not matter."""
    key = int.from_bytes(hashlib.sha256(f"{seed}/{position}/{name}".encode()).digest()[:16], "little")
    a, b = np.ogrid[:q, :p]
    # Entries are counted shell by shell: (m, 0..m), then (0..m-1, m), from m^2 on.
    place = np.where(a >= b, a * a + b, b * b + b + 1 + a)
    draws = np.random.Generator(np.random.Philox(key=key)).random(max(q, p) ** 2)
    return torch.from_numpy(draws[place])


def _without(X: Tensor, N: Tensor) -> Tensor:
    """X less its part in the span of N, N orthonormal or zero columns."""
    return X - N @ (N.mT @ X) if N.shape[-1] else X


def _joined(N: Tensor, more: Tensor, eps: float) -> Tensor:
    """N with the directions of `more` that it does not have yet. A direction within `eps` of N's span is in it."""
    fresh, sine, _ = torch.linalg.svd(_without(more, N), full_matrices=False)
    fresh = fresh * (sine > eps * (more.shape[-1] + 8))[:, None]
    # Directions found at a small angle carry rounding along N; once more, and their lengths restored.
    fresh = _without(fresh, N)
    length = torch.linalg.vector_norm(fresh, dim=-2, keepdim=True)
    return torch.cat([N, fresh / torch.where(length > 0, length, 1.0)], -1)
