"""Singular values from Gram matrices, against the QR of `lolgen.gl` and dense SVDs."""

from __future__ import annotations

import pytest
import torch

from lolgen import gl
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec
from lolgen.testing import random_lora
from lolgen.tools.inspect import spectra

from .files import lora, off_group, padded, regauged

RANKS = (4, 3, 6, 1, 8, 5, 2, 3)


def worst(found: dict[str, torch.Tensor], x: LoRA) -> float:
    """Largest error of an energy, as a share of its module's."""
    errors = []
    for name, f in x.factors.items():
        dense = torch.linalg.svdvals(f.to(torch.float64).delta())
        wanted = torch.nn.functional.pad(dense, (0, max(0, f.rank - len(dense))))[: f.rank].square()
        errors.append(float((found[name].square() - wanted).abs().max() / wanted.sum().clamp(min=1e-300)))
    return max(errors)


def test_mixed_ranks_kinds_and_a_zero_module(spec: Spec, lora: LoRA) -> None:
    found = spectra.singular_values(lora)
    assert list(found) == list(lora.names)
    assert all(s.dtype == torch.float64 and len(s) == lora[n].rank for n, s in found.items())
    assert worst(found, lora) < 1e-6
    assert not found["conv_3d"].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_every_precision(dtype: torch.dtype) -> None:
    x = lora(3, 5).to(dtype)
    assert worst(spectra.singular_values(x), x) < 1e-6


@pytest.mark.parametrize("condition", [1e2, 1e4, 1e6, 1e8])
def test_bad_gauges_cost_nothing(condition: float) -> None:
    """The Gram matrices alone would lose the square of the condition; the loss is seen and QR steps in."""
    x = lora(1, 6, dtype=torch.float64)
    y = regauged(x, condition)
    assert worst(spectra.singular_values(y), x) < 1e-4
    assert worst(spectra.singular_values(off_group(x)), x) > 1e-2


def test_the_gram_matrices_alone_would_fail_there() -> None:
    x = lora(1, 6, dtype=torch.float64)
    y = regauged(x, 1e8)
    found: dict[str, torch.Tensor] = {}
    left = spectra._by_grams(y, list(y.names), torch.float32, found)
    assert left and set(left) | set(found) == set(y.names)


@pytest.mark.parametrize("size", [1e-30, 1e-12, 1e12, 1e25])
def test_sizes_outside_the_squares_of_float32(size: float) -> None:
    f = lora()[lora().names[0]]
    x = LoRA(Spec((lora().spec[0],)), {lora().names[0]: Factors(f.B * size**0.5, f.A * size**0.5, 2.0)})
    assert worst(spectra.singular_values(x), x) < 1e-6


def test_rank_above_the_sizes_and_spare_rank() -> None:
    spec = Spec((ModuleSpec("a", 3, 5), ModuleSpec("b", 1, 1)))
    x = random_lora(spec, 6, generator=torch.Generator().manual_seed(0))
    assert worst(spectra.singular_values(x), x) < 1e-6
    y = padded(lora(2, 3), 9)
    found = spectra.singular_values(y)
    assert worst(found, y) < 1e-6
    plain = spectra.singular_values(lora(2, 3))
    assert all(torch.allclose(found[n][:3], plain[n], rtol=1e-4) for n in y.names)


def test_a_negative_or_zero_scale() -> None:
    x = lora(scale=-0.5)
    assert worst(spectra.singular_values(x), x) < 1e-6
    assert not any(s.any() for s in spectra.singular_values(lora(scale=0.0)).values())


@pytest.mark.parametrize("share", [0.5, 0.9, 0.99, 1.0])
def test_effective_ranks_are_those_of_gl(share: float) -> None:
    x = lora(4, 8)
    for name, s in spectra.singular_values(x).items():
        f = x[name].to(torch.float64)
        assert spectra.needed(s, share) == int(gl.effective_rank(f.U, f.V, energy=share))
    assert spectra.needed(torch.zeros(3), share) == 0
