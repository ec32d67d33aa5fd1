"""Modules that one layout fuses and another splits: factor pairs taken apart and put together, exactly.

A fused module's rows are its parts' rows, one below the other. Taken apart, the parts share A and slice B. Put
together, parts whose A has the same rows keep sharing them; other rows stand below one another, with a B that is
zero outside its part's rows, so that the rank is at most the sum of the parts' ranks. Where the A's span the same
space without being the same (a gauge apart), the fused module takes the smaller rank, found from orthonormal bases
of the parts' own row spaces, if that costs no part more than `TOLERANCE` of its
delta W.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lolgen.errors import FormatError
from lolgen.io import keys, names
from lolgen.io.families import LAYOUTS
from lolgen.io.families.layout import Layout
from lolgen.io.safetensors_file import Path_
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec

TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-7}
"""The relative error of a part's delta W for which a fused module may take a smaller rank: a few roundings of the
factors' dtype (of float32 for half precision, which is not recomputed unless it is exact to that)."""


@dataclass(frozen=True)
class Fused:
    """What became of some modules: `name` in the file, the `parts` in it, their `ranks`, its `rank`, and the largest
    relative `error` of a part's delta W (0: the same numbers)."""

    name: str
    parts: tuple[str, ...]
    ranks: tuple[int, ...]
    rank: int
    error: float


def split(
    file: Path_, module: ModuleSpec, factors: Factors, extras: dict[str, Tensor]
) -> dict[str, tuple[ModuleSpec, Factors]]:
    """The modules of ours that a pending module (`names.pending`) is, with its biases and magnitudes.

    Columns of B that are zero in all rows of a part are left out of it, with A's rows, and a part that is zero
    alone is left out itself: so are the parts of a fused module written that the adapter leaves alone.
    FormatError when the rows cannot be cut into the parts.
    """
    waiting = names.pending(module.name)
    assert waiting is not None
    family, path = waiting
    layout = LAYOUTS[family]
    parts = [f"transformer.{p}" for p in layout.parts(path)]
    if layout.swaps(path, module.out, module.in_):
        factors = Factors(_swapped(factors.B), factors.A, factors.scale)
    counts = [module.out] if len(parts) == 1 else layout.rows(path, module.out, module.in_)
    if counts is None:
        raise FormatError(
            file,
            key=path,
            found=f"delta W of shape {module.shape}",
            wanted=f"rows for {', '.join(layout.parts(path))}",
            remedy=f"the file is not of a {family} model, or it is damaged",
        )
    _split_extras(file, module, parts, counts, extras, layout.swaps(path, module.out, module.in_))
    found = {}
    # A part that is zero but has a magnitude is not what it would be without an adapter.
    alone = not factors.B.any() or f"{parts[0]}.{keys.MAGNITUDE}" in extras
    for name, B in zip(parts, factors.B.split(counts), strict=True):
        used = B.ne(0).any(0)
        if not used.any() and not alone and len(parts) > 1:
            continue
        B, A = (B, factors.A) if alone or used.all() else (B[:, used], factors.A[used])
        spec = ModuleSpec(name, B.shape[0], module.in_, module.kernel, module.kind)
        found[name] = spec, Factors(B.contiguous(), A, factors.scale)
    return found


def fuse(file: Path_, lora: LoRA, family: str) -> tuple[LoRA, list[Fused]]:
    """The LoRA with the transformer's modules as `family`'s original layout has them, and what was fused.

    Modules that are one to one keep our names; the others are pending. Extras of parts go with them.
    """
    layout = LAYOUTS[family]
    groups: dict[str, list[str]] = {}
    for name in lora.names:
        found = layout.original(name[len("transformer.") :]) if name.startswith("transformer.") else None
        plain = found is None or layout.plain(found[0])
        groups.setdefault(name if plain or found is None else f"{family}:{found[0]}", []).append(name)
    specs, factors, extras, report = [], {}, dict(lora.extras), []
    for name, members in groups.items():
        if names.pending(name) is None:
            specs.append(lora.spec[name])
            factors[name] = lora[name]
            continue
        path = name.partition(":")[2]
        parts = [f"transformer.{p}" for p in layout.parts(path)]
        if len(parts) == 1:
            module, pair = lora.spec[members[0]], lora[members[0]]
            if layout.swaps(path, module.out, module.in_):
                pair = Factors(_swapped(pair.B), pair.A, pair.scale)
            error = 0.0
        else:
            pair, error = _stack(file, layout, lora, parts)
        module = ModuleSpec(name, pair.B.shape[0], pair.A.shape[1])
        _fuse_extras(file, lora, module, parts, extras, layout.swaps(path, module.out, module.in_))
        specs.append(module)
        factors[name] = pair
        if len(parts) > 1:
            ranks = tuple(lora[m].rank for m in members)
            report.append(Fused(path, tuple(members), ranks, pair.rank, error))
    return LoRA(Spec(tuple(specs)), factors, lora.metadata, extras), report


def _stack(file: Path_, layout: Layout, lora: LoRA, parts: list[str]) -> tuple[Factors, float]:
    """(fused pair, largest relative error of a part)."""
    there = [p for p in parts if p in lora.spec]
    in_ = lora.spec[there[0]].in_
    for name in there:
        module = lora.spec[name]
        if module.in_ != in_ or module.kind != "linear":
            raise FormatError(
                file,
                key=name,
                found=f"a {module.kind} module of shape {module.shape}",
                wanted=f"a linear one with {in_} inputs, as {there[0]} has: one module holds both",
                remedy="save as diffusers instead",
            )
    counts = [lora.spec[p].out if p in there else layout.missing_rows(p, in_) for p in parts]
    compact = _compact([lora[p] for p in there])
    error, pieces = 0.0, _shared([lora[p] for p in there])
    if compact is not None and compact[0].shape[0] < pieces[0].shape[0]:
        error, pieces = compact[2], compact[:2]
    A, columns = pieces
    blocks = dict(zip(there, columns, strict=True))
    B = torch.cat(
        [blocks[p] if p in blocks else A.new_zeros(n, len(A)) for p, n in zip(parts, counts, strict=True)]
    )
    return Factors(B, A), error


def _shared(pairs: list[Factors]) -> tuple[Tensor, list[Tensor]]:
    """(A of all rows, each once; B of each part over them): the same numbers; rows equal bit for bit are shared."""
    dtype = _dtype(pairs)
    place: dict[tuple[bytes, int], int] = {}
    rows: list[Tensor] = []
    index = []
    for pair in pairs:
        seen: dict[bytes, int] = {}
        at = []
        for row in pair.A.to(dtype):
            data = row.contiguous().view(torch.uint8).numpy().tobytes()
            seen[data] = seen.get(data, -1) + 1
            if (data, seen[data]) not in place:
                place[data, seen[data]] = len(rows)
                rows.append(row)
            at.append(place[data, seen[data]])
        index.append(at)
    columns = []
    for pair, at in zip(pairs, index, strict=True):
        B = pair.B.new_zeros(len(pair.B), len(rows), dtype=dtype)
        B[:, at] = _scaled(pair, dtype)
        columns.append(B)
    return torch.stack(rows), columns


def _compact(pairs: list[Factors]) -> tuple[Tensor, list[Tensor], float] | None:
    """The same over one basis of the space that the parts' delta W read, and the largest relative error of a part;
    None where that space is larger than the largest part's, or it costs more than TOLERANCE."""
    # The numbers are new ones, which half precision would round.
    dtype = torch.promote_types(_dtype(pairs), torch.float32)
    bases, left = [], []
    for pair in pairs:
        Q, R = torch.linalg.qr(pair.A.double().T)  # (in, r), (r, r)
        U, S, Wh = torch.linalg.svd(_scaled(pair, torch.float64) @ R.mT, full_matrices=False)
        keep = 1e-9 * S[:1] < S  # what is below is rounding, a hundredth of TOLERANCE
        bases.append(Q @ Wh.mT[:, keep])  # orthonormal: every direction that the part reads weighs the same
        left.append(U[:, keep] * S[keep])
    stacked = torch.cat(bases, 1)  # (in, sum of ranks)
    if not stacked.shape[1]:
        return None
    Q, R = torch.linalg.qr(stacked)
    X, S, _ = torch.linalg.svd(R)
    rank = int((1e-3 * S[0] < S).sum())
    # Spaces that overlap in part stay below one another: taken apart again, each part has its own rank back.
    if rank > max(basis.shape[1] for basis in bases):
        return None
    common = Q @ X[:, :rank]  # (in, rank)
    worst, columns = 0.0, []
    for basis, U in zip(bases, left, strict=True):
        inside = basis.mT @ common
        missed = U @ (basis.mT - inside @ common.mT)
        size = float(torch.linalg.vector_norm(U))
        worst = max(worst, float(torch.linalg.vector_norm(missed)) / size if size else 0.0)
        columns.append((U @ inside).to(dtype))
    return (common.mT.contiguous().to(dtype), columns, worst) if worst <= TOLERANCE[dtype] else None


def _dtype(pairs: list[Factors]) -> torch.dtype:
    dtype = torch.promote_types(pairs[0].A.dtype, pairs[0].B.dtype)
    for pair in pairs:
        dtype = torch.promote_types(dtype, torch.promote_types(pair.A.dtype, pair.B.dtype))
    # A scale goes into B here, which half precision would round.
    return torch.promote_types(dtype, torch.float32) if any(p.scale != 1 for p in pairs) else dtype


def _scaled(pair: Factors, dtype: torch.dtype) -> Tensor:
    return (pair.B.double() * pair.scale).to(dtype) if pair.scale != 1 else pair.B.to(dtype)


def _swapped(rows: Tensor) -> Tensor:
    """The two halves of the rows in the other order: (shift, scale) and (scale, shift)."""
    return torch.cat(rows.chunk(2)[::-1])


def _split_extras(
    file: Path_,
    module: ModuleSpec,
    parts: list[str],
    counts: list[int],
    extras: dict[str, Tensor],
    swap: bool,
) -> None:
    for what in (keys.MAGNITUDE, keys.BIAS):
        tensor = extras.pop(f"{module.name}.{what}", None)
        if tensor is None:
            continue
        if not tensor.ndim or len(tensor) != sum(counts):
            raise FormatError(
                file,
                key=f"{module.name}.{what}",
                found=f"shape {tuple(tensor.shape)}",
                wanted=f"{sum(counts)} rows, one for each of the module",
                remedy="the file is damaged: download or save it again",
            )
        rows = _swapped(tensor) if swap else tensor
        for part, piece in zip(parts, rows.split(counts), strict=True):
            extras[f"{part}.{what}"] = piece.contiguous()


def _fuse_extras(
    file: Path_, lora: LoRA, module: ModuleSpec, parts: list[str], extras: dict[str, Tensor], swap: bool
) -> None:
    for what in (keys.MAGNITUDE, keys.BIAS):
        pieces: Mapping[str, Tensor] = {
            p: extras.pop(f"{p}.{what}") for p in parts if f"{p}.{what}" in extras
        }
        if not pieces:
            continue
        if len(pieces) < len(parts) or any(p not in lora.spec for p in parts):
            missing = next(p for p in parts if p not in pieces or p not in lora.spec)
            raise FormatError(
                file,
                key=f"{missing}.{what}",
                found="none, beside modules with one that a fused module holds too",
                wanted="one for every part of it",
                remedy="save as diffusers instead",
            )
        rows = torch.cat([pieces[p].reshape(-1) for p in parts])
        extras[f"{module.name}.{what}"] = _swapped(rows) if swap else rows
