"""The paper's GL-net: invariant, plain and gated, and the gate itself against its formula."""

from __future__ import annotations

import pytest
import torch

from lolgen.errors import SpecError
from lolgen.lora import Batch
from lolgen.nn import GLNet, GLNetConfig, Latent
from lolgen.nn.glnet import sign_gate
from lolgen.testing import assert_invariant, random_lora

from .tiny import LONGER, RANKS, SPEC, batch


@pytest.mark.parametrize(
    "gate, layers, transformer", [(False, 1, False), (True, 1, False), (True, 2, False), (False, 2, True)]
)
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_gl_net_is_invariant(ranks: list[int], gate: bool, layers: int, transformer: bool) -> None:
    config = GLNetConfig(outputs=3, d=4, layers=layers, gate=gate, hidden=8, transformer=transformer)
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.float64):
        net = GLNet(SPEC, config).to(dtype).eval()
        x = batch(ranks, zero=("conv",), dtype=dtype)
        net.fit(x)
        assert net(x).shape == (len(x), 3)
        # The gate jumps where a row sum crosses zero, which rounding in a bad gauge may do in float32.
        conditions = (10.0,) if gate and dtype == torch.float32 else None
        assert_invariant(net, x, conditions=conditions, slack=500)
        with pytest.raises(AssertionError):
            assert_invariant(net, x, off_group=True)
        assert torch.allclose(net(x.padded(10)), net(x), atol=1e-5)


def test_gate_is_the_papers_formula() -> None:
    g = torch.Generator().manual_seed(0)
    U, V = torch.randn(2, 3, 4, 2, generator=g), torch.randn(2, 3, 5, 2, generator=g)
    x = sign_gate(Latent(U, V, torch.full((2, 3), 2)))
    delta = U @ V.mT
    assert torch.allclose(x.U, U * delta.sum(-1).sign().relu()[..., None])
    assert torch.allclose(x.V, V * delta.sum(-2).sign().relu()[..., None])
    assert (x.U == 0).any() and (x.U != 0).any()


def test_transformer_head_tells_modules_apart() -> None:
    torch.manual_seed(0)
    net = GLNet(SPEC, GLNetConfig(outputs=2, d=4, hidden=8, transformer=True)).eval()
    x = torch.randn(3, len(SPEC), 16)
    assert net.head(x.flatten(1)).shape == (3, 2)
    assert not torch.allclose(net.head(x.flatten(1)), net.head(x.flip(1).flatten(1)))


def test_scale_and_spec() -> None:
    net, x = GLNet(SPEC, GLNetConfig(outputs=1, d=4, hidden=8)), batch([2] * 70, dtype=torch.float32)
    net.fit(x)
    assert torch.allclose((net.products(x) / net.scale).square().mean(), torch.ones(()))
    net.fit(batch([2], zero=SPEC.names, dtype=torch.float32))
    assert net.scale == 1
    with pytest.raises(SpecError, match="module 4"):
        net(Batch.stack([random_lora(LONGER, 2)]))
