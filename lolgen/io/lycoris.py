"""LyCORIS modules as LoRAs, exactly, from the factors alone: LoHa and LoKr, and their Tucker forms.

LoHa is a Hadamard product, `delta W = (a1 b1) * (a2 b2)`: a LoRA of rank r1 r2, whose B is the row-wise and whose A
is the column-wise Khatri-Rao product of the factors. LoKr is a Kronecker product, `delta W = w1 (x) w2`: a LoRA of
rank(w1) rank(w2), with the Kronecker products of their factors. delta W itself is never formed. LoCon is an ordinary
LoRA of convolutions. A `dora_scale` is not part of delta W: it needs the base's weights, and is carried beside.

(Hyeon-Woo et al., arXiv 2108.06098; Yeh et al., LyCORIS, arXiv 2309.14859.)
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import prod

import torch
from torch import Tensor
from tqdm import tqdm

from lolgen import gl
from lolgen.errors import FormatError
from lolgen.io import common, names, pairs
from lolgen.io.families import unet
from lolgen.io.safetensors_file import Path_

PART = re.compile(r"(?:hada_w[12]_[ab]|hada_t[12]|lokr_w[12](?:_[ab])?|lokr_t2)")
OTHER = ("oft_", "glora", "a1.", "a2.", "b1.", "b2.", "on_input", "hada_", "lokr_", "boft_")
"""Starts of the keys of methods that are no LoRA, or of parts that PART does not know."""
MOST = 1 << 30
"""Most numbers that a file's modules may be as LoRAs when no rank is asked for: 4 GiB in float32."""
_MATRICES = ("hada_w1_a", "hada_w2_a", "lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a")
_SMALL = 256  # a full matrix up to this size is checked for a lower rank
_ZERO = 1e-9  # singular values below this, relative to the largest, are rounding

Pair = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Converted:
    """A module that was no LoRA: its `method`, the `exact` rank as one, the `rank` it got, and the relative `error`
    of delta W that this costs."""

    name: str
    method: str
    exact: int
    rank: int
    error: float


def tail(key: str) -> tuple[str, str] | None:
    """(what stands before, the part) of a LoHa or LoKr key, None for another."""
    head, _, last = key.rpartition(".")
    return (head, last) if head and PART.fullmatch(last) else None


class Modules(dict[str, dict[str, pairs.Keyed]]):
    """Module name -> part -> (key, tensor), as a file is read."""

    def __init__(self, file: Path_) -> None:
        super().__init__()
        self.file = file

    def put(self, name: str, part: str, key: str, tensor: Tensor) -> None:
        parts = self.setdefault(name, {})
        if part in parts:
            raise FormatError(
                self.file,
                key=key,
                found=f"a second {part} for module {name} beside {parts[part][0]!r}",
                wanted="one adapter, one spelling of each module",
                remedy="save each adapter to its own file",
            )
        if tensor.dtype not in pairs.DTYPES or not tensor.numel():
            raise self.unfit(key, tensor, "numbers in float32, float16, bfloat16 or float64")
        if tensor.ndim < 2 or (tensor.ndim > 2 and part in _MATRICES):
            raise self.unfit(
                key, tensor, "a matrix" if part in _MATRICES else "a matrix, or one with a kernel"
            )
        parts[part] = key, tensor

    def into(
        self,
        collected: pairs.Collected,
        alphas: dict[str, pairs.Keyed],
        rank: int | None = None,
        base: str | None = None,
        report: list[Converted] | None = None,
    ) -> None:
        """Every module as the two halves of a LoRA in `collected`; their alphas are taken out of `alphas`.

        `rank`: truncate to it, with the smallest error there is. FormatError for parts that do not fit together,
        or when the LoRAs would be more than MOST numbers.
        """
        if rank is None:
            self._check_size()
        made: dict[str, tuple[Pair, tuple[int, ...], float]] = {}
        quiet = None if len(self) > 50 else True  # None: a bar on a terminal only
        for name, parts in tqdm(self.items(), "LoHa, LoKr to LoRA", leave=False, disable=quiet):
            if name in collected:
                key = next(iter(parts.values()))[0]
                raise FormatError(
                    self.file,
                    key=key,
                    found=f"a second method for module {name}",
                    wanted="one of LoRA, LoHa, LoKr",
                    remedy="save each adapter to its own file",
                )
            method = "LoHa" if any(p.startswith("hada") for p in parts) else "LoKr"
            make = self._loha if method == "LoHa" else self._lokr
            (B, A), kernel, dim, exact, error = make(name, rank)
            scale = 1.0
            if name in alphas:
                alpha = common.alpha_of(self.file, *alphas.pop(name), dim or 1)
                scale = alpha / dim if dim else 1.0
            made[name] = (B, A), kernel, scale
            if report is not None:
                report.append(Converted(name, method, exact, B.shape[1], error))
        convolved = _convolved(made, base)
        for name, ((B, A), kernel, scale) in made.items():
            path = name[len("unet.") :] if name.startswith("unet.") else ""
            kernel = kernel or unet.kernel(path, convolved)
            if A.shape[1] % prod(kernel):
                kernel = ()
            ones = (1,) * len(kernel)
            key = next(iter(self[name].values()))[0]
            collected.put(name, "A", key, A.reshape(len(A), -1, *kernel))
            collected.put(name, "B", key, B.reshape(*B.shape, *ones))
            collected[name].scale = scale

    def unfit(self, key: str, tensor: Tensor, wanted: str) -> FormatError:
        return FormatError(
            self.file,
            key=key,
            found=f"shape {tuple(tensor.shape)}, {tensor.dtype}".replace("torch.", ""),
            wanted=wanted,
            remedy="the parts do not belong together: download or save the file again",
        )

    def _need(self, name: str, part: str) -> Tensor:
        parts = self[name]
        if part not in parts:
            raise FormatError(
                self.file,
                key=next(iter(parts.values()))[0],
                found=f"module {name} without its {part}",
                wanted="every part of it",
                remedy="the file is incomplete: download or save it again",
            )
        return parts[part][1]

    def _matrix(
        self, name: str, a: str, b: str, core: str | None = None
    ) -> tuple[Tensor, Tensor, tuple[int, ...]]:
        """(left (m, r), right (r, n flat), kernel) in float64 of one factor, its Tucker core folded in, exactly."""
        left, right = self._need(name, a).double(), self._need(name, b).double()
        if core is None or core not in self[name]:
            if left.ndim != 2 or right.ndim < 2 or left.shape[1] != right.shape[0]:
                raise self.unfit(
                    self[name][b][0], right, f"({left.shape[-1]}, in) to go with {tuple(left.shape)}"
                )
            return left, right.flatten(1), tuple(right.shape[2:])
        key, t = self[name][core]
        if left.ndim != 2 or right.ndim != 2 or t.ndim < 3 or t.shape[:2] != (left.shape[0], right.shape[0]):
            raise self.unfit(key, t, f"({left.shape[0]}, {right.shape[0]}, k, k)")
        folded = torch.einsum("ijs,jn->ins", t.double().flatten(2), right)  # (r, n, k * k)
        return left.T, folded.flatten(1), tuple(t.shape[2:])

    def _loha(self, name: str, rank: int | None) -> tuple[Pair, tuple[int, ...], int, int, float]:
        a1, b1, kernel = self._matrix(name, "hada_w1_a", "hada_w1_b", "hada_t1")
        a2, b2, other = self._matrix(name, "hada_w2_a", "hada_w2_b", "hada_t2")
        if (len(a1), b1.shape[1], kernel) != (len(a2), b2.shape[1], other):
            key, tensor = self[name]["hada_w2_b"]
            raise self.unfit(key, tensor, f"halves of one shape, ({len(a1)}, {b1.shape[1]})")
        dim = self._need(name, "hada_w1_b").shape[0]
        B = (a1[:, :, None] * a2[:, None, :]).flatten(1)  # (out, r1 r2)
        A = (b1[:, None] * b2[None]).flatten(0, 1)  # (r1 r2, in)
        exact, least, error = B.shape[1], min(len(B), A.shape[1]), 0.0
        if rank is not None and rank < exact:
            error = truncation_error(B, A.T, rank)
        if min(rank or exact, least) < exact:
            U, V = gl.truncate(B, A.T, min(rank or exact, least))
            B, A = U, V.T
        return self._stored(name, B, A), kernel, dim, min(exact, least), error

    def _lokr(self, name: str, rank: int | None) -> tuple[Pair, tuple[int, ...], int, int, float]:
        first, _, dim1 = self._factor(name, "lokr_w1", None)
        second, kernel, dim2 = self._factor(name, "lokr_w2", "lokr_t2")
        exact, error = first[0].shape[1] * second[0].shape[1], 0.0
        if rank is not None and rank < exact:
            B, A, error = _truncated_kron(first, second, rank)
        else:
            B, A = (_kron(x, y) for x, y in zip(first, second, strict=True))
        return self._stored(name, B, A), kernel, dim2 or dim1, exact, error

    def _factor(self, name: str, part: str, core: str | None) -> tuple[Pair, tuple[int, ...], int]:
        """((left, right), kernel, the rank that alpha is divided by: 0 for a full matrix)."""
        if part not in self[name]:
            left, right, kernel = self._matrix(name, f"{part}_a", f"{part}_b", core)
            return (left, right), kernel, self._need(name, f"{part}_b").shape[0]
        full = self[name][part][1]
        return _factorised(full.double().flatten(1)), tuple(full.shape[2:]), 0

    def _stored(self, name: str, B: Tensor, A: Tensor) -> Pair:
        dtype = torch.float32
        for _, tensor in self[name].values():
            dtype = torch.promote_types(dtype, tensor.dtype)
        B, A = B.to(dtype).contiguous(), A.to(dtype).contiguous()
        if not (B.isfinite().all() and A.isfinite().all()):
            raise FormatError(
                self.file,
                key=next(iter(self[name].values()))[0],
                found="products too large for float32",
                wanted="finite numbers",
                remedy="the training behind it diverged: use an earlier checkpoint",
            )
        return B, A

    def _check_size(self) -> None:
        """An upper bound on the numbers of all modules, from shapes alone."""
        total, largest = 0, (0, "")
        for name, parts in self.items():
            size = {p: t.shape for p, (_, t) in parts.items()}
            if "hada_w1_b" in size:
                r = prod(size.get(f"hada_w{i}_b", (0,))[0] for i in (1, 2))
                out = max(size.get("hada_w1_a", (0,)))
                in_ = prod(size["hada_w1_b"][1:]) * prod(size.get("hada_t1", (1, 1))[2:])
            else:
                r, out, in_ = 1, 1, 1
                for part in ("lokr_w1", "lokr_w2"):
                    a, b = size.get(f"{part}_a", (0,)), size.get(f"{part}_b", (0,))
                    m, n = (size[part][0], prod(size[part][1:])) if part in size else (max(a), prod(b[1:]))
                    n *= prod(size.get("lokr_t2", (1, 1))[2:]) if part == "lokr_w2" else 1
                    r, out, in_ = r * (min(m, n) if part in size else b[0]), out * m, in_ * n
            r = min(r, out, in_)
            total, largest = total + (out + in_) * r, max(largest, (r, name))
        if total > MOST:
            raise FormatError(
                self.file,
                key=largest[1],
                found=f"modules of exact rank up to {largest[0]}, {total / 1e9:.1f} billion numbers as LoRAs",
                wanted=f"at most {MOST / 1e9:.1f} billion",
                remedy="give a rank to truncate to (lolgen convert --rank 64); the error is stated",
            )


def truncation_error(U: Tensor, V: Tensor, rank: int) -> float:
    """|delta W - its best approximation of this rank| / |delta W|, exactly; 0 for a zero module."""
    S = gl.spectrum(U, V).double()
    size = float(torch.linalg.vector_norm(S))
    return float(torch.linalg.vector_norm(S[rank:])) / size if size else 0.0


def _factorised(w: Tensor) -> Pair:
    """A full matrix as (left, right) of its rank: itself beside an identity, or its SVD where that is smaller."""
    m, n = w.shape
    if min(m, n) <= _SMALL:
        U, S, Vh = torch.linalg.svd(w, full_matrices=False)
        keep = _ZERO * S[:1] < S
        if 0 < int(keep.sum()) < len(S):
            return U[:, keep] * S[keep], Vh[keep]
    eye = torch.eye(min(m, n), dtype=w.dtype)
    return (w, eye) if n <= m else (eye, w)


def _kron(x: Tensor, y: Tensor) -> Tensor:
    """x (x) y of two matrices. (torch.kron fails on some strides of matrices with a side of 1.)"""
    return (x[:, None, :, None] * y[None, :, None]).flatten(2).flatten(0, 1)


def _truncated_kron(first: Pair, second: Pair, rank: int) -> tuple[Tensor, Tensor, float]:
    """The `rank` largest singular triples of first (x) second, which are products of theirs; and the error."""
    (U1, V1), (U2, V2) = (gl.canonical(left, right.T) for left, right in (first, second))
    # Columns of canonical pairs are singular vectors times the root of the singular value.
    S = torch.outer(U1.square().sum(0), U2.square().sum(0)).flatten()
    top = S.topk(min(rank, len(S))).indices
    i, j = top // U2.shape[1], top % U2.shape[1]
    B = (U1[:, None, i] * U2[None, :, j]).flatten(0, 1)  # (out, rank)
    A = (V1[:, None, i] * V2[None, :, j]).flatten(0, 1).T  # (rank, in)
    rest = S.clone()
    rest[top] = 0
    size = float(torch.linalg.vector_norm(S))
    return B, A, float(torch.linalg.vector_norm(rest)) / size if size else 0.0


def _convolved(made: dict[str, tuple[Pair, tuple[int, ...], float]], base: str | None) -> bool:
    """Whether the attention's projections are 1x1 convolutions: SD 1, told by its text encoder's width."""
    if base is not None:
        return base == "sd1"
    widths = {
        pair[1].shape[1]
        for name, (pair, _, _) in made.items()
        if name.endswith((".attn2.to_k", ".attn2.to_v"))
    }
    return 768 in widths and not any(names.component(n) == "text_encoder_2" for n in made)
