"""The GL layers: exact symmetry for every rank and gauge, and what each computes."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lolgen.errors import ShapeError, SpecError
from lolgen.lora import Batch
from lolgen.nn import GLLinear, GLMix, Invariants, Latent
from lolgen.nn.layers import normalised
from lolgen.testing import assert_equivariant, assert_invariant

from .tiny import LONGER, RANKS, SPEC, awaken, batch

DTYPES = (torch.float32, torch.float64)


class Stack(nn.Module):
    """Batch -> latents, through everything that acts on latents, and back if asked for."""

    def __init__(self, back: bool) -> None:
        super().__init__()
        self.first, self.mix_1, self.linear, self.mix_2 = (
            GLLinear(SPEC, d_out=(5, 4)), GLMix(SPEC, (5, 4), p=3, rank=2, width=8, heads=2),
            GLLinear(SPEC, (5, 4), 6), GLMix(SPEC, 6, p=3, rank=2, width=8, heads=2),
        )  # fmt: skip
        self.last = GLLinear(SPEC, 6) if back else None

    def forward(self, x: Batch) -> Batch | list[tuple[torch.Tensor, torch.Tensor]]:
        y = self.mix_2(self.linear(self.mix_1(self.first(x))))
        return self.last(y) if self.last else y.pairs(SPEC)


@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_layers_are_equivariant(ranks: list[int], dtype: torch.dtype, back: bool) -> None:
    net = awaken(Stack(back).to(dtype))
    for zero in ((), ("conv",), SPEC.names):
        x = batch(ranks, zero=zero, dtype=dtype)
        assert_equivariant(net, x, draws=1, slack=500)
        assert_invariant(lambda x: net.mix_1.invariants(net.first(x)), x, draws=1, slack=500)
    with pytest.raises(AssertionError):
        assert_equivariant(net, batch(ranks, dtype=dtype), off_group=True)


def test_a_layer_that_mixes_columns_is_caught() -> None:
    """The tests above can fail: a right map that is not the identity breaks them."""
    first, g = GLLinear(SPEC, d_out=4).double(), torch.randn(3, 3, dtype=torch.float64)

    def wrong(x: Batch) -> list[tuple[torch.Tensor, torch.Tensor]]:
        y: Latent = first(x)
        return Latent(y.U @ g, y.V, y.ranks).pairs(SPEC)

    with pytest.raises(AssertionError):
        assert_equivariant(wrong, batch([3, 3]))


def test_gl_linear_is_each_modules_own_matrix() -> None:
    x = batch(RANKS["mixed"])
    there, back = GLLinear(SPEC, d_out=(5, 4)).double(), GLLinear(SPEC, (5, 4)).double()
    y = there(x)
    z = back(y)
    for g, (group, (_, index)) in enumerate(zip(x.groups, SPEC.groups, strict=True)):
        for j, m in enumerate(index):
            for n in range(len(x)):
                U = there.U[g][j] @ group.U[n, j]
                assert torch.allclose(y.U[n, m], U)
                assert torch.allclose(y.V[n, m], there.V[g][j] @ group.V[n, j])
                assert torch.allclose(z.groups[g].U[n, j], back.U[g][j] @ U)
    assert torch.equal(y.ranks, x.ranks) and torch.equal(z.ranks, x.ranks)


def test_invariants_are_entries_of_projected_delta() -> None:
    x = batch(RANKS["mixed"])
    layer = Invariants(SPEC, None, 3, 2).double()
    found = layer(x)
    assert found.shape == (4, len(SPEC), 3, 2)
    for n, lora in enumerate(x.unstack()):
        for g, (_, index) in enumerate(SPEC.groups):
            for j, m in enumerate(index):
                delta = lora[SPEC.names[m]].delta()
                wanted = layer.maps.U[g][j] @ delta @ layer.maps.V[g][j].T
                assert torch.allclose(found[n, m], wanted)


def test_mix_starts_as_the_identity_and_then_sees_every_module() -> None:
    x = batch([3, 3])
    first, mix = GLLinear(SPEC, d_out=5).double(), GLMix(SPEC, 5, p=3, rank=2, width=8, heads=2).double()
    y = first(x)
    z = mix(y)
    assert torch.equal(z.U, y.U) and torch.equal(z.V, y.V)
    # The zeros are no dead end: gradients reach the outer factors.
    z.U.square().sum().backward()
    assert mix.net.out is not None and mix.net.out.weight.grad is not None
    assert mix.net.out.weight.grad.abs().max() > 0

    awaken(mix)
    with torch.no_grad():
        U = y.U.clone()
        U[:, 2] *= 1.5
        before, after = mix(y), mix(Latent(U, y.V, y.ranks))
    assert (before.U[:, 0] - after.U[:, 0]).abs().max() > 1e-6


@torch.no_grad()
def test_mix_matrices_are_the_same_for_every_column_and_padding() -> None:
    x = batch([3, 3])
    first, mix = GLLinear(SPEC, d_out=5).double(), awaken(GLMix(SPEC, 5, p=3, width=8, heads=2).double())
    narrow, wide = mix(first(x)), mix(first(x.padded(7)))
    assert torch.allclose(narrow.U, wide.U[..., :3], atol=1e-12)
    assert not wide.U[..., 3:].any() and not wide.V[..., 3:].any()


@torch.no_grad()
def test_padding_stays_zero_and_the_batch_may_be_permuted() -> None:
    x = batch(RANKS["mixed"], zero=("v",))
    net = awaken(Stack(back=True).double())
    y = net(x)
    assert isinstance(y, Batch)
    for group in y.groups:
        outside = ~y.mask(group)[:, :, None]
        assert not (group.U * outside).any() and not (group.V * outside).any()
    order = torch.tensor([2, 0, 3, 1])
    z = net(x[order])
    for a, b in zip(y[order].groups, z.groups, strict=True):
        assert torch.allclose(a.U, b.U, atol=1e-12) and torch.allclose(a.V, b.V, atol=1e-12)


@pytest.mark.parametrize("c", [1e-30, 1e-6, 1.0, 1e12])
def test_normalised_invariants_have_unit_size_at_any_scale(c: float) -> None:
    I = torch.randn(3, 4, 2, 2, generator=torch.Generator().manual_seed(0))  # noqa: E741
    found = normalised(I * c)
    if c > 1e-18:  # below it squares leave float32, and an all but zero LoRA reads as zero
        assert torch.allclose(found[..., :-1], normalised(I)[..., :-1], rtol=1e-4)
        assert torch.allclose(found[..., :-1].square().mean((1, 2)), torch.ones(3), rtol=1e-4)
    assert found.isfinite().all()
    assert normalised(I * 0).isfinite().all()


def test_wrong_input_is_refused_by_name() -> None:
    first, second = GLLinear(SPEC, d_out=5), GLLinear(SPEC, 5, 5)
    x = batch([3], dtype=torch.float32)
    with pytest.raises(SpecError, match="module 4: found none, wanted 'k'"):
        GLLinear(LONGER, d_out=5)(x)
    with pytest.raises(TypeError, match="d_in"):
        first(first(x))
    with pytest.raises(TypeError, match="leave d_in out"):
        second(x)
    with pytest.raises(ShapeError, match=r"found 4 modules of \(4, 4\) rows, wanted 4 modules of \(5, 5\)"):
        second(GLLinear(SPEC, d_out=4)(x))
    with pytest.raises(ShapeError, match="wanted"):
        first.assign([torch.zeros(1)], [torch.zeros(1)])


def test_latents_join_split_balance_and_check() -> None:
    y = GLLinear(SPEC, d_out=(5, 4)).double()(batch(RANKS["mixed"]))
    again = Latent.split(y.joined(), 5, y.ranks)
    assert torch.equal(again.U, y.U) and torch.equal(again.V, y.V)
    for z in (y.balanced(), y.canonical()):
        assert torch.allclose(z.U.mT @ z.U, z.V.mT @ z.V, atol=1e-12)
        assert torch.allclose(z.U @ z.V.mT, y.U @ y.V.mT, atol=1e-12)
        assert not z.joined().mT[~z.mask()].any()
    assert torch.allclose(y.spectra()[0, 0, :4], torch.linalg.svdvals(y.U[0, 0] @ y.V[0, 0].T)[:4])
    assert len(y[1:3]) == 2 and y.to(torch.float32).U.dtype == torch.float32
    with pytest.raises(ShapeError, match="wanted U"):
        Latent(y.U, y.V[..., :1], y.ranks)
    with pytest.raises(ShapeError, match="ranks"):
        Latent(y.U, y.V, y.ranks[:1])
