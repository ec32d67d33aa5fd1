"""The frame of a pair: delta W stays, the gauge is the input's, whatever the ranks."""

from __future__ import annotations

import pytest
import torch

from lolgen import gl, metrics
from lolgen.framing import in_frame, in_frame_batch
from lolgen.lora import Batch
from lolgen.testing import assert_equivariant, random_lora, regauge


def other(batch: Batch, seed: int = 5) -> Batch:
    """Another delta W for every module of a batch, at its ranks, in a gauge of its own."""
    g = torch.Generator().manual_seed(seed)
    names = batch.spec.names
    rows = [
        random_lora(batch.spec, dict(zip(names, r, strict=True)).values(), generator=g, dtype=torch.float64)
        for r in batch.ranks.tolist()
    ]
    return Batch.stack(rows, dtype=batch.groups[0].U.dtype)


@pytest.fixture
def batch(spec, dtype, generator) -> Batch:
    rows = [
        random_lora(spec, r, generator=generator, dtype=dtype)
        for r in ([2] * 8, [1] * 8, [2, 1, 2, 1, 2, 1, 2, 1])
    ]
    return Batch.stack(rows, dtype=dtype)


def test_delta_w_is_the_others_and_the_frame_is_the_inputs(batch):
    wanted = other(batch)
    framed = in_frame_batch(wanted, batch)
    tolerance = 1e-4 if batch.groups[0].U.dtype == torch.float32 else 1e-10
    assert float(metrics.relative_distance(wanted, framed).max()) < tolerance
    assert torch.equal(framed.ranks, batch.ranks)
    for group in framed.groups:
        outside = ~framed.mask(group)[:, :, None]
        assert not (group.U * outside).any() and not (group.V * outside).any()


def test_an_input_framed_by_itself_keeps_its_factors(batch):
    framed = in_frame_batch(batch, batch)
    for a, b in zip(framed.groups, batch.groups, strict=True):
        if a.U.shape[2] < a.U.shape[3]:
            continue  # delta W has less than its rank: the rest of the frame is not in it
        scale = 1e-4 if a.V.dtype == torch.float32 else 1e-9
        assert (a.V - b.V).norm() < scale * b.V.norm() and (a.U - b.U).norm() < scale * b.U.norm()


def test_it_turns_with_the_gauge(batch):
    wanted = other(batch)
    assert_equivariant(lambda x: in_frame_batch(wanted, x), batch)


def test_off_the_group_it_does_not(batch):
    wanted = other(batch)
    with pytest.raises(AssertionError):
        assert_equivariant(lambda x: in_frame_batch(wanted, x), batch, off_group=True)


def test_a_frame_that_is_none_leaves_delta_w(dtype, generator):
    U, V = (torch.randn(n, 3, generator=generator, dtype=dtype) for n in (7, 6))
    flat = torch.randn(6, 1, generator=generator, dtype=dtype).expand(6, 3)
    for V0 in (flat, torch.zeros(6, 3, dtype=dtype)):
        a, b = in_frame(U, V, V0)
        assert torch.allclose(a @ b.mT, U @ V.mT, atol=1e-5)
    wide = torch.randn(2, 3, generator=generator, dtype=dtype)  # more columns than rows
    a, b = in_frame(U, wide.clone(), wide)
    assert torch.allclose(a @ b.mT, U @ wide.mT, atol=1e-5)


def test_a_zero_change_in_a_live_frame(dtype, generator):
    V0 = torch.randn(6, 3, generator=generator, dtype=dtype)
    a, b = in_frame(torch.zeros(7, 3, dtype=dtype), V0, V0)
    assert not a.any() and torch.isfinite(b).all()


def test_a_bad_gauge_costs_its_condition_only(generator):
    U, V = (torch.randn(n, 4, generator=generator, dtype=torch.float64) for n in (9, 8))
    g = gl.random_gauge(rank=4, condition=1e6, generator=generator, dtype=torch.float64)
    _, V0 = gl.act(U, V, g)
    a, b = in_frame(U, V, V0)
    assert (a @ b.mT - U @ V.mT).norm() < 1e-8 * (U @ V.mT).norm()


def test_regauged_inputs_differ_to_begin_with(batch):
    moved, _ = regauge(batch, generator=torch.Generator().manual_seed(0))
    assert (moved.groups[0].U - batch.groups[0].U).norm() > 0.1 * batch.groups[0].U.norm()
