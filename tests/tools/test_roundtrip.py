"""The error of one LoRA against another, module by module."""

from __future__ import annotations

import pytest
import torch

from lolgen import metrics
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec
from lolgen.testing import assert_invariant, random_lora
from lolgen.tools.roundtrip import error

PAIR = Spec((ModuleSpec("a", 7, 5), ModuleSpec("b", 4, 6)))


@pytest.mark.parametrize("same_a", [True, False])
def test_it_is_the_error_of_the_dense_matrices(dtype: torch.dtype, same_a: bool) -> None:
    g = torch.Generator().manual_seed(0)
    one, two = (random_lora(PAIR, [2, 3], scale=0.3, generator=g, dtype=dtype) for _ in range(2))
    if same_a:
        two = two.replace({n: Factors(f.B, one[n].A, f.scale) for n, f in two.factors.items()})
    apart = [(two[n].delta() - one[n].delta()).double().norm() for n in PAIR.names]
    size = [one[n].delta().double().norm() for n in PAIR.names]
    found = error(one, two)
    eps = 1e-6 if dtype == torch.float32 else 1e-13
    assert found.relative == pytest.approx(
        float(torch.stack(apart).norm() / torch.stack(size).norm()), rel=eps
    )
    assert found.relative == pytest.approx(metrics.relative_distance(one, two), rel=eps)
    worst = [float(a / s) for a, s in zip(apart, size, strict=True)]
    assert found.worst_relative == pytest.approx(max(worst), rel=eps)
    assert found.worst == PAIR.names[worst.index(max(worst))]


def test_no_gauge_is_seen(dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    other = random_lora(PAIR, 2, generator=g, dtype=dtype)
    lora = random_lora(PAIR, 3, generator=g, dtype=dtype)
    assert_invariant(lambda x: error(other, x).relative, lora)
    with pytest.raises(AssertionError):
        assert_invariant(lambda x: error(other, x).relative, lora, off_group=True)


def test_error_counts_what_is_missing_and_what_is_too_much() -> None:
    lora = random_lora(Spec((ModuleSpec("a", 4, 4), ModuleSpec("b", 4, 4))), 2)
    one = LoRA(Spec((lora.spec["a"],)), {"a": lora["a"]})
    assert error(lora, lora).relative == 0
    assert error(lora, one).worst == "b" and error(lora, one).worst_relative == 1
    assert error(one, lora).worst == "b" and error(one, lora).worst_relative == float("inf")
    zero = lora.replace({n: Factors(f.B * 0, f.A) for n, f in lora.factors.items()})
    assert error(zero, zero).relative == 0 and error(zero, lora).relative == float("inf")
    other = lora.replace(
        {n: Factors(f.B.double(), f.A.double() * (1 + 1e-6)) for n, f in lora.factors.items()}
    )
    assert error(lora, other).relative == pytest.approx(1e-6, rel=0.05)
