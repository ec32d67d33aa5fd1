"""Assertions about symmetry, to use in any test: equivariance and invariance under random gauges.

    assert_invariant(lambda x: head(encoder(x)), batch)
    assert_equivariant(layer, batch)
    with pytest.raises(AssertionError):
        assert_invariant(head, batch, off_group=True)  # the twin: the test itself can fail

Each runs `draws` gauges of condition 10 and as many of condition 1e4 (float32) or 1e6 (float64). The error
allowed is `slack * eps * condition`, relative to the size of each result: rounding in a gauge of condition c
costs eps * c, whatever the function. Raise `slack` for deep networks.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from lolgen import gl
from lolgen.lora import Batch, Factors, Group, LoRA, Spec

T = TypeVar("T", LoRA, Batch)

WELL = 10.0
BADLY = {torch.float32: 1e4, torch.float64: 1e6}
"""The two conditions that gauges are drawn with; the second depends on the dtype."""


def random_lora(
    spec: Spec,
    rank: int | Sequence[int] = 4,
    *,
    zero: Sequence[str] = (),
    scale: float = 1.0,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
) -> LoRA:
    """A LoRA with normal entries. `rank`: of all modules, or one each; `zero`: modules whose B is zero."""
    ranks = [rank] * len(spec) if isinstance(rank, int) else list(rank)
    factors = {}
    for module, r in zip(spec, ranks, strict=True):
        B = torch.randn(module.out, r, generator=generator, dtype=torch.float64) / r**0.5
        A = torch.randn(r, module.in_flat, generator=generator, dtype=torch.float64) / module.in_flat**0.5
        B = B * 0 if module.name in zero else B
        factors[module.name] = Factors(B.to(dtype), A.to(dtype), scale)
    return LoRA(spec, factors)


def regauge(
    x: T, *, condition: float = WELL, off_group: bool = False, generator: torch.Generator | None = None
) -> tuple[T, list[Tensor]]:
    """x in a random gauge of this condition, and the gauge of each module (of a batch: of each group).

    `off_group`: U gets g^-1 but V an independent h^T, which changes delta W. The gauges given are the g's.
    """
    if isinstance(x, Batch):
        gauges = gl.random_gauge_batch(x, condition=condition, generator=generator)
        moved = gl.act_batch(x, gauges)
        if off_group:
            others = gl.act_batch(x, gl.random_gauge_batch(x, condition=condition, generator=generator))
            pairs = zip(moved.groups, others.groups, strict=True)
            moved = Batch(x.spec, [Group(g.index, g.U, o.V) for g, o in pairs], x.ranks)
        return moved, gauges

    def draw() -> dict[str, Tensor]:
        return {
            n: gl.random_gauge(
                rank=f.rank, condition=condition, generator=generator, dtype=f.B.dtype, device=f.B.device
            )
            for n, f in x.factors.items()
        }

    g = draw()
    result = gl.act_lora(x, g)
    if off_group:
        other = gl.act_lora(x, draw())
        result = x.replace({n: Factors(f.B, other[n].A, f.scale) for n, f in result.factors.items()})
    return result, list(g.values())


def assert_equivariant(
    fn: Callable[[T], Any],
    x: T,
    *,
    draws: int = 2,
    conditions: Sequence[float] | None = None,
    slack: float = 50.0,
    off_group: bool = False,
    seed: int = 0,
) -> None:
    """Asserts fn(g x) = g fn(x) for random gauges g, one g per module.

    `fn` maps a batch to a batch, to latents [(U, V), ...] with one pair (N, M, any, r) per group of the
    input's spec, or a LoRA to a LoRA with the same names. `conditions` replaces the two of the module's
    text. `off_group`: V of the input moves by another matrix than g; a sound `fn` must fail.

    Raises AssertionError with the part of the result, its error and the error allowed.
    """
    with torch.no_grad():
        expected = fn(x)
        for condition, generator in _trials(x, draws, conditions, seed):
            moved, gauges = regauge(x, condition=condition, off_group=off_group, generator=generator)
            wanted = _pairs(expected, gauges)
            found = _pairs(fn(moved), None)
            if list(wanted) != list(found):
                raise AssertionError(
                    f"the result changed its parts: found {list(found)}, wanted {list(wanted)}"
                )
            for part, pair in wanted.items():
                for letter, w, f in zip("UV", pair, found[part], strict=True):
                    _close(f"{letter} of {part}", f, w, condition, slack, x.dtype)


def assert_invariant(
    fn: Callable[[T], Any],
    x: T,
    *,
    draws: int = 2,
    conditions: Sequence[float] | None = None,
    slack: float = 50.0,
    off_group: bool = False,
    seed: int = 0,
) -> None:
    """Asserts fn(g x) = fn(x) for random gauges g, one g per module.

    `fn` gives a tensor, a number, or tuples, lists and dicts of these; of a LoRA or a batch in its result
    only delta W is compared. `conditions` replaces the two of the module's text. `off_group`: V of the input
    moves by another matrix than g; a sound `fn` must fail.

    Raises AssertionError with the part of the result, its error and the error allowed.
    """
    with torch.no_grad():
        wanted = _leaves(fn(x))
        for condition, generator in _trials(x, draws, conditions, seed):
            moved, _ = regauge(x, condition=condition, off_group=off_group, generator=generator)
            found = _leaves(fn(moved))
            if list(wanted) != list(found):
                raise AssertionError(
                    f"the result changed its parts: found {list(found)}, wanted {list(wanted)}"
                )
            for part, w in wanted.items():
                f = found[part]
                if isinstance(w, Tensor) and isinstance(f, Tensor):
                    _close(part, f, w, condition, slack, x.dtype)
                elif isinstance(w, tuple) and isinstance(f, tuple):
                    error = _norm(*_difference(f, w)) / _norm(*w).clamp(min=torch.finfo(torch.float64).tiny)
                    _judge(part, float(error.max()) if error.numel() else 0.0, condition, slack, x.dtype)


def _trials(
    x: LoRA | Batch, draws: int, conditions: Sequence[float] | None, seed: int
) -> list[tuple[float, torch.Generator]]:
    if conditions is None:
        conditions = (WELL, BADLY.get(x.dtype, WELL))
    trials = [(c, draw) for c in conditions for draw in range(draws)]
    return [(c, torch.Generator().manual_seed(seed + i)) for i, (c, _) in enumerate(trials)]


def _pairs(result: Any, gauges: list[Tensor] | None) -> dict[str, tuple[Tensor, Tensor]]:
    """The factor pairs of an equivariant result, moved by the gauges if there are any."""
    if isinstance(result, Batch):
        parts = {f"group {i}": (g.U, g.V) for i, g in enumerate(result.groups)}
    elif isinstance(result, LoRA):
        parts = {f"module {n!r}": (f.U, f.V) for n, f in result.factors.items()}
    elif isinstance(result, Sequence):
        parts = {f"group {i}": (U, V) for i, (U, V) in enumerate(result)}
    else:
        raise TypeError(
            f"an equivariant result is a Batch, a LoRA or a list of pairs, not {type(result).__name__}"
        )
    if gauges is None:
        return parts
    return {part: gl.act(*pair, g.to(pair[0])) for (part, pair), g in zip(parts.items(), gauges, strict=True)}


def _leaves(result: Any, path: str = "result") -> dict[str, Tensor | tuple[Tensor, Tensor]]:
    """Tensors of a nested result by path; LoRAs and batches as one pair per module or group."""
    if isinstance(result, (LoRA, Batch)):
        return {f"delta W of {path}, {part}": pair for part, pair in _pairs(result, None).items()}
    if isinstance(result, Tensor):
        return {path: result}
    if isinstance(result, (int, float)):
        return {path: torch.tensor(result, dtype=torch.float64)}
    items: Any
    if isinstance(result, Mapping):
        items = result.items()
    elif isinstance(result, Sequence) and not isinstance(result, str):
        items = enumerate(result)
    else:
        raise TypeError(f"{path}: cannot compare a {type(result).__name__}")
    return {k: v for key, value in items for k, v in _leaves(value, f"{path}[{key!r}]").items()}


def _difference(x: tuple[Tensor, Tensor], y: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    U, V = torch.cat([x[0].double(), -y[0].double()], -1), torch.cat([x[1].double(), y[1].double()], -1)
    return U, V


def _norm(U: Tensor, V: Tensor) -> Tensor:
    return torch.linalg.vector_norm(gl.spectrum(U.double(), V.double()), dim=-1)


def _close(
    part: str, found: Tensor, wanted: Tensor, condition: float, slack: float, dtype: torch.dtype
) -> None:
    if found.shape != wanted.shape:
        raise AssertionError(f"{part}: found shape {tuple(found.shape)}, wanted {tuple(wanted.shape)}")
    if not found.numel():
        return
    found, wanted = found.double(), wanted.double()
    size = torch.linalg.vector_norm(wanted).clamp(min=torch.finfo(torch.float64).tiny)
    _judge(part, float(torch.linalg.vector_norm(found - wanted) / size), condition, slack, dtype)


def _judge(part: str, error: float, condition: float, slack: float, dtype: torch.dtype) -> None:
    allowed = slack * torch.finfo(dtype).eps * condition
    # Written so that NaN fails.
    if not error <= allowed:
        raise AssertionError(
            f"{part}: relative error {error:.2e}, allowed {allowed:.2e} "
            f"at condition {condition:.0e} in {dtype}"
        )
