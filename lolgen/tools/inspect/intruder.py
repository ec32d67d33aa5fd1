"""Intruder dimensions: what full fine-tuning does not do to a weight, and LoRA often does (arXiv 2410.21228).

Of W = W0 + delta W, a left singular vector among the top k is an intruder when its cosine with every left singular
vector of W0 is below a threshold. How many there are says how far the adapter moved the base's own directions.

Neither W nor an SVD of (out, in) is formed. With W0 = P S Q^T, out <= in and delta W = U V^T, the matrix
P^T W W^T P = S^2 + C a^T + a C^T + a (V^T V) a^T, where a = P^T U and C = P^T (W0 V), is (out, out); its top
eigenvectors are the left singular vectors of W in the basis P, so the cosines with those of W0 are simply their
entries. P and S^2 come from one eigenproblem of W0 W0^T, which serves every adapter of the run. Where out > in the
same is done on the right: Q^T W^T W Q (in, in) gives right vectors z, and W z / sigma the left ones. All in float64,
where squaring the singular values costs nothing that the base's own float32 had. A full symmetric eigenproblem of
min(out, in) is exact and misses no vector, unlike an iteration for the top k alone; it costs about half of an SVD.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lolgen.errors import LolgenError
from lolgen.lora import ModuleSpec
from lolgen.tools.inspect.basefolder import BaseFolder
from lolgen.tools.inspect.source import Source

MOST = 20


@dataclass(frozen=True)
class Spectrum:
    """W0 (out, in) float64 and the eigenpairs of its smaller Gram matrix: `vectors` (n, n) by column, ascending
    `squares` (n,), n = min(out, in); `left`, whether they are left singular vectors."""

    W0: Tensor
    squares: Tensor
    vectors: Tensor
    left: bool


def spectrum(W0: Tensor) -> Spectrum:
    """Of a base's weight (out, in), finite."""
    W = W0.double()
    left = W.shape[0] <= W.shape[1]
    squares, vectors = torch.linalg.eigh(W @ W.mT if left else W.mT @ W)
    return Spectrum(W, squares.clamp(min=0), vectors, left)


def largest_cosines(base: Spectrum, U: Tensor, V: Tensor, k: int) -> Tensor:
    """For the top min(k, out, in) left singular vectors of W0 + U V^T, largest first: the largest |cosine| with a
    left singular vector of W0, (k,). U (out, r), V (in, r), float64."""
    if not base.left:
        return _from_the_right(base, U, V, k)
    P = base.vectors
    a, C = P.mT @ U, P.mT @ (base.W0 @ V)  # (out, r)
    T = torch.diag(base.squares) + C @ a.mT + a @ C.mT + a @ (V.mT @ V) @ a.mT
    top = torch.linalg.eigh(T).eigenvectors.flip(-1)[:, :k]
    return top.abs().amax(0)


def _from_the_right(base: Spectrum, U: Tensor, V: Tensor, k: int) -> Tensor:
    Q = base.vectors
    b, C = Q.mT @ V, Q.mT @ (base.W0.mT @ U)  # (in, r)
    T = torch.diag(base.squares) + C @ b.mT + b @ C.mT + b @ (U.mT @ U) @ b.mT
    z = Q @ torch.linalg.eigh(T).eigenvectors.flip(-1)[:, :k]
    y = base.W0 @ z + U @ (V.mT @ z)  # sigma times the left vectors, (out, k)
    y = y / torch.linalg.vector_norm(y, dim=0).clamp(min=torch.finfo(y.dtype).tiny)
    sizes = base.squares.sqrt()
    alive = sizes > sizes[-1] * torch.finfo(torch.float64).eps ** 0.5
    P = (base.W0 @ Q[:, alive]) / sizes[alive]
    return (P.mT @ y).abs().amax(0) if P.shape[1] else torch.zeros(y.shape[1], dtype=y.dtype)


@dataclass
class Counts:
    """Intruders of each file, by its path."""

    folder: str
    threshold: float
    k: int
    found: dict[str, dict[str, int]] = field(default_factory=dict)
    missing: dict[str, list[str]] = field(default_factory=dict)

    def of(self, path: str) -> dict[str, Any] | None:
        """For a report; None for a file that did not load."""
        if path not in self.found:
            return None
        counts, missing = self.found[path], self.missing[path]
        worst = sorted((n for n in counts if counts[n]), key=lambda n: -counts[n])[:MOST]
        return {
            "base": self.folder,
            "threshold": self.threshold,
            "k": self.k,
            "count": sum(counts.values()),
            "modules": len(counts),
            "modules_with_any": sum(c > 0 for c in counts.values()),
            "worst": [{"name": n, "count": counts[n]} for n in worst],
            "not_compared": {"count": len(missing), "first": missing[:MOST]},
        }


@torch.no_grad()
def count(sources: Iterable[Source], folder: str | Path, *, threshold: float = 0.5, k: int = 10) -> Counts:
    """Intruder dimensions of every source against a base, module by module: each weight of the base is read, and
    its eigenproblem solved, once. LolgenError when no module is in the base."""
    if not 0 < threshold <= 1:
        raise LolgenError(f"--threshold: found {threshold:g}, wanted a cosine above 0 and at most 1")
    if k < 1:
        raise LolgenError(f"--k: found {k}, wanted 1 or more")
    base = BaseFolder(folder)
    found = Counts(str(folder), threshold, k)
    by_module: dict[ModuleSpec, list[Source]] = {}
    for source in sources:
        found.found[str(source.path)], found.missing[str(source.path)] = {}, []
        for module in source.lora.spec if source.lora else ():
            by_module.setdefault(module, []).append(source)
    for module, wanted in tqdm(by_module.items(), desc="intruders", unit="module", leave=False, disable=None):
        W0 = base.weight(module)
        here = spectrum(W0) if W0 is not None and bool(torch.isfinite(W0.sum())) else None
        for source in wanted:
            assert source.lora is not None
            path = str(source.path)
            if here is None:
                found.missing[path].append(module.name)
                continue
            f = source.lora[module.name]
            cosines = largest_cosines(here, f.B.double() * f.scale, f.V.double(), k)
            found.found[path][module.name] = int((cosines < threshold).sum())
    if by_module and not any(found.found.values()):
        name = next(iter(by_module)).name
        raise LolgenError(
            f"{folder}: found none of the adapter's modules (e.g. {name}); wanted the base it is for"
        )
    return found
