"""The O(r) twins on balanced latents: orthogonal matrices pass through, others do not."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lolgen import gl
from lolgen.errors import ShapeError
from lolgen.nn import Gram, OLinear, OMix

from .tiny import SPEC, awaken, rotations

M = len(SPEC)


def data(N: int, r: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(N, M, 6, r, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(dtype)


@pytest.fixture(scope="module")
def net() -> nn.Module:
    layers = (OLinear(SPEC, 6, 5), OMix(SPEC, 5, p=3, rank=2, width=8, heads=2), OLinear(SPEC, 5, 6))
    return awaken(nn.Sequential(*layers).double())


@pytest.mark.parametrize("r", [1, 3, 8])
@torch.no_grad()
def test_equivariant_under_rotations_only(net: nn.Module, r: int) -> None:
    X, Q = data(3, r), rotations(3, M, r)
    assert torch.allclose(net(X @ Q), net(X) @ Q, atol=1e-10)
    single = nn.Sequential(*net).float()
    out = single((X @ Q).float()).double()
    assert torch.allclose(out, single(X.float()).double() @ Q, atol=1e-3 * float(out.abs().max()))
    net.double()
    g = gl.random_gauge(3, M, rank=r, condition=3.0, dtype=torch.float64)
    # At rank 1 the group off O(1) is a change of size.
    g = g * 2 if r == 1 else g
    assert not torch.allclose(net(X @ g), net(X) @ g, atol=1e-3)


@torch.no_grad()
def test_gram_is_the_outer_product_and_invariant() -> None:
    X, gram = data(2, 3), Gram(SPEC, 6, 4).double()
    Y = torch.stack([gram.maps.weight[m] @ X[:, m] for m in range(M)], dim=1)
    assert torch.allclose(gram(X), Y @ Y.mT)
    assert torch.allclose(gram(X @ rotations(2, M, 3)), gram(X))


@torch.no_grad()
def test_zero_columns_and_zero_modules_stay_zero(net: nn.Module) -> None:
    X = data(2, 3)
    X[:, 1] = 0
    padded = torch.nn.functional.pad(X, (0, 2))
    out = net(padded)
    assert not out[..., 3:].any() and not out[:, 1].any()
    assert torch.allclose(out[..., :3], net(X), atol=1e-12)
    assert net(X * 0).isfinite().all()


def test_mix_starts_as_the_identity() -> None:
    X = data(2, 3)
    assert torch.equal(OMix(SPEC, 6, p=3, width=8, heads=2).double()(X), X)


def test_wrong_shape_is_refused() -> None:
    with pytest.raises(ShapeError, match=r"wanted \(N, 4, 5, r\)"):
        OLinear(SPEC, 5, 3)(data(2, 3))
