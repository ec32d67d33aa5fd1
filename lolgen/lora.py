"""The core types: a LoRA, the spec of the base model it is for, and a batch of LoRAs on one spec.

A LoRA is named modules, each with a factor pair and a scale: `delta W = scale * B @ A`. With the paper's
letters (arXiv 2410.04207) `U = scale * B` and `V = A.T`, so `delta W = U V^T`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite, prod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from lolgen.errors import ShapeError, SpecError

KINDS: tuple[str, ...] = ("linear", "conv", "embedding")


@dataclass(frozen=True, slots=True)
class ModuleSpec:
    """One adapted module of a base model.

    `out`, `in_`: output and input features (channels of a conv; `in_` is per group of a grouped conv).
    `kernel`: spatial sizes of a conv, `(3, 3)`; empty for the other kinds.
    `kind`: "linear", "conv" or "embedding". An embedding has `out` = embedding dim and `in_` = number of
    embeddings: the weight's own delta is the transpose of ours, `(scale * B @ A).T`.

    Raises SpecError for an unknown kind, sizes below 1, or a kernel that does not go with the kind.
    """

    name: str
    out: int
    in_: int
    kernel: tuple[int, ...] = ()
    kind: str = "linear"

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise SpecError(
                f"module {self.name!r}: found kind {self.kind!r}, wanted one of {', '.join(KINDS)}"
            )
        object.__setattr__(self, "kernel", tuple(self.kernel))
        if min(self.out, self.in_, *self.kernel) < 1:
            raise SpecError(
                f"module {self.name!r}: found out {self.out}, in {self.in_}, kernel {self.kernel}, "
                "wanted sizes of 1 or more"
            )
        if (self.kind == "conv") != bool(self.kernel):
            raise SpecError(
                f"module {self.name!r}: found kernel {self.kernel} with kind {self.kind!r}; "
                "a conv has one, the other kinds have none"
            )

    @property
    def in_flat(self) -> int:
        """Columns of delta W: `in_` times the kernel's size."""
        return self.in_ * prod(self.kernel)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in_flat), the shape of delta W."""
        return self.out, self.in_flat


Groups = tuple[tuple[tuple[int, int], tuple[int, ...]], ...]


@dataclass(frozen=True)
class Spec:
    """The ordered modules of a base model: its signature. Rank is not part of it.

    Raises SpecError when two modules share a name.
    """

    modules: tuple[ModuleSpec, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "modules", tuple(self.modules))
        if len(self._position) < len(self.modules):
            names = self.names
            twice = sorted({n for n in names if names.count(n) > 1})
            raise SpecError(f"modules named more than once: {', '.join(twice)}")

    @cached_property
    def names(self) -> tuple[str, ...]:
        return tuple(m.name for m in self.modules)

    @cached_property
    def _position(self) -> dict[str, int]:
        return {m.name: i for i, m in enumerate(self.modules)}

    @cached_property
    def groups(self) -> Groups:
        """((out, in_flat), positions of the modules of that shape), in order of first appearance."""
        found: dict[tuple[int, int], list[int]] = {}
        for i, module in enumerate(self.modules):
            found.setdefault(module.shape, []).append(i)
        return tuple((shape, tuple(index)) for shape, index in found.items())

    def __len__(self) -> int:
        return len(self.modules)

    def __iter__(self) -> Iterator[ModuleSpec]:
        return iter(self.modules)

    def __contains__(self, name: object) -> bool:
        return name in self._position

    def __getitem__(self, key: int | str) -> ModuleSpec:
        """By position or by name; KeyError for a name that is not there."""
        return self.modules[self.index(key) if isinstance(key, str) else key]

    def index(self, name: str) -> int:
        """Position of a module; KeyError for a name that is not there."""
        return self._position[name]

    def to_json(self) -> str:
        """One line of JSON, the same for equal specs; `from_json` reads it back."""
        rows = [
            {"name": m.name, "out": m.out, "in": m.in_, "kernel": list(m.kernel), "kind": m.kind}
            for m in self.modules
        ]
        return json.dumps({"modules": rows}, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Spec:
        """The spec that `to_json` wrote. SpecError when the text is not one."""
        try:
            rows = json.loads(text)["modules"]
            return cls(
                tuple(
                    ModuleSpec(
                        str(r["name"]),
                        int(r["out"]),
                        int(r["in"]),
                        tuple(map(int, r["kernel"])),
                        str(r["kind"]),
                    )
                    for r in rows
                )
            )
        except (ValueError, KeyError, TypeError) as error:
            raise SpecError(f"not the JSON of a spec: {type(error).__name__}: {error}") from error

    def fingerprint(self) -> str:
        """sha256 (hex) of the names, shapes, kinds and their order."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()


@dataclass(frozen=True, eq=False)
class Factors:
    """A module's factor pair: `B (out, rank)`, `A (rank, in_flat)`, and the scale (mostly alpha / rank)."""

    B: Tensor
    A: Tensor
    scale: float = 1.0

    @property
    def rank(self) -> int:
        return self.B.shape[1]

    @property
    def U(self) -> Tensor:
        """(out, rank), the scale folded in."""
        return self.B * self.scale if self.scale != 1 else self.B

    @property
    def V(self) -> Tensor:
        """(in_flat, rank)."""
        return self.A.T

    def delta(self) -> Tensor:
        """delta W = scale * B @ A (out, in_flat), formed in full: for tests and the dense baseline only."""
        return self.U @ self.A

    def to(self, *args: Any, **kwargs: Any) -> Factors:
        """As `Tensor.to`, on both factors."""
        return Factors(self.B.to(*args, **kwargs), self.A.to(*args, **kwargs), self.scale)


@dataclass(eq=False)
class LoRA:
    """A spec and a factor pair for every module of it.

    `factors`: one per module of the spec, ranks of at least 1, each its own (a zero module has zero factors);
    kept in the spec's order. `metadata`: the header strings of the file it came from. `extras`: tensors that
    are carried through unchanged (DoRA magnitudes, modules_to_save).

    Raises SpecError when the names are not the spec's, ShapeError when a factor does not fit its module.
    """

    spec: Spec
    factors: dict[str, Factors]
    metadata: dict[str, str] = field(default_factory=dict)
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        missing = [n for n in self.spec.names if n not in self.factors]
        unknown = [n for n in self.factors if n not in self.spec]
        if missing or unknown:
            raise SpecError(
                f"factors do not match the spec: missing {_some(missing)}; not in the spec {_some(unknown)}"
            )
        for module in self.spec:
            _check(module, self.factors[module.name])
        self.factors = {n: self.factors[n] for n in self.spec.names}

    @property
    def names(self) -> tuple[str, ...]:
        return self.spec.names

    @property
    def ranks(self) -> dict[str, int]:
        return {n: f.rank for n, f in self.factors.items()}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that holds every factor (they may differ); float32 without modules."""
        dtypes = [t.dtype for f in self.factors.values() for t in (f.B, f.A)]
        found = dtypes[0] if dtypes else torch.float32
        for dtype in dtypes[1:]:
            found = torch.promote_types(found, dtype)
        return found

    def __len__(self) -> int:
        return len(self.spec)

    def __getitem__(self, name: str) -> Factors:
        return self.factors[name]

    def to(self, *args: Any, **kwargs: Any) -> LoRA:
        """As `Tensor.to` (a dtype, a device), on the factors; extras stay as they are."""
        return self.replace({n: f.to(*args, **kwargs) for n, f in self.factors.items()})

    def replace(self, factors: Mapping[str, Factors]) -> LoRA:
        """The same LoRA with other factors; metadata and extras are kept."""
        return LoRA(self.spec, dict(factors), dict(self.metadata), dict(self.extras))


@dataclass(eq=False)
class Group:
    """The modules of one shape in a batch: `index`, their M positions in the spec;
    `U` (N, M, out, r) and `V` (N, M, in_flat, r), scale folded into U."""

    index: tuple[int, ...]
    U: Tensor
    V: Tensor


@dataclass(eq=False)
class Batch:
    """N LoRAs on one spec, modules grouped by shape, so that no operation loops over LoRAs.

    `groups`: as `spec.groups`, all padded to one rank r. `ranks` (N, n_modules) long: the true ranks; columns
    of U and V at or past a module's rank are zero. Metadata and extras of the LoRAs are not kept.

    Raises ShapeError when a tensor does not fit the spec.
    """

    spec: Spec
    groups: list[Group]
    ranks: Tensor

    def __post_init__(self) -> None:
        if tuple(g.index for g in self.groups) != tuple(index for _, index in self.spec.groups):
            raise SpecError("the groups of a batch must be those of its spec, in order")
        N, r = len(self.ranks), self.rank
        if tuple(self.ranks.shape) != (N, len(self.spec)):
            raise ShapeError(f"ranks: found {tuple(self.ranks.shape)}, wanted {(N, len(self.spec))}")
        for (shape, index), group in zip(self.spec.groups, self.groups, strict=True):
            for letter, tensor, size in (("U", group.U, shape[0]), ("V", group.V, shape[1])):
                wanted = (N, len(index), size, r)
                if tuple(tensor.shape) != wanted:
                    first = self.spec[index[0]].name
                    raise ShapeError(
                        f"{letter} of the group of module {first!r}: "
                        f"found {tuple(tensor.shape)}, wanted {wanted}"
                    )

    @classmethod
    def stack(cls, loras: Sequence[LoRA], dtype: torch.dtype = torch.float32) -> Batch:
        """N >= 1 LoRAs of any ranks as one batch of `dtype`, on the device of the first.

        SpecError when the specs differ, or when there is no LoRA.
        """
        if not loras:
            raise SpecError("a batch is stacked from at least one LoRA: an empty list has no spec")
        spec = loras[0].spec
        for i, lora in enumerate(loras):
            if lora.spec != spec:
                raise SpecError(f"LoRA {i} has another spec than LoRA 0: {_difference(spec, lora.spec)}")
        names = spec.names
        ranks = torch.tensor([[lora.factors[n].rank for n in names] for lora in loras], dtype=torch.long)
        ranks = ranks.reshape(len(loras), len(names))
        r = int(ranks.max()) if names else 0
        device = loras[0].factors[names[0]].B.device if names else torch.device("cpu")
        groups = []
        for (out, in_flat), index in spec.groups:
            U = torch.zeros(len(loras), len(index), out, r, dtype=dtype, device=device)
            V = torch.zeros(len(loras), len(index), in_flat, r, dtype=dtype, device=device)
            for i, lora in enumerate(loras):
                for j, module in enumerate(index):
                    factors = lora.factors[names[module]]
                    # The scale is applied after the cast, so that a half-precision file loses nothing more.
                    U[i, j, :, : factors.rank] = factors.B.to(U) * factors.scale
                    V[i, j, :, : factors.rank] = factors.V
            groups.append(Group(index, U, V))
        return cls(spec, groups, ranks.to(device))

    def unstack(self) -> list[LoRA]:
        """The N LoRAs at their true ranks, with scale 1."""
        names = self.spec.names
        place = {m: (g, j) for g in self.groups for j, m in enumerate(g.index)}
        loras = []
        for i, ranks in enumerate(self.ranks.tolist()):
            factors = {}
            for m, rank in enumerate(ranks):
                group, j = place[m]
                # Copies, so that one LoRA kept alive doesn't keep the whole batch.
                B = group.U[i, j, :, :rank].clone(memory_format=torch.contiguous_format)
                A = group.V[i, j, :, :rank].T.clone(memory_format=torch.contiguous_format)
                factors[names[m]] = Factors(B, A)
            loras.append(LoRA(self.spec, factors))
        return loras

    @classmethod
    def cat(cls, batches: Sequence[Batch]) -> Batch:
        """Batches one after the other, at the largest r. SpecError when specs differ or there is none."""
        if not batches:
            raise SpecError("no batch to concatenate: an empty list has no spec")
        spec = batches[0].spec
        for i, batch in enumerate(batches):
            if batch.spec != spec:
                raise SpecError(f"batch {i} has another spec than batch 0: {_difference(spec, batch.spec)}")
        r = max(b.rank for b in batches)
        padded = [b.padded(r) for b in batches]
        groups = [
            Group(
                index, torch.cat([b.groups[k].U for b in padded]), torch.cat([b.groups[k].V for b in padded])
            )
            for k, (_, index) in enumerate(spec.groups)
        ]
        return cls(spec, groups, torch.cat([b.ranks for b in padded]))

    def padded(self, r: int) -> Batch:
        """The same LoRAs padded with zero columns to rank r. ShapeError when r is below a true rank."""
        if self.ranks.numel() and r < int(self.ranks.max()):
            raise ShapeError(
                f"cannot pad to rank {r}: the batch holds a module of rank {int(self.ranks.max())}"
            )
        if not self.groups:
            return self
        more = r - self.rank
        # A negative pad crops, and only ever crops columns that are zero.
        return self.map(lambda U, V: (pad(U, (0, more)), pad(V, (0, more))))

    def __len__(self) -> int:
        return len(self.ranks)

    def __getitem__(self, key: int | slice | Sequence[int] | Tensor) -> Batch:
        """LoRAs by position, slice, list or tensor of positions, or N booleans; always a batch."""
        if isinstance(key, int):
            if not -len(self) <= key < len(self):
                raise IndexError(f"LoRA {key} of a batch of {len(self)}")
            key = slice(key % len(self), key % len(self) + 1)
        elif not isinstance(key, slice):
            key = torch.as_tensor(key, device=self.ranks.device)
            key = key.reshape(-1) if key.dtype == torch.bool else key.reshape(-1).long()
        return Batch(self.spec, [Group(g.index, g.U[key], g.V[key]) for g in self.groups], self.ranks[key])

    def to(self, *args: Any, **kwargs: Any) -> Batch:
        """As `Tensor.to` (a dtype, a device); the ranks stay long."""
        groups = [Group(g.index, g.U.to(*args, **kwargs), g.V.to(*args, **kwargs)) for g in self.groups]
        return Batch(self.spec, groups, self.ranks.to(groups[0].U.device if groups else self.ranks.device))

    @property
    def rank(self) -> int:
        """r, the rank that every module is padded to; 0 without modules."""
        return self.groups[0].U.shape[-1] if self.groups else 0

    @property
    def dtype(self) -> torch.dtype:
        return self.groups[0].U.dtype if self.groups else torch.float32

    @property
    def device(self) -> torch.device:
        return self.ranks.device

    def mask(self, group: Group) -> Tensor:
        """(N, M, r) bool: which columns of the group are within their module's rank."""
        ranks = self.ranks[:, list(group.index)]  # (N, M)
        return torch.arange(group.U.shape[-1], device=ranks.device) < ranks[..., None]

    def map(
        self, fn: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]], ranks: Tensor | None = None
    ) -> Batch:
        """`fn(U, V) -> (U, V)` on every group, U (N, M, out, r) and V (N, M, in_flat, r).

        `ranks` (N, n_modules): the true ranks afterwards, if they change. `fn` must leave columns at or past
        the true rank zero; `masked` clears what rounding left there.
        """
        groups = [Group(g.index, *fn(g.U, g.V)) for g in self.groups]
        return Batch(self.spec, groups, self.ranks if ranks is None else ranks)

    def masked(self) -> Batch:
        """The batch with every column at or past its module's true rank set to zero."""
        groups = []
        for g in self.groups:
            outside = ~self.mask(g)[:, :, None]  # (N, M, 1, r)
            groups.append(Group(g.index, g.U.masked_fill(outside, 0), g.V.masked_fill(outside, 0)))
        return Batch(self.spec, groups, self.ranks)


def _check(module: ModuleSpec, factors: Factors) -> None:
    B, A = factors.B, factors.A
    rank = B.shape[-1] if B.ndim else 0
    found = f"found B {tuple(B.shape)}, A {tuple(A.shape)}"
    if (
        B.ndim != 2
        or A.ndim != 2
        or A.shape[0] != rank
        or (module.out, module.in_flat) != (B.shape[0], A.shape[1])
    ):
        raise ShapeError(
            f"module {module.name!r}: {found}, wanted B ({module.out}, rank), A (rank, {module.in_flat}); "
            "check that the file is for this base, and flatten a conv's kernel into A's columns"
        )
    if rank == 0:
        raise ShapeError(
            f"module {module.name!r}: {found}, wanted a rank of 1 or more; a zero module has zero factors"
        )
    if not (B.is_floating_point() and A.is_floating_point()):
        raise ShapeError(f"module {module.name!r}: found dtypes {B.dtype}, {A.dtype}, wanted floating point")
    if not isfinite(factors.scale):
        raise ShapeError(f"module {module.name!r}: found scale {factors.scale}, wanted a finite number")


def _some(names: Sequence[str], most: int = 5) -> str:
    if not names:
        return "none"
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def _difference(a: Spec, b: Spec) -> str:
    lost = [n for n in a.names if n not in b]
    new = [n for n in b.names if n not in a]
    if lost or new:
        return f"without {_some(lost)}; with {_some(new)}"
    changed = [f"{m.name} {b[m.name].shape} instead of {m.shape}" for m in a if b[m.name] != m]
    return _some(changed) if changed else "the same modules in another order"
