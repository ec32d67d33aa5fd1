"""Paths and the alignment of noise to data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lolgen.flow import align, gaussian, linear_path

G = {"dtype": torch.float64}


def orthogonal(*shape: int) -> Tensor:
    return torch.linalg.qr(torch.randn(*shape, **G))[0]


def test_path_ends_and_velocity() -> None:
    torch.manual_seed(0)
    x_0, x_1 = torch.randn(3, 2, 4, 5, **G), torch.randn(3, 2, 4, 5, **G)
    assert torch.equal(linear_path(x_0, x_1, torch.zeros(3)).x_t, x_0)
    assert torch.allclose(linear_path(x_0, x_1, torch.ones(3)).x_t, x_1)
    t, h = torch.tensor([0.1, 0.5, 0.9], **G), 1e-6
    path = linear_path(x_0, x_1, t)
    slope = (linear_path(x_0, x_1, t + h).x_t - path.x_t) / h
    assert torch.allclose(path.dx_t, slope, atol=1e-8) and torch.equal(path.t, t)


@pytest.mark.parametrize("r", [1, 2, 4])
def test_alignment_is_a_rotation_and_the_best(r: int) -> None:
    torch.manual_seed(0)
    x_0, x_1 = torch.randn(5, 3, 7, r, **G), torch.randn(5, 3, 7, r, **G)
    found = align(x_0, x_1)
    assert torch.allclose(found @ found.mT, x_0 @ x_0.mT)
    near = (found - x_1).square().sum((2, 3))
    for _ in range(20):
        assert (near <= (x_0 @ orthogonal(5, 3, r, r) - x_1).square().sum((2, 3)) + 1e-12).all()


def test_alignment_follows_the_frames() -> None:
    torch.manual_seed(0)
    x_0, x_1 = torch.randn(5, 3, 7, 4, **G), torch.randn(5, 3, 7, 4, **G)
    Q, P = orthogonal(5, 3, 4, 4), orthogonal(5, 3, 4, 4)
    found = align(x_0, x_1)
    assert torch.allclose(align(x_0 @ P, x_1), found)
    assert torch.allclose(align(x_0, x_1 @ Q), found @ Q)
    # Not so off the group.
    assert not torch.allclose(align(x_0, x_1 @ (Q * 1.3 + P)), found @ (Q * 1.3 + P), atol=1e-2)
    assert torch.allclose(align(x_1 @ Q, x_1), x_1)


def test_mixed_ranks_keep_their_padding() -> None:
    torch.manual_seed(0)
    ranks = torch.tensor([[1, 4], [2, 3]])
    x_0, x_1 = gaussian(2, 2, 7, 4, ranks=ranks, **G), gaussian(2, 2, 7, 4, ranks=ranks, **G)
    assert [[int(m.any(0).sum()) for m in n] for n in x_0] == ranks.tolist()
    x_1[0, 1] = 0
    found = align(x_0, x_1, ranks)
    assert torch.allclose(found @ found.mT, x_0 @ x_0.mT)
    assert not found.mT[torch.arange(4) >= ranks[..., None]].any()
    assert torch.allclose(found[1, 0, :, :2], align(x_0[1:, :1, :, :2], x_1[1:, :1, :, :2])[0, 0])


def test_noise_is_reproducible_unit_and_invariant() -> None:
    draws = [gaussian(200, 4, 8, 3, generator=torch.Generator().manual_seed(7), **G) for _ in range(2)]
    assert torch.equal(*draws)
    x = draws[0]
    covariance = torch.einsum("nmdi,nmdj->ij", x, x) / (200 * 4 * 8)
    assert torch.allclose(covariance, torch.eye(3, **G), atol=0.05)
