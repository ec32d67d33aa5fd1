"""The helpers that judge symmetry must themselves be able to fail."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from lolgen import gl
from lolgen.lora import Batch, Group, LoRA, Spec
from lolgen.testing import WELL, assert_equivariant, assert_invariant, random_lora, regauge

MIXED = (4, 3, 6, 1, 8, 5, 2, 3)


def batch_of(spec: Spec, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(0)
    loras = [random_lora(spec, r, generator=generator, dtype=dtype) for r in (MIXED, [2] * 8)]
    return Batch.stack(loras, dtype)


def linear(x: Batch) -> list[tuple[Tensor, Tensor]]:
    """(Phi U, Psi V) to latents of another size: equivariant."""
    generator = torch.Generator().manual_seed(1)
    found = []
    for g in x.groups:
        Phi = torch.randn(7, g.U.shape[-2], generator=generator, dtype=torch.float64).to(x.dtype)
        Psi = torch.randn(5, g.V.shape[-2], generator=generator, dtype=torch.float64).to(x.dtype)
        found.append((Phi @ g.U, Psi @ g.V))
    return found


def traces(x: Batch) -> list[Tensor]:
    """tr(U^T P V) of the first rows: invariant."""
    return [(g.U[..., :1, :] * g.V[..., :1, :]).sum(-1) for g in x.groups]


def gated(x: Batch) -> Batch:
    """Left action by a matrix made of invariants: the universal nonlinearity."""
    groups = []
    for g in x.groups:
        M = (g.U @ g.V[..., :1, :].mT).tanh()  # (N, M, out, 1)
        groups.append(Group(g.index, M * g.U, g.V))
    return Batch(x.spec, groups, x.ranks)


def mixed_ranks(x: Batch) -> list[tuple[Tensor, Tensor]]:
    """A matrix on the right: not equivariant."""
    return [(g.U.flip(-1), g.V.flip(-1)) for g in x.groups]


def entrywise(x: Batch) -> Batch:
    return x.map(lambda U, V: (U.tanh(), V))


def swapped_gauge(x: Batch) -> Batch:
    """Equivariant in U, but V gets what depends on the gauge."""
    return x.map(lambda U, V: (U, V * V.norm(dim=(-2, -1), keepdim=True)))


def norms(x: Batch) -> dict[str, Any]:
    return {"U": [g.U.norm(dim=(-2, -1)) for g in x.groups]}


@pytest.mark.parametrize("fn", [linear, gated])
def test_accepts_equivariant_maps(fn: Any, spec: Spec, dtype: torch.dtype) -> None:
    assert_equivariant(fn, batch_of(spec, dtype))
    with pytest.raises(AssertionError, match="relative error"):
        assert_equivariant(fn, batch_of(spec, dtype), off_group=True)


@pytest.mark.parametrize("fn", [mixed_ranks, entrywise, swapped_gauge])
def test_rejects_maps_that_are_not(fn: Any, spec: Spec, dtype: torch.dtype) -> None:
    for conditions in (None, [WELL]):
        with pytest.raises(AssertionError, match="[UV] of group 0: relative error .* allowed"):
            assert_equivariant(fn, batch_of(spec, dtype), conditions=conditions)


def test_accepts_and_rejects_invariants(spec: Spec, dtype: torch.dtype) -> None:
    batch = batch_of(spec, dtype)
    assert_invariant(traces, batch)
    assert_invariant(lambda x: {"a": (gl.spectrum_batch(x), 3.0), "b": x}, batch)
    with pytest.raises(AssertionError, match=r"result\['U'\]\[0\]"):
        assert_invariant(norms, batch)
    with pytest.raises(AssertionError):
        assert_invariant(traces, batch, off_group=True)
    with pytest.raises(AssertionError, match="delta W of result, group 0"):
        assert_invariant(lambda x: x, batch, off_group=True)


def test_loras_as_well_as_batches(lora: LoRA, dtype: torch.dtype) -> None:
    assert_equivariant(lambda x: x, lora)
    assert_invariant(lambda x: x, lora)
    assert_invariant(lambda x: float(x["embed"].delta().sum()), lora)
    for off in (assert_equivariant, assert_invariant):
        with pytest.raises(AssertionError):
            off(lambda x: x, lora, off_group=True)
    with pytest.raises(AssertionError, match="module 'attn.to_q'"):
        assert_equivariant(lambda x: x.replace({n: f.to(dtype) for n, f in lora.factors.items()}), lora)


def test_rejects_nan_and_changed_results(spec: Spec) -> None:
    batch = batch_of(spec, torch.float64)
    calls = iter(range(100))
    with pytest.raises(AssertionError, match="nan"):
        assert_invariant(lambda x: torch.tensor(float("nan") if next(calls) else 1.0), batch)
    with pytest.raises(AssertionError, match="parts"):
        assert_invariant(lambda x: [0.0] * (1 + next(calls)), batch)
    with pytest.raises(AssertionError, match="shape"):
        assert_invariant(lambda x: torch.zeros(next(calls)), batch)
    with pytest.raises(TypeError, match="compare a str"):
        assert_invariant(lambda x: "nothing", batch)
    with pytest.raises(TypeError, match="list of pairs"):
        assert_equivariant(lambda x: 3.0, batch)


def test_tolerance_is_tight_enough_to_see_small_breaks(spec: Spec, dtype: torch.dtype) -> None:
    batch = batch_of(spec, dtype)
    leak = 1e-3 if dtype == torch.float32 else 1e-10

    def leaking(x: Batch) -> Batch:
        return x.map(lambda U, V: (U + leak * U.square(), V))

    with pytest.raises(AssertionError):
        assert_equivariant(leaking, batch)


def test_regauge_and_its_twin(lora: LoRA, spec: Spec, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(2)
    moved, gauges = regauge(lora, condition=10, generator=generator)
    assert moved.ranks == lora.ranks and [g.shape[0] for g in gauges] == list(MIXED)
    off, _ = regauge(lora, off_group=True, generator=generator)
    for name in lora.names:
        W = lora[name].delta()
        torch.testing.assert_close(moved[name].delta(), W, rtol=1e-3, atol=1e-5)
        assert (moved[name].A - lora[name].A).abs().max() > 1e-3
        if W.any():
            assert (off[name].delta() - W).norm() > 1e-2 * W.norm()
    batch = batch_of(spec, dtype)
    shifted, _ = regauge(batch, off_group=True, generator=generator)
    for was, now in zip(batch.unstack(), shifted.unstack(), strict=True):
        assert now.ranks == was.ranks
        assert all(
            (now[n].delta() - was[n].delta()).norm() > 1e-2 * was[n].delta().norm() for n in spec.names
        )


def test_random_lora_is_reproducible(spec: Spec) -> None:
    a, b = (
        random_lora(spec, MIXED, zero=("gate",), scale=2.0, generator=torch.Generator().manual_seed(0))
        for _ in range(2)
    )
    assert all(a[n].B.equal(b[n].B) and a[n].A.equal(b[n].A) for n in spec.names)
    assert list(a.ranks.values()) == list(MIXED) and not a["gate"].B.any() and a["embed"].scale == 2.0
