"""The flow-matching loss: its value where it is known, its masks and weights, its symmetry."""

from __future__ import annotations

import torch
from torch import Tensor

from lolgen.flow import align, drop_condition, flow_loss, gaussian, linear_path, sample_t

G = {"dtype": torch.float64}


def test_value_of_the_best_field_between_gaussians() -> None:
    """For x_1 ~ N(0, s^2) the best field leaves Var(dx_t | x_t) = s^2 / ((1 - t)^2 + t^2 s^2)."""
    s, N, t = 0.5, 4000, 0.3
    g = torch.Generator().manual_seed(0)
    x_1 = s * torch.randn(N, 2, 3, 2, generator=g, **G)
    variance = (1 - t) ** 2 + t**2 * s**2

    def best(x: Tensor, _: Tensor) -> Tensor:
        return (t * s**2 - (1 - t)) / variance * x

    times = torch.full((N,), t, **G)
    value = flow_loss(best, x_1, t=times, aligned=False, generator=g).mean()
    assert abs(float(value) - s**2 / variance) < 0.01 * s**2 / variance
    for other in (lambda x, t: 0.9 * best(x, t), lambda x, t: best(x, t) + 0.1):
        assert flow_loss(other, x_1, t=times, aligned=False, generator=g).mean() > value


def test_alignment_lowers_what_a_field_cannot_know() -> None:
    g = torch.Generator().manual_seed(0)
    x_1 = torch.randn(500, 2, 6, 3, generator=g, **G)
    plain, aligned = (
        flow_loss(lambda x, _: 0 * x, x_1, aligned=a, generator=torch.Generator().manual_seed(1)).mean()
        for a in (False, True)
    )
    assert aligned < 0.8 * plain


def test_mask_and_weight() -> None:
    torch.manual_seed(0)
    ranks = torch.tensor([[1, 3], [2, 2]])
    x_0, x_1 = gaussian(2, 2, 4, 3, ranks=ranks, **G), gaussian(2, 2, 4, 3, ranks=ranks, **G)
    weight, t = torch.rand(2, 4, 1, **G), torch.tensor([0.2, 0.7], **G)
    found = flow_loss(lambda x, _: x * x + 5, x_1, ranks=ranks, weight=weight, x_0=x_0, t=t)
    path = linear_path(align(x_0, x_1, ranks), x_1, t)
    for n in range(2):
        total, count = 0.0, 0
        for m in range(2):
            k = int(ranks[n, m])
            x, dx = path.x_t[n, m, :, :k], path.dx_t[n, m, :, :k]
            total += float((weight[m] * (x * x + 5 - dx).square()).sum())
            count += 4 * k
        assert abs(float(found[n]) - total / count) < 1e-10
    # Padding to a higher rank changes nothing; without ranks all columns count.
    wide = [torch.nn.functional.pad(x, (0, 2)) for x in (x_1, x_0)]
    again = flow_loss(lambda x, _: x * x + 5, wide[0], ranks=ranks, weight=weight, x_0=wide[1], t=t)
    assert torch.allclose(found, again)
    full = torch.full((2, 2), 3)
    everything = flow_loss(lambda x, _: x, x_1, x_0=x_0, t=t)
    assert torch.allclose(everything, flow_loss(lambda x, _: x, x_1, x_0=x_0, t=t, ranks=full))


def test_loss_of_an_equivariant_field_ignores_the_frame() -> None:
    torch.manual_seed(0)
    x_0, x_1, t = torch.randn(4, 2, 5, 3, **G), torch.randn(4, 2, 5, 3, **G), torch.rand(4, **G)
    Q = torch.linalg.qr(torch.randn(4, 2, 3, 3, **G))[0]

    def field(x: Tensor, _: Tensor) -> Tensor:
        return (x @ x.mT) @ x

    wanted = flow_loss(field, x_1, x_0=x_0, t=t)
    assert torch.allclose(flow_loss(field, x_1 @ Q, x_0=x_0, t=t), wanted)
    assert not torch.allclose(flow_loss(field, x_1 @ (2 * Q), x_0=x_0, t=t), wanted)
    # A field that is not equivariant sees the frame.
    wrong = flow_loss(lambda x, _: x + 1, x_1, x_0=x_0, t=t)
    assert not torch.allclose(flow_loss(lambda x, _: x + 1, x_1 @ Q, x_0=x_0, t=t), wrong)


def test_times_are_stratified_and_conditions_dropped() -> None:
    g = torch.Generator().manual_seed(0)
    t = sample_t(64, generator=g)
    assert (t.sort().values * 64).long().tolist() == list(range(64)) and not torch.equal(t, t.sort().values)
    u = sample_t(5000, "logit_normal", generator=g)
    assert u.min() > 0 and u.max() < 1 and abs(float(u.mean()) - 0.5) < 0.02
    c = torch.ones(4000, 3)
    dropped = drop_condition(c, 0.25, generator=g)
    rows = dropped.sum(1)
    assert set(rows.tolist()) == {0.0, 3.0} and abs(float((rows == 0).float().mean()) - 0.25) < 0.03
    null = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(drop_condition(c, 1.0, null=null), null.expand(4000, 3))
    assert torch.equal(drop_condition(c, 0.0), c)
