"""The algebra behind resize, merge, diff and compare: sums of delta W, exactly, from small matrices.

A module's delta W is a sum of terms `U_i V_i^T`, one for each input that has the module. Side by side,
`U = [U_1 ...] = Q_u E` and `V = [V_1 ...] = Q_v F` with orthonormal Q; every term is then a small core
`C_i = E_i F_i^T` between the same two bases, and whatever is made of the terms is a core C too, whose
singular values are those of `Q_u C Q_v^T`. Delta W is never formed.

Q comes from the Gram matrix of U by Cholesky (`Q = U R^-1`, one product instead of Householder's many passes),
all modules of one shape in one batch, in float64. The price is an error of eps * condition^2 in Q's
orthogonality, so the condition of R is computed (not estimated), and a module at or above `LIMIT` gets a
Householder QR. Singular values and truncations are then off by at most about 1e-8 of themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor

from lolgen import gl
from lolgen.lora import Factors
from lolgen.tools.workers import each

LIMIT = 1e4
"""The condition (in the Frobenius norm, columns scaled to 1) from which on a factor gets a Householder QR."""
_CHUNK = 1 << 21
"""Most float64 numbers of the factors in one batch: 16 MiB, which a cache holds."""


class Term(NamedTuple):
    """What one input adds to a module: the input's position and its factors."""

    input: int
    factors: Factors


Terms = Mapping[str, Sequence[Term]]


@dataclass(eq=False)
class Side:
    """`X = Q R` for M modules, X (M, m, k): R (M, q, k), q = min(m, k). Q is `X @ coef`, coef (M, k, q), but
    where `dense` has it, by position: (m, q)."""

    R: Tensor
    coef: Tensor
    dense: dict[int, Tensor]

    def lift(self, X: Tensor, small: Tensor) -> Tensor:
        """Q @ small: (M, q, j) -> (M, m, j), lying in memory as X does."""
        by_rows = X.stride(-1) != 1  # V, which lies as A: products in A's order spare two transpositions
        lifted = ((self.coef @ small).mT @ X.mT).mT if by_rows else X @ (self.coef @ small)
        for j, Q in self.dense.items():
            lifted[j] = Q @ small[j]
        return lifted


def orthonormal(X: Tensor) -> Side:
    """The orthonormal bases of M modules' columns, X (M, m, k) in float64; any rank, zero included."""
    M, m, k = X.shape
    if m < k:
        Q, R = torch.linalg.qr(X)
        return Side(R, X.new_zeros(M, k, m), dict(enumerate(Q)))
    G = X.mT @ X
    size = G.diagonal(dim1=-2, dim2=-1).sqrt()  # (M, k)
    size = torch.where(size > 0, size, torch.ones_like(size))
    # With columns of length 1 the condition is, up to sqrt(k), the least that scaling columns can reach.
    L, info = torch.linalg.cholesky_ex(G / (size[:, :, None] * size[:, None, :]))
    inverse = torch.linalg.solve_triangular(L, torch.eye(k).to(X).expand(M, k, k), upper=False)
    condition = torch.linalg.matrix_norm(L) * torch.linalg.matrix_norm(inverse)
    bad = ~((info == 0) & (condition < LIMIT))  # NaN is bad too
    R, coef = L.mT * size[:, None, :], inverse.mT / size[:, :, None]
    dense: dict[int, Tensor] = {}
    for j in bad.nonzero()[:, 0].tolist():
        dense[j], R[j] = torch.linalg.qr(X[j])
        coef[j] = 0
    return Side(R, coef, dense)


@dataclass(eq=False)
class Frame:
    """M modules of one shape with the same inputs at the same ranks, between their orthonormal bases.

    `index`: positions of the inputs, ascending; `blocks`: for each, (E_i (M, q, r_i), F_i (M, p, r_i)).
    """

    names: tuple[str, ...]
    index: tuple[int, ...]
    terms: list[Sequence[Term]]
    left: Side
    right: Side

    @cached_property
    def blocks(self) -> list[tuple[Tensor, Tensor]]:
        ranks = [t.factors.rank for t in self.terms[0]]
        return list(zip(self.left.R.split(ranks, -1), self.right.R.split(ranks, -1), strict=True))

    @property
    def eps(self) -> float:
        """What the inputs' numbers are known to: eps of float64 or of float32 (half precision counts as exact
        float32 numbers)."""
        dtype = torch.float32
        for term in self.terms[0]:
            dtype = torch.promote_types(dtype, dtype_of(term.factors))
        return torch.finfo(dtype).eps

    def core(self, i: int) -> Tensor:
        """C_i (M, q, p), i counting the inputs present."""
        E, F = self.blocks[i]
        return E @ F.mT

    def lift(self, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
        """(Q_u X (M, out, j), Q_v Y (M, in_flat, j)) for X (M, q, j), Y (M, p, j)."""
        return self.left.lift(_stack(self.terms, "U"), X), self.right.lift(_stack(self.terms, "V"), Y)


def frames(terms: Terms, progress: str = "") -> Iterator[Frame]:
    """All modules, batched by shape and ranks. `progress`: what the bar on stderr is called, "" for none."""
    return each(_frame, _chunks(terms), progress)


def _chunks(terms: Terms) -> list[dict[str, Sequence[Term]]]:
    """The modules of one shape, with the same inputs at the same ranks, at most _CHUNK numbers at once."""
    found: dict[tuple[object, ...], list[str]] = {}
    for name, parts in terms.items():
        shape = (parts[0].factors.B.shape[0], parts[0].factors.A.shape[1])
        key = (shape, tuple((t.input, t.factors.rank, dtype_of(t.factors)) for t in parts))
        found.setdefault(key, []).append(name)
    chunks = []
    for names in found.values():
        numbers = sum(t.factors.B.numel() + t.factors.A.numel() for t in terms[names[0]])
        step = max(1, _CHUNK // numbers)
        chunks += [{n: terms[n] for n in names[i : i + step]} for i in range(0, len(names), step)]
    return chunks


def _frame(chunk: Mapping[str, Sequence[Term]]) -> Frame:
    rows = list(chunk.values())
    left, right = orthonormal(_stack(rows, "U")), orthonormal(_stack(rows, "V"))
    return Frame(tuple(chunk), tuple(t.input for t in rows[0]), rows, left, right)


def _stack(parts: list[Sequence[Term]], letter: str) -> Tensor:
    """The factors of M modules side by side, (M, size, k) in float64; the scale is in U."""
    ranks = [t.factors.rank for t in parts[0]]
    first = parts[0][0].factors
    size = first.B.shape[0] if letter == "U" else first.A.shape[1]
    # V is kept as A lies in memory, rows first: copying is then a plain cast.
    shape = (len(parts), size, sum(ranks)) if letter == "U" else (len(parts), sum(ranks), size)
    stacked = torch.empty(shape, dtype=torch.float64, device=first.B.device)
    for row, module in zip(stacked, parts, strict=True):
        start = 0
        for (_, f), r in zip(module, ranks, strict=True):
            if letter == "U":
                row[:, start : start + r] = f.B
                if f.scale != 1:
                    row[:, start : start + r] *= f.scale
            else:
                row[start : start + r] = f.A
            start += r
    return stacked if letter == "U" else stacked.mT


class Piece(NamedTuple):
    """The SVD of a frame's cores: P (M, q, s), S (M, s) descending, W (M, p, s)."""

    frame: Frame
    P: Tensor
    S: Tensor
    W: Tensor


class Written(NamedTuple):
    """Factors to write, and the squared error that their dtype's rounding made (0 where not measured)."""

    factors: Factors
    rounding: float


@dataclass(eq=False)
class Thin:
    """The SVD of every module: `spectra`, its singular values (s,) in float64; `truncate` gives factors."""

    pieces: list[Piece]
    spectra: dict[str, Tensor]
    eps: dict[str, float]

    def truncate(
        self, ranks: Mapping[str, int], dtypes: Mapping[str, torch.dtype], progress: str = ""
    ) -> dict[str, Written]:
        """Every module at its rank (1 or more; zero columns past its singular values), in canonical form: the
        best approximation there is, balanced before it is rounded to its dtype.

        The rounding error is measured for float16 and bfloat16; it stays below 1e-6 of the norm for the others.
        """

        def work(piece: Piece) -> dict[str, Written]:
            return _truncated(piece, ranks, dtypes)

        written = {n: w for part in each(work, self.pieces, progress) for n, w in part.items()}
        return {n: written[n] for n in self.spectra}


def _truncated(
    piece: Piece, ranks: Mapping[str, int], dtypes: Mapping[str, torch.dtype]
) -> dict[str, Written]:
    frame, P, S, W = piece
    kept = [min(S.shape[-1], ranks[n]) for n in frame.names]
    most = max(kept)
    # Columns past a module's own rank are zero.
    inside = torch.arange(most, device=S.device) < torch.tensor(kept, device=S.device)[:, None]
    squares = S[:, :most] * inside  # (M, most): U^T U and V^T V
    U, V = frame.lift(P[..., :most], W[..., :most])
    factor = squares.sqrt()[:, None] * _sign(U)
    U *= factor
    V *= factor
    written = {}
    for dtype in {dtypes[n] for n in frame.names}:
        rows = [j for j, n in enumerate(frame.names) if dtypes[n] == dtype]
        every = len(rows) == len(frame.names)
        part = (U, V, squares) if every else (U[rows], V[rows], squares[rows])
        B, A = part[0].to(dtype), part[1].mT.to(dtype)
        lost = _rounding(*part, B, A)
        for j, row in enumerate(rows):
            k, name = kept[row], frame.names[row]
            pair = gl.pad(B[j, :, :k], A[j, :k].mT, ranks[name])
            # Copies, so that one module kept alive doesn't keep the whole chunk.
            factors = Factors(pair[0].clone(memory_format=torch.contiguous_format), pair[1].mT.contiguous())
            written[name] = Written(factors, lost[j])
    return written


def _sign(U: Tensor) -> Tensor:
    """(M, 1, j): what makes the largest entry of each column positive, so that one delta W gives one file."""
    low, high = torch.aminmax(U, dim=-2, keepdim=True)
    return torch.where(-low > high, -1.0, 1.0).to(U)


def _rounding(U: Tensor, V: Tensor, squares: Tensor, B: Tensor, A: Tensor) -> list[float]:
    """|U V^T - B A|^2 for each module, U^T U = V^T V = diag(squares), (B, A) the pair rounded to half precision.

    With dU = U - B, dV = V - A^T the difference is dU V^T + B dV^T; its Gram matrices need no more than dU^T dU,
    dU^T B, dV^T dV and dV^T V, for which float32 is plenty: they are differences already.
    """
    if B.dtype not in (torch.float16, torch.bfloat16):
        return [0.0] * len(U)
    dU, dV = (U - B).float(), (V - A.mT).float()
    uu, ub = (dU.mT @ dU).double(), (dU.mT @ B.float()).double()
    vv, vd = (dV.mT @ dV).double(), (dV.mT @ V.float()).double()
    bb = torch.diag_embed(squares) - ub - ub.mT - uu  # B^T B
    square = (uu.diagonal(dim1=-2, dim2=-1) * squares).sum(-1)
    square = square + ((bb * vv) + 2 * (ub * vd.mT)).sum((-2, -1))
    found: list[float] = square.clamp(min=0).tolist()
    return found


def decompose(
    terms: Terms,
    weights: Sequence[float],
    core: Callable[[Frame], Tensor] | None = None,
    progress: str = "",
) -> Thin:
    """The SVD of every module of a combination: by default the sum of `weights[i]` times input i, else what
    `core(frame) -> (M, q, p)` makes of the inputs' cores.

    `core` may be called from several threads at once. A singular value that is only rounding of the inputs'
    products is zero.
    """
    make = core or (lambda frame: weighted_sum(frame, weights))

    def work(chunk: Mapping[str, Sequence[Term]]) -> Piece:
        frame = _frame(chunk)
        P, S, Wh = torch.linalg.svd(make(frame), full_matrices=False)
        size = torch.zeros_like(S[:, 0])
        for i, (E, F) in zip(frame.index, frame.blocks, strict=True):
            size += abs(weights[i]) * torch.linalg.matrix_norm(E) * torch.linalg.matrix_norm(F)
        cutoff = torch.finfo(torch.float64).eps * (frame.left.R.shape[-1] + 8) * size
        return Piece(frame, P, torch.where(cutoff[:, None] < S, S, torch.zeros_like(S)), Wh.mT)

    pieces = list(each(work, _chunks(terms), progress))
    spectra = {n: s for p in pieces for n, s in zip(p.frame.names, p.S.cpu(), strict=True)}
    eps = {n: p.frame.eps for p in pieces for n in p.frame.names}
    return Thin(pieces, {n: spectra[n] for n in terms}, eps)


def weighted_sum(frame: Frame, weights: Sequence[float]) -> Tensor:
    """The core of the exact sum, (M, q, p)."""
    E = torch.cat([E * weights[i] for i, (E, _) in zip(frame.index, frame.blocks, strict=True)], -1)
    return E @ frame.right.R.mT


def dtype_of(factors: Factors) -> torch.dtype:
    return torch.promote_types(factors.B.dtype, factors.A.dtype)
