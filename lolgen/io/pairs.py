"""Factor pairs between a file's tensors and a LoRA: what every format shares."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor

from lolgen import gl
from lolgen.errors import FormatError
from lolgen.io import fused
from lolgen.io.names import natural, pending, with_component
from lolgen.io.safetensors_file import Path_, finite, not_finite
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
_EIGHT_BIT = (torch.float8_e4m3fn, torch.float8_e5m2)
_ROOM = 1 << 20  # numbers that a Tucker core's product may always have

Modules = Spec | Iterable[str]
Keyed = tuple[str, Tensor]

A_PART, B_PART = "A", "B"
_HALF = {A_PART: "down (A)", B_PART: "up (B)"}


@dataclass
class Halves:
    """What a file says of one module: (key, tensor) of A, of B and of a Tucker core; its kind, its scale."""

    parts: dict[str, Keyed] = field(default_factory=dict)
    embedding: bool = False
    scale: float = 1.0

    @property
    def rank(self) -> int:
        """Rows of A; 1 where A is missing or empty, which `build` reports."""
        A = self.parts[A_PART][1] if A_PART in self.parts else None
        return max(1, A.shape[0]) if A is not None and A.ndim else 1


class Collected(dict[str, Halves]):
    """Module name -> Halves; a part that comes twice is an error."""

    def __init__(self, file: Path_) -> None:
        super().__init__()
        self.file = file

    def put(self, name: str, part: str, key: str, tensor: Tensor, embedding: bool = False) -> None:
        halves = self.setdefault(name, Halves())
        if part in halves.parts:
            raise FormatError(
                self.file,
                key=key,
                found=f"a second {part} for module {name} beside {halves.parts[part][0]!r}",
                wanted="one adapter, one spelling of each module",
                remedy="save each adapter to its own file",
            )
        halves.parts[part] = key, tensor
        halves.embedding |= embedding


def build(
    file: Path_,
    collected: Collected,
    metadata: dict[str, str],
    extras: dict[str, Tensor],
    modules: Modules | None = None,
) -> LoRA:
    """The LoRA of what was collected, modules in natural order of their names, or in the order of `modules`.

    A Spec as `modules` also decides what the shapes leave open: a 1x1 conv stored as a matrix. Pending modules
    are taken apart (`lolgen.io.fused.split`), with their extras.
    """
    specs: dict[str, ModuleSpec] = {}
    factors: dict[str, Factors] = {}
    origin: dict[str, str] = {}  # a key of each module's pair, for errors
    for name, halves in collected.items():
        spec, B, A = _pair(file, name, halves)
        key = next(iter(halves.parts.values()))[0]
        found = {name: (spec, Factors(B, A, halves.scale))}
        if pending(name):
            found = fused.split(file, spec, found[name][1], extras)
        for ours, (spec, pair) in found.items():
            if ours in specs:
                raise FormatError(
                    file,
                    key=key,
                    found=f"a second pair for module {ours} beside {origin[ours]!r}",
                    wanted="one adapter, one spelling of each module",
                    remedy="save each adapter to its own file",
                )
            specs[ours], factors[ours], origin[ours] = spec, pair, key
    specs = {name: specs[name] for name in sorted(specs, key=natural)}
    if modules is not None:
        specs = on_base(file, origin, specs, modules)
    return LoRA(Spec(tuple(specs.values())), factors, metadata, extras)


def on_base(
    file: Path_, origin: dict[str, str], specs: dict[str, ModuleSpec], modules: Modules
) -> dict[str, ModuleSpec]:
    """The specs of what the base has, in its order; FormatError for a module or a shape that it does not have."""
    base = {m.name: m for m in modules} if isinstance(modules, Spec) else {}
    order = [with_component(m) if isinstance(m, str) else m.name for m in modules]
    known = set(order)
    for name, module in specs.items():
        key = origin[name]
        if name not in known:
            raise FormatError(
                file,
                key=key,
                found=f"module {name}, which the base does not have",
                wanted="modules of the base that was named",
                remedy="check which base the adapter was trained on",
            )
        if name in base:
            if base[name].shape != module.shape:
                raise FormatError(
                    file,
                    key=key,
                    found=f"delta W of shape {module.shape}",
                    wanted=f"{base[name].shape} for {name}",
                    remedy="check which base the adapter was trained on",
                )
            specs[name] = base[name]
    return {name: specs[name] for name in dict.fromkeys(order) if name in specs}


def _pair(file: Path_, name: str, halves: Halves) -> tuple[ModuleSpec, Tensor, Tensor]:
    """(spec, B (out, r), A (r, in_flat)) of one module, after every check."""
    parts = halves.parts
    for here, there in ((A_PART, B_PART), (B_PART, A_PART)):
        if there not in parts:
            key = parts[here][0] if here in parts else next(iter(parts.values()))[0]
            raise FormatError(
                file,
                key=key,
                found=f"module {name} without its {_HALF[there]} half",
                wanted="both halves of the pair",
                remedy="the file is incomplete: download or save it again",
            )
    for key, tensor in parts.values():
        if tensor.dtype not in DTYPES + _EIGHT_BIT:
            raise FormatError(
                file,
                key=key,
                found=f"dtype {tensor.dtype}".replace("torch.", ""),
                wanted="float32, float16, bfloat16 or float64",
                remedy="save the adapter unquantised",
            )
        if not tensor.numel():
            raise FormatError(
                file,
                key=key,
                found=f"shape {tuple(tensor.shape)}",
                wanted="a rank of 1 or more",
                remedy="an adapter saved from sharded training must be gathered first",
            )
    (a_key, A), (b_key, B) = parts[A_PART], parts[B_PART]
    # Every 8-bit float is exact in float16; arithmetic on them is not.
    A, B = (t.to(torch.float16) if t.dtype in _EIGHT_BIT else t for t in (A, B))

    def unfit(key: str, found: Tensor, wanted: str) -> FormatError:
        return FormatError(
            file,
            key=key,
            found=f"shape {tuple(found.shape)}",
            wanted=wanted,
            remedy=f"module {name}: the halves do not belong together; download or save the file again",
        )

    if A.ndim < 2 or (halves.embedding and A.ndim > 2):
        raise unfit(a_key, A, "(rank, in)" if A.ndim < 2 else "(rank, embeddings)")
    if "mid" in parts:
        mid_key, mid = parts["mid"]
        A = _tucker(mid_key, mid.to(torch.float16) if mid.dtype in _EIGHT_BIT else mid, A, unfit)
    rank = A.shape[0]
    spatial = A.ndim - 2
    ones = (1,) * (B.ndim - 2)
    other = bool(spatial and ones and len(ones) != spatial)
    if B.ndim < 2 or B.shape[1] != rank or tuple(B.shape[2:]) != ones or other:
        wanted = ", ".join(["out", str(rank), *["1"] * spatial])
        raise unfit(b_key, B, f"({wanted}) to go with {a_key!r} {tuple(A.shape)}")
    kernel = tuple(A.shape[2:]) or ones
    kind = "embedding" if halves.embedding else "conv" if kernel else "linear"
    spec = ModuleSpec(name, B.shape[0], A.shape[1], kernel, kind)
    return spec, B.reshape(B.shape[0], rank), A.reshape(rank, -1)


def _tucker(key: str, mid: Tensor, A: Tensor, unfit: Callable[[str, Tensor, str], FormatError]) -> Tensor:
    """A Tucker core (r, r', k, k) folded into the down half (r', in, 1, 1): A (r, in, k, k), exactly."""
    if mid.ndim < 3 or mid.shape[1] != A.shape[0] or any(n != 1 for n in A.shape[2:]):
        raise unfit(key, mid, f"(rank, {A.shape[0]}, k, k) to go with a 1x1 down half {tuple(A.shape)}")
    # Ordinary kernels are 3 x 3; a stranger's file must not grow a thousandfold.
    if mid.shape[0] * A.shape[1] * prod(mid.shape[2:]) > 16 * (mid.numel() + A.numel()) + _ROOM:
        raise unfit(key, mid, "a core whose product with the down half is not far larger than both")
    flat = mid.double().flatten(2)  # (r, r', kk)
    folded = torch.einsum("prk,ri->pik", flat, A.double().flatten(1))
    shape = (mid.shape[0], A.shape[1], *mid.shape[2:])
    return folded.reshape(shape).to(torch.promote_types(mid.dtype, A.dtype))


def baked(file: Path_, lora: LoRA, dtype: torch.dtype | None) -> dict[str, tuple[Tensor, Tensor]]:
    """name -> (B, A) with the scale inside, in `dtype` (None: each module's own), in the files' shapes:
    B (out, r) and A (r, in), or B (out, r, 1, 1) and A (r, in, k, k) for a conv.

    Where nothing needs rounding the numbers stay bit for bit. Before anything is rounded to half precision
    the pair is balanced (B^T B = A A^T): a badly conditioned gauge would lose delta W itself.
    """
    if dtype not in (None, *DTYPES):
        raise FormatError(
            file,
            found=f"dtype {dtype} asked for",
            wanted="float16, bfloat16, float32 or float64",
            remedy="choose one",
        )
    if not len(lora):
        raise FormatError(
            file, found="a LoRA with no module", wanted="at least one", remedy="nothing to save"
        )
    pairs = {}
    for module in lora.spec:
        factors = lora[module.name]
        for letter, tensor in (("B", factors.B), ("A", factors.A)):
            if not finite(tensor):
                raise not_finite(file, f"{module.name} {letter}", tensor)
        B, A = _bake(factors, dtype or torch.promote_types(factors.B.dtype, factors.A.dtype))
        if not (finite(B) and finite(A)):
            raise FormatError(
                file,
                key=module.name,
                found=f"numbers too large for {str(B.dtype).removeprefix('torch.')}",
                wanted="finite numbers",
                remedy="save in bfloat16 or float32",
            )
        ones = (1,) * len(module.kernel)
        pairs[module.name] = (
            B.reshape(module.out, -1, *ones).contiguous(),
            A.reshape(-1, module.in_, *module.kernel).contiguous(),
        )
    return pairs


def _bake(factors: Factors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    B, A, scale = factors.B.detach().cpu(), factors.A.detach().cpu(), factors.scale
    wide = torch.float64 if dtype in (*HALF, torch.float64) else torch.float32
    U, V = B.to(wide) * scale, A.to(wide).T
    rounded = U.to(dtype), A.to(dtype)
    if dtype in HALF and not (torch.equal(rounded[0].to(wide), U) and torch.equal(rounded[1].to(wide).T, V)):
        U, V = gl.balance(U, V)
        rounded = U.to(dtype), V.T.to(dtype)
    return rounded
