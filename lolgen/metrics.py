"""Inner products, norms and distances between LoRAs, exact and without delta W, from small Gram matrices.

`<dW1, dW2> = sum((U1^T U2) * (V1^T V2))`, summed over modules. Before that, V is made orthonormal and its
triangle moved into U: the result is the same and no longer loses the square of a bad gauge's condition.
A module that only one of the two has counts as zero in the other.

`S` weighs what a module really sees: `S[name]` (in_flat, in_flat), positive semidefinite, `E[x x^T]` over
its inputs, makes `|dW|_S^2 = tr(U^T U V^T S V)`, the mean of `|dW x|^2`. Without an entry, S = identity.

LoRA pairs give floats, computed in float64. Batches, row by row (N with N, or either with one), give tensors
(N,) in float64 too, and gradients flow to the factors that require them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import overload

import torch
from torch import Tensor

from lolgen.errors import ShapeError, SpecError
from lolgen.lora import Batch, LoRA

Weights = Mapping[str, Tensor]
Pair = tuple[Tensor, Tensor]

_BLOCK = 1 << 18
"""Most elements of an intermediate in `gram`: 2 MiB in float64, which stay in a core's cache."""


@overload
def inner(a: LoRA, b: LoRA, S: Weights | None = None) -> float: ...
@overload
def inner(a: Batch, b: Batch, S: Weights | None = None) -> Tensor: ...
def inner(a: LoRA | Batch, b: LoRA | Batch, S: Weights | None = None) -> float | Tensor:
    """<dW_a, dW_b> over all modules. ShapeError when a module has two shapes, SpecError when N differ."""
    total = _zero(a, b)
    for names, x, y in _pairs(a, b):
        if x is not None and y is not None:
            total = total + _inner(_orthonormal(x), _orthonormal(y), _stacked(S, names, x[1]))
    return _out(total, a)


@overload
def squared_distance(a: LoRA, b: LoRA, S: Weights | None = None) -> float: ...
@overload
def squared_distance(a: Batch, b: Batch, S: Weights | None = None) -> Tensor: ...
def squared_distance(a: LoRA | Batch, b: LoRA | Batch, S: Weights | None = None) -> float | Tensor:
    """|dW_a - dW_b|^2, the plain loss between LoRAs.

    Taken from the difference's own factors [U_a, -U_b] and [V_a, V_b], not from |a|^2 + |b|^2 - 2 <a, b>,
    which would leave near-equal LoRAs with nothing but rounding.
    """
    total = _zero(a, b)
    for names, x, y in _pairs(a, b):
        difference = x if y is None else y
        if x is not None and y is not None:
            x, y = _same_rows(x, y)
            difference = torch.cat([x[0], -y[0]], dim=-1), torch.cat([x[1], y[1]], dim=-1)
        if difference is not None:
            d = _orthonormal(difference)
            total = total + _inner(d, d, _stacked(S, names, d[1])).clamp(min=0)
    return _out(total, a)


@overload
def norm(a: LoRA, S: Weights | None = None) -> float: ...
@overload
def norm(a: Batch, S: Weights | None = None) -> Tensor: ...
def norm(a: LoRA | Batch, S: Weights | None = None) -> float | Tensor:
    """|dW| over all modules (Frobenius, or weighted by S)."""
    total = _zero(a, a)
    for names, x, _ in _pairs(a, a):
        assert x is not None
        d = _orthonormal(x)
        total = total + _inner(d, d, _stacked(S, names, d[1])).clamp(min=0)
    return _out(total.sqrt(), a)


@overload
def distance(a: LoRA, b: LoRA, S: Weights | None = None) -> float: ...
@overload
def distance(a: Batch, b: Batch, S: Weights | None = None) -> Tensor: ...
def distance(a: LoRA | Batch, b: LoRA | Batch, S: Weights | None = None) -> float | Tensor:
    """|dW_a - dW_b|. Its gradient is not defined where it is 0: train on `squared_distance`."""
    if isinstance(a, LoRA) and isinstance(b, LoRA):
        return squared_distance(a, b, S) ** 0.5
    assert isinstance(a, Batch) and isinstance(b, Batch)
    return squared_distance(a, b, S).sqrt()


@overload
def relative_distance(a: LoRA, b: LoRA, S: Weights | None = None) -> float: ...
@overload
def relative_distance(a: Batch, b: Batch, S: Weights | None = None) -> Tensor: ...
def relative_distance(a: LoRA | Batch, b: LoRA | Batch, S: Weights | None = None) -> float | Tensor:
    """|dW_a - dW_b| / |dW_a|: a is the reference. 0 when both are zero, infinite when only a is."""
    if isinstance(a, LoRA) and isinstance(b, LoRA):
        apart, size = distance(a, b, S), norm(a, S)
        return apart / size if size else (float("inf") if apart else 0.0)
    assert isinstance(a, Batch) and isinstance(b, Batch)
    apart_, size_ = distance(a, b, S), norm(a, S)
    return torch.where(apart_ == 0, torch.zeros_like(apart_), apart_ / size_)


@overload
def cosine(a: LoRA, b: LoRA, S: Weights | None = None) -> float: ...
@overload
def cosine(a: Batch, b: Batch, S: Weights | None = None) -> Tensor: ...
def cosine(a: LoRA | Batch, b: LoRA | Batch, S: Weights | None = None) -> float | Tensor:
    """<dW_a, dW_b> / (|dW_a| |dW_b|), in [-1, 1]; 0 when either is zero."""
    if isinstance(a, LoRA) and isinstance(b, LoRA):
        size = norm(a, S) * norm(b, S)
        return min(1.0, max(-1.0, inner(a, b, S) / size)) if size else 0.0
    assert isinstance(a, Batch) and isinstance(b, Batch)
    size_ = norm(a, S) * norm(b, S)
    found = inner(a, b, S) / torch.where(size_ == 0, torch.ones_like(size_), size_)
    return found.clamp(-1, 1)


@torch.no_grad()
def gram(
    x: Batch,
    y: Batch | None = None,
    *,
    S: Weights | None = None,
    per_module: bool = False,
    dtype: torch.dtype = torch.float64,
) -> Tensor:
    """Inner products of every LoRA of x with every LoRA of y (of x itself without y): (N1, N2), exact.

    `per_module`: (n_modules, N1, N2), modules in the spec's order, before the sum. `dtype`: of the products
    and of the result (float32 is about twice as fast, good to about 1e-6 of the norms). Worked out in blocks
    of LoRAs: beyond its result and a copy of one module it needs a few MiB. SpecError when specs differ.
    """
    symmetric = y is None
    y = x if y is None else y
    if x.spec != y.spec:
        raise SpecError("gram: the two batches have different specs")
    size = (len(x.spec), len(x), len(y)) if per_module else (len(x), len(y))
    found = torch.zeros(size, dtype=dtype, device=x.device)
    for gx, gy in zip(x.groups, y.groups, strict=True):
        for j, module in enumerate(gx.index):
            Ux, Vx = _orthonormal((gx.U[:, j], gx.V[:, j]))  # (N1, out, r), (N1, in_flat, r)
            Uy, Vy = (Ux, Vx) if symmetric else _orthonormal((gy.U[:, j], gy.V[:, j]))
            weight = _stacked(S, (x.spec.names[module],), Vy)
            if weight is not None:
                Vy = weight[0] @ Vy
            out = found[module] if per_module else found
            _add_gram(out, (Ux.to(dtype), Vx.to(dtype)), (Uy.to(dtype), Vy.to(dtype)), symmetric)
    return found


def _add_gram(out: Tensor, x: Pair, y: Pair, symmetric: bool) -> None:
    (Ux, Vx), (Uy, Vy) = x, y
    r1, r2 = Ux.shape[-1], Uy.shape[-1]
    if not r1 or not r2:
        return
    step = max(1, int((_BLOCK / (r1 * r2)) ** 0.5))
    for i in range(0, len(Ux), step):
        for j in range(i if symmetric else 0, len(Uy), step):
            U = _columns(Ux[i : i + step]).mT @ _columns(Uy[j : j + step])  # (b1 * r1, b2 * r2)
            U *= _columns(Vx[i : i + step]).mT @ _columns(Vy[j : j + step])
            block = U.view(-1, r1, U.shape[1]).sum(1).view(-1, U.shape[1] // r2, r2).sum(-1)  # (b1, b2)
            if symmetric and j == i:
                block = (block + block.T) / 2  # exactly symmetric, as solvers want it
            out[i : i + step, j : j + step] += block
            if symmetric and j > i:
                out[j : j + step, i : i + step] += block.T


def _columns(U: Tensor) -> Tensor:
    """(b, m, r) -> (m, b * r), the columns of one LoRA side by side."""
    return U.permute(1, 0, 2).reshape(U.shape[1], -1)


def _orthonormal(pair: Pair) -> Pair:
    """The same delta W in float64 with V orthonormal, where no gradient is asked for (see the module's text).

    With gradients the factors are taken as given: QR has no gradient where columns are zero, as in padding.
    """
    U, V = pair[0].double(), pair[1].double()
    if torch.is_grad_enabled() and (U.requires_grad or V.requires_grad):
        return U, V
    Q, R = torch.linalg.qr(V)
    return U @ R.mT, Q


def _inner(x: Pair, y: Pair, S: Tensor | None) -> Tensor:
    """(N, M, ...) pairs -> (N,). S (M, in_flat, in_flat)."""
    Vy = y[1] if S is None else S @ y[1]
    return ((x[0].mT @ y[0]) * (x[1].mT @ Vy)).sum((-3, -2, -1))


def _same_rows(x: Pair, y: Pair) -> tuple[Pair, Pair]:
    n = max(len(x[0]), len(y[0]))
    (Ux, Vx), (Uy, Vy) = ((U.expand(n, *U.shape[1:]), V.expand(n, *V.shape[1:])) for U, V in (x, y))
    return (Ux, Vx), (Uy, Vy)


def _stacked(S: Weights | None, names: Sequence[str], V: Tensor) -> Tensor | None:
    """The weights of some modules, (M, in_flat, in_flat), or None when none of them has one."""
    if S is None or not any(n in S for n in names):
        return None
    n = V.shape[-2]
    found = []
    for name in names:
        one = S[name] if name in S else torch.eye(n)
        if one.shape != (n, n):
            raise ShapeError(f"S of module {name!r}: found {tuple(one.shape)}, wanted {(n, n)}")
        found.append(one.to(device=V.device, dtype=torch.float64))
    return torch.stack(found)


def _zero(a: LoRA | Batch, b: LoRA | Batch) -> Tensor:
    if isinstance(a, LoRA) and isinstance(b, LoRA):
        return torch.zeros(1, dtype=torch.float64)
    if not (isinstance(a, Batch) and isinstance(b, Batch)):
        raise TypeError("compare two LoRAs, or two batches row by row; Batch.stack makes a batch of a LoRA")
    if len(a) != len(b) and 1 not in (len(a), len(b)):
        raise SpecError(
            f"rows do not match: found batches of {len(a)} and {len(b)}, wanted equal or one of 1"
        )
    return torch.zeros(len(b) if len(a) == 1 else len(a), dtype=torch.float64, device=a.device)


def _out(total: Tensor, a: LoRA | Batch) -> float | Tensor:
    return total.item() if isinstance(a, LoRA) else total


def _pairs(a: LoRA | Batch, b: LoRA | Batch) -> Iterator[tuple[tuple[str, ...], Pair | None, Pair | None]]:
    """Names of M modules of one shape, and their pairs (N, M, size, r) in a and in b; None where missing."""
    if isinstance(a, Batch) and isinstance(b, Batch) and a.spec == b.spec:
        for x, y in zip(a.groups, b.groups, strict=True):
            yield tuple(a.spec.names[i] for i in x.index), (x.U, x.V), (y.U, y.V)
        return
    for name in dict.fromkeys((*a.spec.names, *b.spec.names)):
        if name in a.spec and name in b.spec and a.spec[name].shape != b.spec[name].shape:
            raise ShapeError(
                f"module {name!r}: found {b.spec[name].shape} in the second, "
                f"wanted {a.spec[name].shape} as in the first"
            )
        yield (name,), _module(a, name), _module(b, name)


def _module(x: LoRA | Batch, name: str) -> Pair | None:
    if name not in x.spec:
        return None
    if isinstance(x, LoRA):
        f = x.factors[name]
        # The scale comes after the cast: it may be tiny for half precision.
        return f.B.double().cpu()[None, None] * f.scale, f.V.double().cpu()[None, None]
    position = x.spec.index(name)
    for group in x.groups:
        if position in group.index:
            j = group.index.index(position)
            return group.U[:, j : j + 1], group.V[:, j : j + 1]
    raise AssertionError(name)
