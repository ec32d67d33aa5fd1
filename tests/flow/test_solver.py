"""Solvers against closed forms, forth and back; guidance against its formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lolgen.flow import guided, solve
from lolgen.flow.solver import Method

SIGMA = 0.3


def gaussian_to_gaussian(x: Tensor, t: Tensor) -> Tensor:
    """The marginal velocity of linear paths from N(0, 1) to N(0, SIGMA^2): every path ends at SIGMA x_0."""
    s = t.reshape(-1, *[1] * (x.ndim - 1))
    return (s * SIGMA**2 - (1 - s)) / ((1 - s) ** 2 + s**2 * SIGMA**2) * x


def noise() -> Tensor:
    return torch.randn(3, 2, 4, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("method, order", [("euler", 1), ("midpoint", 2), ("heun", 2)])
def test_gaussian_to_gaussian_at_the_methods_order(method: Method, order: int) -> None:
    x_0 = noise()
    errors = [
        float((solve(gaussian_to_gaussian, x_0, steps=n, method=method) - SIGMA * x_0).abs().max())
        for n in (64, 128, 256)
    ]
    assert errors[-1] < 1e-2
    for coarse, fine in zip(errors, errors[1:], strict=False):
        assert coarse / fine > 0.85 * 2**order


def test_constant_velocity_is_exact_in_one_step() -> None:
    x_0 = noise()
    for method in ("euler", "midpoint", "heun"):
        x_1 = solve(lambda x, t: torch.full_like(x, 2.0), x_0, steps=1, method=method)  # type: ignore[arg-type]
        assert torch.allclose(x_1, x_0 + 2)


@pytest.mark.parametrize("method", ["midpoint", "heun"])
def test_back_undoes_forth(method: Method) -> None:
    x_0 = noise()

    def error(steps: int) -> float:
        x_1 = solve(gaussian_to_gaussian, x_0, steps=steps, method=method)
        return float(
            (solve(gaussian_to_gaussian, x_1, steps=steps, method=method, t_0=1, t_1=0) - x_0).abs().max()
        )

    assert error(200) < 1e-4
    assert error(100) > 3.5 * error(200)


def test_a_part_of_the_way_and_the_rest() -> None:
    x_0 = noise()
    middle = solve(gaussian_to_gaussian, x_0, steps=50, t_1=0.5)
    assert torch.allclose(
        solve(gaussian_to_gaussian, middle, steps=50, t_0=0.5), solve(gaussian_to_gaussian, x_0, steps=100)
    )


def field(x: Tensor, t: Tensor, c: Tensor, ranks: Tensor | None = None) -> Tensor:
    s = (1 if ranks is None else ranks.double().mean(1)) * c.sum(1) + t
    return x * s[:, None, None, None]


def test_guidance_is_its_formula() -> None:
    x, t = noise(), torch.full((3,), 0.4, dtype=torch.float64)
    c = torch.tensor([[1.0, 2.0], [0.5, -1.0], [3.0, 0.0]], dtype=torch.float64)
    null = torch.tensor([0.1, 0.2], dtype=torch.float64)
    ranks = torch.tensor([[1, 2], [3, 3], [2, 2]])
    for w in (0.0, 1.0, 2.5, torch.tensor([0.0, 1.0, 3.0])):
        W = torch.as_tensor(w, dtype=torch.float64).reshape(-1, 1, 1, 1)
        wanted = field(x, t, null.expand(3, 2), ranks) * (1 - W) + W * field(x, t, c, ranks)
        assert torch.allclose(guided(field, c, w, null=null, ranks=ranks)(x, t), wanted)
    zeros = field(x, t, 0 * c)
    assert torch.allclose(guided(field, c, 2.0)(x, t), zeros + 2 * (field(x, t, c) - zeros))


def test_plain_conditions_cost_one_call() -> None:
    sizes = []

    def counted(x: Tensor, t: Tensor, c: Tensor) -> Tensor:
        sizes.append(len(x))
        return x

    x, t, c = noise(), torch.zeros(3), torch.zeros(3, 1)
    guided(counted, c, 1.0)(x, t)
    guided(counted, c, 2.0)(x, t)
    assert sizes == [3, 6]


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="steps"):
        solve(gaussian_to_gaussian, noise(), steps=0)
    with pytest.raises(ValueError, match="euler, midpoint, heun"):
        solve(gaussian_to_gaussian, noise(), method="rk4")  # type: ignore[arg-type]
