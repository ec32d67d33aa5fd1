"""The velocity field: one rotation per module passes through, at every rank."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lolgen import gl
from lolgen.errors import ShapeError
from lolgen.nn import VelocityField, VelocityFieldConfig
from lolgen.nn.flowfield import polar

from .tiny import SPEC, awaken, rotations

M, N = len(SPEC), 3
CONFIG = VelocityFieldConfig(d_u=4, d_v=3, condition=2, p=3, rank=2, width=8, depth=2, heads=2)


def field(dtype: torch.dtype = torch.float64) -> VelocityField:
    torch.manual_seed(0)
    net = VelocityField(SPEC, CONFIG).to(dtype)
    awaken(net)
    return net


def inputs(r: int) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(1)
    X = torch.randn(N, M, 7, r, generator=g, dtype=torch.float64)
    return X, torch.tensor([0.0, 0.3, 1.0], dtype=torch.float64), torch.randn(N, 2, generator=g).double()


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-12)])
@pytest.mark.parametrize("r", [1, 3, 9])
@torch.no_grad()
def test_equivariant_under_rotations_only(r: int, dtype: torch.dtype, tolerance: float) -> None:
    net, (X, t, c), Q = field(dtype), inputs(r), rotations(N, M, r)

    def v(X: Tensor) -> Tensor:
        return net(X.to(dtype), t.to(dtype), c.to(dtype)).double()

    size = float(v(X).abs().max())
    assert torch.allclose(v(X @ Q), v(X) @ Q, atol=tolerance * size)
    g = gl.random_gauge(N, M, rank=r, condition=3.0, dtype=torch.float64) * (2 if r == 1 else 1)
    assert not torch.allclose(v(X @ g), v(X) @ g, atol=1e-2 * size)


@torch.no_grad()
def test_padding_zero_modules_and_permutation() -> None:
    net, (X, t, c) = field(), inputs(4)
    ranks = torch.tensor([[2, 1, 4, 3], [4, 4, 4, 4], [1, 1, 1, 1]])
    X = X * (torch.arange(4) < ranks[..., None])[:, :, None]
    X[1, 2] = 0
    v = net(X, t, c, ranks)
    assert not v.mT[torch.arange(4) >= ranks[..., None]].any() and not v[1, 2].any()
    wide = net(torch.nn.functional.pad(X, (0, 3)), t, c, ranks)
    assert torch.allclose(wide[..., :4], v) and not wide[..., 4:].any()
    Q = rotations(N, M, 4, ranks)
    assert torch.allclose(net(X @ Q, t, c, ranks), v @ Q, atol=1e-10)
    order = torch.tensor([2, 0, 1])
    assert torch.allclose(net(X[order], t[order], c[order], ranks[order]), v[order])
    assert net(X * 0, t, c, ranks).isfinite().all()


@torch.no_grad()
def test_depends_on_time_condition_rank_and_other_modules() -> None:
    net, (X, t, c) = field(), inputs(3)
    v = net(X, t, c)
    assert torch.allclose(net(X, t, c, torch.full((N, M), 3)), v)
    other = X.clone()
    other[:, 0] *= 2
    for changed in (
        net(X, t + 0.1, c),
        net(X, t, c + 1),
        net(X, t, c, torch.full((N, M), 2)),
        net(other, t, c),
    ):
        assert (changed[:, 1] - v[:, 1]).abs().max() > 1e-6


def test_starts_at_zero_with_gradients() -> None:
    X, t, c = (x.float() for x in inputs(3))
    net = VelocityField(SPEC, CONFIG)
    v = net(X, t, c)
    assert not v.any()
    (v - X).square().sum().backward()
    assert net.net.out is not None and net.net.out.weight.grad is not None
    assert net.net.out.weight.grad.abs().max() > 0


@torch.no_grad()
def test_normalised_latents_have_unit_entries_at_every_rank() -> None:
    net = VelocityField(SPEC, CONFIG)
    g = torch.Generator().manual_seed(0)
    sizes = torch.rand(M, 7, generator=g) * 5 + 0.1
    sizes[2, 3] = 0
    for r in (2, 8):
        # The same energy in every row, however many columns there are.
        X = torch.randn(1000, M, 7, r, generator=g) * sizes[..., None] / r**0.5
        ranks = torch.full((1000, M), r)
        net.fit(torch.nn.functional.pad(X, (0, 1)))
        assert torch.allclose(net.energy.sqrt(), torch.where(sizes > 0, sizes, 1.0), rtol=0.1)
        Z = net.normalise(X, ranks)
        alive = Z.square().mean((0, 3))[sizes > 0]
        assert torch.allclose(alive, torch.ones_like(alive), rtol=0.1)
        assert torch.allclose(net.denormalise(Z, ranks), X, atol=1e-6)


def test_condition_of_another_length_is_refused() -> None:
    X, t, c = inputs(2)
    net = field()
    for wrong in (None, c[:, :1], c[:1]):
        with pytest.raises(ShapeError, match=r"wanted \(3, 2\)"):
            net(X, t, wrong)
    free = VelocityField(SPEC, VelocityFieldConfig(d_u=4, d_v=3, p=3, width=8, heads=2)).double()
    assert free(X, t).shape == X.shape
    with pytest.raises(ShapeError, match=r"wanted \(3, 0\)"):
        free(X, t, c)


@pytest.mark.parametrize("k, r", [(3, 2), (2, 5), (3, 3)])
def test_polar_nears_the_polar_factor_and_turns_with_the_frame(k: int, r: int) -> None:
    g = torch.Generator().manual_seed(0)
    Z = torch.randn(4, M, k, r, generator=g, dtype=torch.float64)
    X, _, Yh = torch.linalg.svd(Z, full_matrices=False)
    assert torch.allclose(polar(Z, steps=40), X @ Yh, atol=1e-6)
    Q = rotations(4, M, r)
    assert torch.allclose(polar(Z @ Q), polar(Z) @ Q)
    assert not torch.allclose(polar(Z @ (Q + 1)), polar(Z) @ (Q + 1), atol=1e-2)
    assert not polar(torch.nn.functional.pad(Z, (0, 2)))[..., r:].any()
    zero = torch.zeros(1, 1, k, r, requires_grad=True)
    polar(zero).sum().backward()
    assert zero.grad is not None and zero.grad.isfinite().all()
