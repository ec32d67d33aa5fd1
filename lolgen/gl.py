"""The group that acts on factor pairs: gauges, balanced and canonical forms, truncation, exact algebra.

`g` in GL(r) acts on a pair by `(U, V) -> (U g^-1, V g^T)` and leaves `delta W = U V^T` unchanged
(arXiv 2410.04207). Tensors are U (..., m, r) and V (..., n, r), batched over the leading dimensions; r may
exceed m and n. Nothing here forms delta W: QR of the factors and an SVD of r x r at most do it all.

Whatever the input's dtype, QR and SVD run in float64 and the result is cast back: in a gauge of condition c
rounding costs eps * c, which float32 cannot afford, and next to reading the factors float64 is cheap.
Gradients flow through (through `spectrum` everywhere, through the others only where singular values are
distinct and not zero).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from lolgen.errors import LolgenError, ShapeError, SpecError
from lolgen.lora import Batch, Factors, Group, LoRA, ModuleSpec, Spec

PairMap = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def random_gauge(
    *shape: int,
    rank: int,
    condition: float = 10.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Random elements of GL(rank), (*shape, rank, rank), of either sign of the determinant.

    The singular values lie in [condition^-1/2, condition^1/2], log-uniform, both ends taken, so `condition`
    (at least 1) is the condition number; at rank 1, where that is always 1, the one value is drawn from the
    range. Between Haar-random rotations. `generator` is of the CPU: the draw is the same on every device.
    """
    if condition < 1:
        raise ValueError(f"condition: found {condition}, wanted 1 or more")

    def orthogonal() -> Tensor:
        Q, R = torch.linalg.qr(torch.randn(*shape, rank, rank, generator=generator, dtype=torch.float64))
        # Without the signs of R the rotation is not Haar-distributed (Mezzadri 2007, arXiv math-ph/0609050).
        return Q * torch.where(R.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)[..., None, :]

    exponent = torch.rand(*shape, rank, generator=generator, dtype=torch.float64) - 0.5
    if rank > 1:
        exponent[..., 0], exponent[..., -1] = -0.5, 0.5
    g = orthogonal() @ (condition ** exponent[..., None] * orthogonal())
    return g.to(device=device, dtype=dtype)


def act(U: Tensor, V: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """(U g^-1, V g^T) for g (..., r, r), by a solve. torch.linalg.LinAlgError where g is singular."""
    if g.shape[-1] == 0:
        return U, V
    return torch.linalg.solve(g, U, left=False), V @ g.mT


class _Thin(NamedTuple):
    """Thin SVD of U V^T in pieces: left = Qu P, right = Qv W, with k = min(m, n, r) singular values."""

    Qu: Tensor  # (..., m, min(m, r))
    Ru: Tensor  # (..., min(m, r), r)
    Qv: Tensor  # (..., n, min(n, r))
    Rv: Tensor  # (..., min(n, r), r)
    P: Tensor  # (..., min(m, r), k)
    S: Tensor  # (..., k), descending; what is only rounding is zero
    W: Tensor  # (..., min(n, r), k)


def _thin(U: Tensor, V: Tensor) -> _Thin:
    if U.shape[-1] != V.shape[-1]:
        raise ShapeError(f"U and V must have one rank: found U {tuple(U.shape)}, V {tuple(V.shape)}")
    Qu, Ru = torch.linalg.qr(U.double())
    Qv, Rv = torch.linalg.qr(V.double())
    P, S, Wh = torch.linalg.svd(Ru @ Rv.mT, full_matrices=False)
    # Below this a singular value is rounding of the product. Left in, its column would be noise of size
    # sqrt(eps), far above eps, and the result for a rank-deficient module would depend on the gauge.
    size = torch.linalg.matrix_norm(Ru) * torch.linalg.matrix_norm(Rv)
    cutoff = torch.finfo(torch.float64).eps * (U.shape[-1] + 8) * size
    return _Thin(Qu, Ru, Qv, Rv, P, torch.where(cutoff[..., None] < S, S, torch.zeros_like(S)), Wh.mT)


def canonical(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """The balanced pair whose columns are the singular vectors of delta W times sqrt(singular value).

    Singular values descend, the largest entry of each column of U is positive, and columns past the rank
    of delta W are zero; shapes stay. Unique where singular values are distinct; near-equal ones make it jump,
    so compare delta W, never canonical factors. `spectrum` is `(U * U).sum(-2)` of the result.
    """
    t = _thin(U, V)
    left, right = t.Qu @ t.P, t.Qv @ t.W
    peak = left.detach().gather(-2, left.detach().abs().argmax(-2, keepdim=True))  # (..., 1, k)
    factor = t.S.sqrt()[..., None, :]
    sign = torch.where(peak < 0, -1.0, 1.0)
    return pad((left * factor * sign).to(U), (right * factor * sign).to(V), U.shape[-1])


def balance(U: Tensor, V: Tensor) -> tuple[Tensor, Tensor]:
    """The pair of the same delta W with U^T U = V^T V that is nearest to the given frame.

    Of all balanced gauges it takes the one that a symmetric positive definite g reaches (g^-2 is the
    geometric mean of (U^T U)^-1 and V^T V), so a balanced pair stays as it is and `balance(U Q, V Q)` is
    `balance(U, V) Q` for orthogonal Q: unlike `canonical` it does not jump. Rank-deficient and zero modules
    have no such g; they too come out balanced, with delta W unchanged.
    """
    t = _thin(U, V)
    alive = t.S > 0
    root = t.S.sqrt()
    inverse = torch.where(alive, 1 / torch.where(alive, root, torch.ones_like(root)), torch.zeros_like(root))
    # U = Uc k and V = Vc k^-T with the canonical pair Uc, Vc. Both k and k^-T have the polar factor wanted,
    # and so has their sum, which is better conditioned. Rows where S = 0 are zero: any completion does.
    k = inverse[..., None] * (t.P.mT @ t.Ru + t.W.mT @ t.Rv)  # (..., k, r)
    X, _, Yh = torch.linalg.svd(k, full_matrices=False)
    frame = root[..., None] * (X @ Yh)  # (..., k, r)
    return (t.Qu @ (t.P @ frame)).to(U), (t.Qv @ (t.W @ frame)).to(V)


def spectrum(U: Tensor, V: Tensor) -> Tensor:
    """Singular values of delta W, (..., r), descending, zeros past min(m, n, r); gauge-invariant.

    Differentiable for every input: with the singular vectors held fixed, s_i = p_i^T U V^T w_i has the right
    gradient where the values are distinct, and a subgradient of their sum where they are not.
    """
    with torch.no_grad():
        t = _thin(U, V)
        S = t.S
    if torch.is_grad_enabled() and (U.requires_grad or V.requires_grad):
        left, right = t.Qu @ t.P, t.Qv @ t.W
        S = ((left.mT @ U.double()) * (right.mT @ V.double())).sum(-1)
    missing = U.shape[-1] - S.shape[-1]
    return torch.nn.functional.pad(S, (0, missing)).to(U.dtype)


def pad(U: Tensor, V: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The pair with zero columns added up to r. ShapeError when it already has more."""
    more = r - U.shape[-1]
    if more < 0:
        raise ShapeError(f"cannot pad a pair of rank {U.shape[-1]} to rank {r}: truncate it instead")
    return torch.nn.functional.pad(U, (0, more)), torch.nn.functional.pad(V, (0, more))


def truncate(U: Tensor, V: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The best approximation of at most `rank` (1 or more) in the Frobenius norm, in canonical form.

    (..., m, k) and (..., n, k) with k = min(rank, r): a rank at or above r changes nothing but the gauge.
    """
    if rank < 1:
        raise ShapeError(f"rank: found {rank}, wanted 1 or more")
    U, V = canonical(U, V)
    return U[..., :rank].contiguous(), V[..., :rank].contiguous()


def effective_rank(
    U: Tensor, V: Tensor, *, energy: float | None = None, error: float | None = None
) -> Tensor:
    """The smallest rank that keeps delta W well enough, (...) long; 0 for a zero module.

    Give one of: `energy` in [0, 1], the share of the squared norm to keep; `error` >= 0, the relative error
    |delta W - its truncation| / |delta W| to allow. `error=0` gives the numerical rank
    at the input's precision.
    """
    return ranks_needed(spectrum(U, V).double(), energy, error, torch.finfo(U.dtype).eps)


def ranks_needed(S: Tensor, energy: float | None, error: float | None, eps: float) -> Tensor:
    """`effective_rank` from singular values (..., k), descending, (...) long; those at or below `eps` times
    the largest count as zero."""
    if (energy is None) == (error is None):
        raise ValueError("give one of energy and error")
    if energy is not None and not 0 <= energy <= 1:
        raise ValueError(f"energy: found {energy}, wanted a share between 0 and 1")
    if error is not None and error < 0:
        raise ValueError(f"error: found {error}, wanted 0 or more")
    allowed = error**2 if error is not None else 1 - (energy or 0.0)
    largest = S[..., :1]
    square = torch.where(eps * largest < S, S, torch.zeros_like(S)).square()
    # Summed from the small end, so that a small remainder is not lost next to the total.
    tail = square.flip(-1).cumsum(-1).flip(-1)  # tail[k]: what a truncation to rank k leaves out
    return (tail > allowed * tail[..., :1]).sum(-1)


def procrustes(U: Tensor, V: Tensor, U0: Tensor, V0: Tensor) -> Tensor:
    """The orthogonal Q (..., r, r) that makes [U; V] Q nearest to [U0; V0] (Schoenemann 1966).

    Q is a gauge (g = Q^T), so delta W stays. Leading dimensions broadcast. Towards a target of rank r0 above r,
    Q (..., r, r0) has orthonormal rows and delta W stays too; towards one of rank r0 below r it has orthonormal
    columns, and U Q, V Q keep of delta W what fits the target.
    """
    return polar(U.double().mT @ U0.double() + V.double().mT @ V0.double()).to(U.dtype)


def polar(M: Tensor) -> Tensor:
    """The orthogonal factor of M (..., p, q): the matrix nearest to it with orthonormal columns, or rows if q > p."""
    X, _, Yh = torch.linalg.svd(M, full_matrices=False)
    return X @ Yh


# Batches: the same on every group. Padded columns keep out of it: a gauge is the identity there.


def random_gauge_batch(
    batch: Batch, *, condition: float = 10.0, generator: torch.Generator | None = None
) -> list[Tensor]:
    """A random gauge for every module of every LoRA: per group (N, M, r, r), identity past the true rank."""
    r = batch.rank
    gauges = []
    for group in batch.groups:
        ranks = batch.ranks[:, list(group.index)]
        g = torch.eye(r, dtype=batch.dtype, device=batch.device).repeat(*ranks.shape, 1, 1)
        for k in ranks.unique().tolist():
            here = ranks == k
            drawn = random_gauge(
                int(here.sum()), rank=k, condition=condition, generator=generator, dtype=batch.dtype
            )
            block = g[here]
            block[:, :k, :k] = drawn.to(batch.device)
            g[here] = block
        gauges.append(g)
    return gauges


def act_batch(batch: Batch, gauges: Sequence[Tensor]) -> Batch:
    """`act` on every group, gauges as `random_gauge_batch` gives them."""
    groups = [Group(b.index, *act(b.U, b.V, g)) for b, g in zip(batch.groups, gauges, strict=True)]
    return Batch(batch.spec, groups, batch.ranks)


def canonical_batch(batch: Batch) -> Batch:
    """`canonical` of every module."""
    return batch.map(canonical).masked()


def balance_batch(batch: Batch) -> Batch:
    """`balance` of every module."""
    return batch.map(balance).masked()


def truncate_batch(batch: Batch, rank: int) -> Batch:
    """`truncate` of every module; modules of lower rank keep theirs."""
    return batch.map(lambda U, V: truncate(U, V, rank), ranks=batch.ranks.clamp(max=rank)).masked()


def spectrum_batch(batch: Batch) -> Tensor:
    """Singular values of every module, (N, n_modules, r), modules in the spec's order."""
    order = [m for g in batch.groups for m in g.index]
    if not order:
        return torch.zeros(len(batch), 0, 0, dtype=batch.dtype, device=batch.device)
    found = torch.cat([spectrum(g.U, g.V) for g in batch.groups], dim=1)
    return found[:, torch.tensor(order, device=found.device).argsort()]


def procrustes_batch(batch: Batch, target: Batch) -> list[Tensor]:
    """`procrustes` of every module towards `target`, per group (N, M, r, r); apply with `rotate_batch`.

    The target is on the same spec, with N LoRAs or one, and is read up to the batch's own true ranks.
    """
    if batch.spec != target.spec:
        raise SpecError("procrustes_batch: the two batches have different specs")
    found = []
    for b, t in zip(batch.groups, target.padded(max(batch.rank, target.rank)).groups, strict=True):
        r = batch.rank
        inside = batch.mask(b)  # (N, M, r)
        U0, V0 = t.U[..., :r].double(), t.V[..., :r].double()
        M = b.U.double().mT @ U0 + b.V.double().mT @ V0
        # The identity in the padded block keeps a rank-deficient module from rotating into it.
        M = M * (inside[..., None] & inside[..., None, :]) + torch.diag_embed((~inside).double())
        found.append(polar(M).to(b.U.dtype))
    return found


def rotate_batch(batch: Batch, Q: Sequence[Tensor]) -> Batch:
    """(U Q, V Q) on every group, Q (N, M, r, r) orthogonal: the gauge action of Q^T without a solve."""
    groups = [Group(b.index, b.U @ q, b.V @ q) for b, q in zip(batch.groups, Q, strict=True)]
    return Batch(batch.spec, groups, batch.ranks)


# LoRAs: one module at a time, each at its own rank.


def map_lora(lora: LoRA, fn: PairMap) -> LoRA:
    """`fn(U, V) -> (U, V)` on every module, U (out, rank) and V (in_flat, rank) in float64.

    The result has scale 1 and the dtype that each module had; metadata and extras are kept.
    """
    factors = {}
    for name, f in lora.factors.items():
        U, V = fn(f.B.double() * f.scale, f.V.double())
        factors[name] = Factors(U.to(f.B), V.T.contiguous().to(f.A))
    return lora.replace(factors)


def act_lora(lora: LoRA, gauges: Mapping[str, Tensor]) -> LoRA:
    """(B g^-1, g A) on every module named in `gauges`, g (rank, rank); scales stay."""
    factors = dict(lora.factors)
    for name, g in gauges.items():
        f = factors[name]
        B, V = act(f.B, f.V, g)
        factors[name] = Factors(B, V.T, f.scale)
    return lora.replace(factors)


def canonical_lora(lora: LoRA) -> LoRA:
    """`canonical` of every module, scale 1."""
    return map_lora(lora, canonical)


def balance_lora(lora: LoRA) -> LoRA:
    """`balance` of every module, scale 1: what to do before half precision."""
    return map_lora(lora, balance)


def scale(lora: LoRA, c: float) -> LoRA:
    """c times every delta W, by the scale alone: factors are shared with the input."""
    return lora.replace({n: Factors(f.B, f.A, f.scale * c) for n, f in lora.factors.items()})


def add(loras: Sequence[LoRA], weights: Sequence[float] | None = None) -> LoRA:
    """The exact weighted sum of delta W (weights default to 1), by concatenating ranks; scale 1.

    Modules are matched by name and may be missing in some LoRAs; the result has all of them, in order of
    first appearance, with the sum of their ranks (`resize` brings it down), in float32 at least: scales are
    folded in, and half precision would round. Metadata is dropped. ShapeError when a name has two shapes;
    LolgenError when a LoRA carries extras: tensors that are not factors do not add up to a LoRA.
    """
    if not loras:
        raise SpecError("a sum needs at least one LoRA: an empty list has no spec")
    weights = [1.0] * len(loras) if weights is None else list(weights)
    if len(weights) != len(loras):
        raise ValueError(f"weights: found {len(weights)}, wanted one for each of {len(loras)} LoRAs")
    modules: dict[str, ModuleSpec] = {}
    for i, lora in enumerate(loras):
        if lora.extras:
            raise LolgenError(
                f"LoRA {i} carries tensors that are not factors ({next(iter(lora.extras))}, ...), "
                "whose sum is not a LoRA; clear its extras to add the factors alone"
            )
        for module in lora.spec:
            known = modules.setdefault(module.name, module)
            if known != module:
                raise ShapeError(
                    f"module {module.name!r} of LoRA {i}: "
                    f"found {module.kind} {module.shape}, kernel {module.kernel}; "
                    f"wanted {known.kind} {known.shape}, kernel {known.kernel}, as in the LoRAs before it"
                )
    factors = {}
    for name in modules:
        parts = [(lora.factors[name], w) for lora, w in zip(loras, weights, strict=True) if name in lora.spec]
        dtype = torch.float32
        for f, _ in parts:
            dtype = torch.promote_types(dtype, torch.promote_types(f.B.dtype, f.A.dtype))
        B = torch.cat([f.B.to(dtype) * (f.scale * w) for f, w in parts], dim=1)
        factors[name] = Factors(B, torch.cat([f.A.to(dtype) for f, _ in parts], dim=0))
    return LoRA(Spec(tuple(modules.values())), factors)


def resize(
    lora: LoRA,
    rank: int | Mapping[str, int] | None = None,
    *,
    energy: float | None = None,
    error: float | None = None,
) -> LoRA:
    """Every module at another rank: the best truncation, or the same delta W with zero columns added.

    `rank`: one for all modules, or one for each module named (others keep theirs). With `energy` or `error`
    (see `effective_rank`) each module gets the smallest rank that satisfies it, at least 1, and `rank` is the
    most it may get. Scale becomes 1; metadata and extras are kept.
    """
    if rank is None and energy is None and error is None:
        raise ValueError("resize: give rank, energy or error")
    if isinstance(rank, Mapping):
        unknown = [n for n in rank if n not in lora.spec]
        if unknown:
            raise SpecError(f"resize: no module {unknown[0]!r} in this LoRA")
    factors = {}
    for name, f in lora.factors.items():
        most = rank.get(name, f.rank) if isinstance(rank, Mapping) else rank
        if most is not None and most < 1:
            raise ShapeError(f"module {name!r}: found rank {most}, wanted 1 or more")
        U, V = canonical(f.B.double() * f.scale, f.V.double())
        k = most if most is not None else f.rank
        if energy is not None or error is not None:
            eps = torch.finfo(f.B.dtype).eps
            k = min(k, max(1, int(ranks_needed(U.square().sum(-2), energy, error, eps))))
        U, V = pad(U[:, :k], V[:, :k], k)
        factors[name] = Factors(U.to(f.B).contiguous(), V.T.to(f.A).contiguous())
    return lora.replace(factors)
