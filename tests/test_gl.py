"""The group and the exact algebra, against numpy on full matrices in float64."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lolgen import gl
from lolgen.errors import LolgenError, ShapeError, SpecError
from lolgen.lora import Batch, Factors, LoRA, ModuleSpec, Spec
from lolgen.testing import BADLY, assert_equivariant, assert_invariant, random_lora, regauge

EXACT = {torch.float32: 1e-6, torch.float64: 1e-13}
"""Relative error of delta W that a change of form may cost, in a well conditioned gauge."""


def allowed(dtype: torch.dtype, condition: float) -> float:
    """In float32 a bad gauge costs nothing; in float64 the reference itself is off by eps * condition."""
    return max(EXACT[dtype], 20 * torch.finfo(torch.float64).eps * condition)


SHAPES = [(12, 10, 4), (10, 30, 1), (6, 9, 6), (5, 40, 16), (3, 2, 8), (1, 7, 3), (80, 70, 64), (1, 1, 1)]
"""(m, n, r): thin, rank 1, full, r > min(m, n), r > max(m, n), one row, rank 64, scalars."""


def delta(U: Tensor, V: Tensor) -> Tensor:
    return U.double() @ V.double().mT


def relative(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted.double()).norm() / wanted.double().norm().clamp(min=1e-300))


def pair(
    shape: tuple[int, int, int], dtype: torch.dtype, seed: int = 0, condition: float = 1.0
) -> tuple[Tensor, Tensor]:
    m, n, r = shape
    generator = torch.Generator().manual_seed(seed)
    U = torch.randn(m, r, generator=generator, dtype=torch.float64)
    V = torch.randn(n, r, generator=generator, dtype=torch.float64)
    g = gl.random_gauge(rank=r, condition=condition, generator=generator, dtype=torch.float64)
    U, V = gl.act(U, V, g)
    return U.to(dtype), V.to(dtype)


def deficient(dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Factors of full rank 4 whose product has rank 2."""
    U, V = pair((12, 10, 4), torch.float64, seed)
    V[:, 2:] = 0
    g = gl.random_gauge(rank=4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    U, V = gl.act(U, V, g)
    return U.to(dtype), V.to(dtype)


every_shape = pytest.mark.parametrize("shape", SHAPES, ids=str)
well_and_badly = pytest.mark.parametrize("badly", [False, True], ids=["well", "badly"])


# The gauge


@pytest.mark.parametrize("rank", [2, 5, 64])
def test_random_gauge_has_its_condition(rank: int, generator: torch.Generator) -> None:
    g = gl.random_gauge(3, 20, rank=rank, condition=1e4, generator=generator, dtype=torch.float64)
    s = torch.linalg.svdvals(g)
    torch.testing.assert_close(
        s[..., 0] / s[..., -1], torch.full((3, 20), 1e4, dtype=torch.float64), rtol=1e-9, atol=0
    )
    assert {1.0, -1.0} == set(torch.linalg.det(g).sign().flatten().tolist())
    orthogonal = gl.random_gauge(4, rank=rank, condition=1, generator=generator, dtype=torch.float64)
    torch.testing.assert_close(
        orthogonal @ orthogonal.mT, torch.eye(rank, dtype=torch.float64).expand(4, -1, -1)
    )


def test_random_gauge_of_rank_1_has_both_signs_and_many_sizes(generator: torch.Generator) -> None:
    g = gl.random_gauge(200, rank=1, condition=100, generator=generator, dtype=torch.float64).flatten()
    assert (g > 0).any() and (g < 0).any() and 0.1 <= g.abs().min() < 0.2 and 5 < g.abs().max() <= 10
    with pytest.raises(ValueError, match="condition"):
        gl.random_gauge(rank=2, condition=0.5)


@every_shape
def test_act_is_a_group_action_that_keeps_delta(shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    U, V = pair(shape, dtype)
    generator = torch.Generator().manual_seed(1)
    g, h = gl.random_gauge(2, rank=shape[2], generator=generator, dtype=dtype)
    moved = gl.act(U, V, g)
    eps = torch.finfo(dtype).eps
    assert moved[0].dtype == dtype and relative(delta(*moved), delta(U, V)) < 100 * eps
    torch.testing.assert_close(moved[0], U @ g.inverse(), rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(moved[1], V @ g.T, rtol=1e-3, atol=1e-3)
    for once, twice in zip(gl.act(U, V, h @ g), gl.act(*moved, h), strict=True):
        assert relative(twice, once) < 1e3 * eps
    # The twin: the transpose on the wrong side is no gauge.
    assert relative(delta(U @ g, V @ g.T), delta(U, V)) > 1e-2


# Canonical, balanced, spectrum


@every_shape
@well_and_badly
def test_canonical(shape: tuple[int, int, int], badly: bool, dtype: torch.dtype) -> None:
    m, n, r = shape
    condition = BADLY[dtype] if badly else 10.0
    U, V = pair(shape, dtype, condition=condition)
    Uc, Vc = gl.canonical(U, V)
    W = delta(U, V)
    assert Uc.shape == U.shape and Vc.shape == V.shape and Uc.dtype == dtype
    exact = allowed(dtype, condition)
    assert relative(delta(Uc, Vc), W) < exact
    S = torch.zeros(r, dtype=torch.float64)
    S[: min(m, n, r)] = torch.linalg.svdvals(W)[:r]
    scale = float(S[0])
    for side in (Uc, Vc):
        gram = side.double().mT @ side.double()
        assert float((gram - S.diag()).abs().max()) < exact * scale * 10
    assert float((gl.spectrum(U, V).double() - S).abs().max()) < exact * scale
    assert (Uc.gather(0, Uc.abs().argmax(0, keepdim=True)) >= 0).all()


@every_shape
@well_and_badly
def test_balance(shape: tuple[int, int, int], badly: bool, dtype: torch.dtype) -> None:
    condition = BADLY[dtype] if badly else 10.0
    U, V = pair(shape, dtype, condition=condition)
    Ub, Vb = gl.balance(U, V)
    exact = allowed(dtype, condition)
    assert Ub.shape == U.shape and Vb.shape == V.shape and Ub.dtype == dtype
    assert relative(delta(Ub, Vb), delta(U, V)) < exact
    left, right = Ub.double().mT @ Ub.double(), Vb.double().mT @ Vb.double()
    assert relative(left, right) < exact
    # The twin: the pair as it was is not balanced.
    assert relative(U.double().mT @ U.double(), V.double().mT @ V.double()) > 1e-2


@pytest.mark.parametrize("shape", [(12, 10, 4), (10, 30, 1), (80, 70, 64), (6, 9, 6)], ids=str)
def test_balance_leaves_balanced_pairs_and_turns_with_rotations(
    shape: tuple[int, int, int], dtype: torch.dtype
) -> None:
    U, V = pair(shape, dtype)
    Ub, Vb = gl.balance(U, V)
    eps = torch.finfo(dtype).eps
    for once, twice in zip((Ub, Vb), gl.balance(Ub, Vb), strict=True):
        assert relative(twice, once) < 100 * eps
    generator = torch.Generator().manual_seed(2)
    Q = gl.random_gauge(rank=shape[2], condition=1, generator=generator, dtype=dtype)
    Ut, Vt = gl.balance(U @ Q, V @ Q)
    assert relative(Ut, Ub @ Q) < 1e3 * eps and relative(Vt, Vb @ Q) < 1e3 * eps
    # The twin: under a gauge that is not a rotation it is not equivariant, only its delta W stays.
    g = gl.random_gauge(rank=shape[2], condition=10, generator=generator, dtype=dtype)
    Ug, Vg = gl.balance(*gl.act(U, V, g))
    assert relative(Ug, gl.act(Ub, Vb, g)[0]) > 1e-2


def test_balance_takes_the_symmetric_gauge() -> None:
    U, V = pair((12, 10, 4), torch.float64)
    Ub, _ = gl.balance(U, V)
    inverse = torch.linalg.lstsq(U, Ub).solution
    torch.testing.assert_close(inverse, inverse.T, rtol=0, atol=1e-12)
    assert (torch.linalg.eigvalsh(inverse) > 0).all()


def test_rank_deficient_and_zero_modules(dtype: torch.dtype) -> None:
    U, V = deficient(dtype)
    # Cast to float32 the product has rank 4 again, by rounding: only float64 shows exact zeros.
    for fn in (gl.canonical, gl.balance):
        Uf, Vf = fn(U, V)
        assert relative(delta(Uf, Vf), delta(U, V)) < EXACT[dtype]
        assert relative(Uf.double().mT @ Uf.double(), Vf.double().mT @ Vf.double()) < EXACT[dtype]
    if dtype == torch.float64:
        assert not gl.canonical(U, V)[0][:, 2:].any() and not gl.spectrum(U, V)[2:].any()
        generator = torch.Generator().manual_seed(3)
        Q = gl.random_gauge(rank=4, condition=1, generator=generator, dtype=dtype)
        assert relative(gl.balance(U @ Q, V @ Q)[0], gl.balance(U, V)[0] @ Q) < 1e-12
    assert gl.effective_rank(U, V, error=1e-5).item() == 2
    zero = torch.zeros(10, 4, dtype=dtype)
    for pair_ in ((U, zero), (zero, zero), (zero, V)):
        for fn in (gl.canonical, gl.balance):
            assert not any(side.any() for side in fn(*pair_))
        assert not gl.spectrum(*pair_).any()
        assert gl.effective_rank(*pair_, error=0).item() == 0


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_lopsided_sizes(size: float) -> None:
    U, V = pair((12, 10, 4), torch.float32)
    for fn in (gl.canonical, gl.balance):
        Uf, Vf = fn(U * size, V / size)
        assert relative(delta(Uf, Vf), delta(U, V)) < 1e-6
        assert 0.1 < Uf.norm() / Vf.norm() < 10


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(half: torch.dtype) -> None:
    U, V = pair((12, 10, 4), half)
    for fn in (gl.canonical, gl.balance):
        Uf, Vf = fn(U, V)
        assert Uf.dtype == half and relative(delta(Uf, Vf), delta(U, V)) < 10 * torch.finfo(half).eps
    assert gl.spectrum(U, V).dtype == half


def test_leading_dimensions_are_a_batch(dtype: torch.dtype) -> None:
    pairs = [pair((9, 7, 3), dtype, seed) for seed in range(6)]
    U, V = (torch.stack(side).view(2, 3, -1, 3) for side in zip(*pairs, strict=True))
    for fn in (gl.canonical, gl.balance, lambda U, V: gl.truncate(U, V, 2)):
        many, one = fn(U, V), [fn(*p) for p in pairs]
        for k in range(2):
            assert relative(many[k].flatten(0, 1), torch.stack([o[k] for o in one])) < EXACT[dtype]
    assert gl.spectrum(U, V).shape == (2, 3, 3)
    empty = gl.canonical(U[:0], V[:0])
    assert empty[0].shape == (0, 3, 9, 3) and gl.spectrum(U[:0], V[:0]).shape == (0, 3, 3)
    with pytest.raises(ShapeError, match="one rank"):
        gl.canonical(U, V[..., :2])


def test_spectrum_gradient_is_that_of_the_singular_values() -> None:
    U, V = (x.requires_grad_() for x in pair((6, 5, 3), torch.float64))
    weights = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    found = torch.autograd.grad((gl.spectrum(U, V) * weights).sum(), (U, V))
    wanted = torch.autograd.grad((torch.linalg.svdvals(U @ V.T)[:3] * weights).sum(), (U, V))
    for f, w in zip(found, wanted, strict=True):
        torch.testing.assert_close(f, w)
    # Zero modules and padding are where a network starts: the gradient must be a number there.
    for B in (torch.zeros(6, 3), torch.nn.functional.pad(torch.ones(6, 1), (0, 2))):
        B = B.double().requires_grad_()
        gl.spectrum(B, V).sum().backward()
        assert B.grad is not None and B.grad.isfinite().all()


def test_balance_and_canonical_have_gradients_of_delta() -> None:
    U, V = (x.requires_grad_() for x in pair((6, 5, 3), torch.float64))
    target = pair((6, 5, 3), torch.float64, seed=1)
    wanted = torch.autograd.grad((U @ V.T * delta(*target)).sum(), (U, V))
    for fn in (gl.canonical, gl.balance):
        Uf, Vf = fn(U, V)
        found = torch.autograd.grad((Uf @ Vf.T * delta(*target)).sum(), (U, V))
        for f, w in zip(found, wanted, strict=True):
            torch.testing.assert_close(f, w)


# Truncation and rank


@every_shape
@pytest.mark.parametrize("rank", [1, 2, 5])
def test_truncate_is_optimal(shape: tuple[int, int, int], rank: int, dtype: torch.dtype) -> None:
    U, V = pair(shape, dtype, condition=10)
    Ut, Vt = gl.truncate(U, V, rank)
    k = min(rank, shape[2])
    assert Ut.shape == (shape[0], k) and Vt.shape == (shape[1], k)
    P, S, Qh = torch.linalg.svd(delta(U, V), full_matrices=False)
    best = (P[:, :rank] * S[:rank]) @ Qh[:rank]
    assert relative(delta(Ut, Vt), best) < EXACT[dtype] * 100
    with pytest.raises(ShapeError, match="rank"):
        gl.truncate(U, V, 0)


def test_pad() -> None:
    U, V = pair((6, 5, 3), torch.float32)
    Up, Vp = gl.pad(U, V, 5)
    assert Up.shape == (6, 5) and Vp.shape == (5, 5) and delta(Up, Vp).equal(delta(U, V))
    with pytest.raises(ShapeError, match="truncate"):
        gl.pad(U, V, 2)


def test_effective_rank() -> None:
    S = torch.tensor([3.0, 2.0, 1.0, 0.1], dtype=torch.float64)
    P, Q = (
        torch.linalg.qr(torch.randn(9, 4, generator=torch.Generator().manual_seed(i)).double())[0]
        for i in range(2)
    )
    U, V = gl.act(P * S, Q, gl.random_gauge(rank=4, dtype=torch.float64))
    total = float(S.square().sum())
    for k in range(1, 5):
        kept = float(S[:k].square().sum()) / total
        assert gl.effective_rank(U, V, energy=kept - 1e-6).item() == k
        assert gl.effective_rank(U, V, energy=min(1.0, kept + 1e-6)).item() == min(k + 1, 4)
        left = (float(S[k:].square().sum()) / total) ** 0.5
        assert gl.effective_rank(U, V, error=left + 1e-6).item() == k
    assert (
        gl.effective_rank(U, V, energy=1).item() == gl.effective_rank(*gl.pad(U, V, 7), error=0).item() == 4
    )
    assert gl.effective_rank(U, V, energy=0).item() == gl.effective_rank(U, V, error=1).item() == 0
    for wrong in ({}, {"energy": 0.5, "error": 0.5}, {"energy": 1.5}, {"error": -1.0}):
        with pytest.raises(ValueError, match="energy|error"):
            gl.effective_rank(U, V, **wrong)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 12),
    st.integers(1, 15),
    st.integers(0, 10**6),
    st.sampled_from([1.0, 1e2, 1e6]),
)
def test_any_shape_rank_and_gauge(m: int, n: int, r: int, seed: int, condition: float) -> None:
    U, V = pair((m, n, r), torch.float64, seed, condition)
    W = delta(U, V)
    for fn in (gl.canonical, gl.balance):
        Uf, Vf = fn(U, V)
        assert relative(delta(Uf, Vf), W) < 1e-13 * condition
        assert relative(Uf.mT @ Uf, Vf.mT @ Vf) < 1e-12
    assert (
        float((gl.spectrum(U, V)[: min(m, n, r)] - torch.linalg.svdvals(W)[:r]).abs().max())
        < 1e-13 * condition * W.norm()
    )


# Procrustes


def test_procrustes_finds_the_rotation(dtype: torch.dtype) -> None:
    U, V = pair((12, 10, 5), dtype)
    generator = torch.Generator().manual_seed(4)
    Q = gl.random_gauge(rank=5, condition=1, generator=generator, dtype=dtype)
    found = gl.procrustes(U, V, U @ Q, V @ Q)
    assert relative(found, Q) < 100 * torch.finfo(dtype).eps
    U0, V0 = pair((12, 10, 5), dtype, seed=9)
    best = gl.procrustes(U, V, U0, V0)
    torch.testing.assert_close(best @ best.T, torch.eye(5, dtype=dtype))

    def apart(R: Tensor) -> float:
        return float((U @ R - U0).square().sum() + (V @ R - V0).square().sum())

    others = gl.random_gauge(50, rank=5, condition=1, generator=generator, dtype=dtype)
    assert all(apart(best) < apart(best @ R) for R in others)
    many = gl.procrustes(U, V, U0.expand(3, -1, -1), V0.expand(3, -1, -1))
    assert many.shape == (3, 5, 5)


# Batches


def batch_of(spec: Spec, dtype: torch.dtype) -> Batch:
    generator = torch.Generator().manual_seed(5)
    ranks = ([4, 3, 6, 1, 8, 5, 2, 3], [1] * 8, [2, 9, 4, 1, 1, 3, 3, 1])
    loras = [
        random_lora(spec, r, zero=("conv_3d",), scale=0.3, generator=generator, dtype=dtype) for r in ranks
    ]
    return Batch.stack(loras, dtype)


def assert_same(x: Batch, y: Batch, tolerance: float) -> None:
    for a, b in zip(x.groups, y.groups, strict=True):
        assert relative(delta(a.U, a.V), delta(b.U, b.V)) < tolerance


def assert_padded(x: Batch) -> None:
    for group in x.groups:
        outside = ~x.mask(group)[:, :, None]
        assert not (group.U * outside).any() and not (group.V * outside).any()


def test_batch_gauge_keeps_padding_and_delta(spec: Spec, dtype: torch.dtype) -> None:
    batch = batch_of(spec, dtype)
    generator = torch.Generator().manual_seed(6)
    gauges = gl.random_gauge_batch(batch, condition=10, generator=generator)
    moved = gl.act_batch(batch, gauges)
    assert_same(moved, batch, 100 * torch.finfo(dtype).eps)
    for before, after in zip(batch.groups, moved.groups, strict=True):
        assert not (after.U * ~batch.mask(before)[:, :, None]).any()
        assert ((after.V - before.V).abs().amax((-2, -1)) > 1e-3).all()


@pytest.mark.parametrize("name", ["canonical", "balance", "truncate"])
def test_batches_agree_with_their_loras(spec: Spec, dtype: torch.dtype, name: str) -> None:
    batch = batch_of(spec, dtype)
    on_batch = {
        "canonical": gl.canonical_batch,
        "balance": gl.balance_batch,
        "truncate": lambda b: gl.truncate_batch(b, 2),
    }[name]
    alone = {"canonical": gl.canonical, "balance": gl.balance, "truncate": lambda U, V: gl.truncate(U, V, 2)}[
        name
    ]
    found = on_batch(batch)
    assert_padded(found)
    assert found.rank == (2 if name == "truncate" else batch.rank)
    assert found.ranks.equal(batch.ranks.clamp(max=2) if name == "truncate" else batch.ranks)
    for lora, original in zip(found.unstack(), batch.unstack(), strict=True):
        for module in spec.names:
            wanted = alone(original[module].U, original[module].V)
            assert relative(lora[module].delta().double(), delta(*wanted)) < 10 * EXACT[dtype]


def test_spectrum_batch_is_in_the_specs_order(spec: Spec, dtype: torch.dtype) -> None:
    batch = batch_of(spec, dtype)
    found = gl.spectrum_batch(batch)
    assert found.shape == (3, 8, 9)
    for i, lora in enumerate(batch.unstack()):
        for j, name in enumerate(spec.names):
            s = torch.linalg.svdvals(lora[name].delta().double())
            k = min(len(s), 9)
            assert float((found[i, j, :k].double() - s[:k]).abs().max()) <= 10 * EXACT[dtype] * float(s[0])
    assert gl.spectrum_batch(Batch.stack([LoRA(Spec(()), {})])).shape == (1, 0, 0)


def test_procrustes_batch_aligns_within_true_ranks(spec: Spec, dtype: torch.dtype) -> None:
    batch = gl.balance_batch(batch_of(spec, dtype))
    generator = torch.Generator().manual_seed(7)
    turned = gl.act_batch(batch, gl.random_gauge_batch(batch, condition=1, generator=generator))
    aligned = gl.rotate_batch(turned, gl.procrustes_batch(turned, batch))
    eps = torch.finfo(dtype).eps
    for a, b in zip(aligned.groups, batch.groups, strict=True):
        assert relative(a.U, b.U) < 1e3 * eps and relative(a.V, b.V) < 1e3 * eps
    # Towards one target of other ranks, zero modules included: padding stays, delta W stays.
    target = Batch.stack([random_lora(spec, 11, generator=generator, dtype=dtype)], dtype)
    Q = gl.procrustes_batch(batch, target)
    rotated = gl.rotate_batch(batch, Q)
    assert_same(rotated, batch, 100 * eps)
    for group in rotated.groups:
        outside = ~batch.mask(group)[:, :, None]
        assert not (group.U * outside).any() and not (group.V * outside).any()
    for q in Q:
        torch.testing.assert_close(q @ q.mT, torch.eye(batch.rank, dtype=dtype).expand_as(q))
    with pytest.raises(SpecError):
        gl.procrustes_batch(batch, Batch.stack([LoRA(Spec(()), {})]))


def test_procrustes_batch_keeps_a_rank_deficient_module_out_of_its_padding(dtype: torch.dtype) -> None:
    spec = Spec((ModuleSpec("a", 12, 10), ModuleSpec("b", 12, 10)))
    generator = torch.Generator().manual_seed(12)
    U, V = gl.balance(*deficient(torch.float64))  # rank 4, with a product of rank 2, padded to 7 by "b"
    lora = random_lora(spec, (4, 7), generator=generator, dtype=torch.float64)
    batch = Batch.stack([lora.replace({**lora.factors, "a": Factors(U, V.T)})], dtype)
    target = Batch.stack([random_lora(spec, 7, generator=generator, dtype=dtype)], dtype)
    assert_padded(gl.rotate_batch(batch, gl.procrustes_batch(batch, target)))


def test_symmetry_of_what_is_built_here(spec: Spec, lora: LoRA, dtype: torch.dtype) -> None:
    batch = batch_of(spec, dtype)
    assert_invariant(gl.spectrum_batch, batch)
    assert_invariant(gl.balance_batch, batch)
    assert_invariant(lambda x: gl.truncate_batch(x, 2), batch, slack=500)
    assert_invariant(lambda x: gl.resize(x, 2), lora, slack=500)
    assert_equivariant(lambda x: gl.scale(x, 2.0), lora)
    for fn in (gl.spectrum_batch, gl.balance_batch, lambda x: gl.truncate_batch(x, 2)):
        with pytest.raises(AssertionError):
            assert_invariant(fn, batch, off_group=True)
    with pytest.raises(AssertionError):
        assert_equivariant(lambda x: gl.scale(x, 2.0), lora, off_group=True)


# LoRAs


def deltas(lora: LoRA) -> dict[str, Tensor]:
    return {
        n: f.delta().double() if f.B.dtype != torch.float16 else f.to(torch.float64).delta()
        for n, f in lora.factors.items()
    }


def test_scale_and_add_are_exact(
    spec: Spec, lora: LoRA, dtype: torch.dtype, generator: torch.Generator
) -> None:
    other = random_lora(spec, 2, scale=3.0, generator=generator, dtype=dtype)
    total = gl.add([lora, other, gl.scale(lora, -1)], [1.0, -0.5, 2.0])
    assert total.ranks == {n: 2 * r + 2 for n, r in lora.ranks.items()} and total.dtype == dtype
    a, b = deltas(lora), deltas(other)
    for name, found in deltas(total).items():
        size = float(a[name].norm() + b[name].norm())
        assert float((found - (-a[name] - 0.5 * b[name])).norm()) < 10 * torch.finfo(dtype).eps * size
    scaled = gl.scale(lora, 2.5)
    assert scaled["embed"].B is lora["embed"].B and scaled["embed"].scale == pytest.approx(0.37 * 2.5)


def test_add_unites_modules_and_widens_half_precision(generator: torch.Generator) -> None:
    a = random_lora(
        Spec((ModuleSpec("x", 4, 3), ModuleSpec("y", 2, 3))), 1, generator=generator, dtype=torch.float16
    )
    b = random_lora(Spec((ModuleSpec("z", 5, 3), ModuleSpec("y", 2, 3))), 2, scale=1 / 3, generator=generator)
    total = gl.add([a, b])
    assert total.names == ("x", "y", "z") and total.ranks == {"x": 1, "y": 3, "z": 2}
    assert gl.add([gl.scale(a, 1 / 3)]).dtype == torch.float32
    assert relative(total["y"].delta(), a["y"].to(torch.float32).delta() + b["y"].delta()) < 1e-6


def test_add_refuses(generator: torch.Generator) -> None:
    a = random_lora(Spec((ModuleSpec("x", 4, 9),)), 1, generator=generator)
    with pytest.raises(ShapeError, match="'x' of LoRA 1: found conv"):
        gl.add([a, random_lora(Spec((ModuleSpec("x", 4, 1, (3, 3), "conv"),)), 1, generator=generator)])
    with pytest.raises(LolgenError, match="magnitude"):
        gl.add([a, LoRA(a.spec, a.factors, extras={"x.magnitude": torch.ones(4)})])
    with pytest.raises(SpecError):
        gl.add([])
    with pytest.raises(ValueError, match="weights"):
        gl.add([a], [1.0, 2.0])


def test_resize_to_a_rank(lora: LoRA, dtype: torch.dtype) -> None:
    lora = LoRA(lora.spec, lora.factors, {"note": "x"}, {"e": torch.ones(2)})
    small, large = gl.resize(lora, 2), gl.resize(lora, 64)
    assert set(small.ranks.values()) == {2} and set(large.ranks.values()) == {64}
    assert small.metadata == {"note": "x"} and "e" in small.extras and small.dtype == dtype
    for name, W in deltas(lora).items():
        P, S, Qh = torch.linalg.svd(W, full_matrices=False)
        best = (P[:, :2] * S[:2]) @ Qh[:2]
        size = float(W.norm())
        assert float((deltas(small)[name] - best).norm()) <= 100 * EXACT[dtype] * size
        assert float((deltas(large)[name] - W).norm()) <= EXACT[dtype] * size
    some = gl.resize(lora, {"embed": 1})
    assert some.ranks == {**lora.ranks, "embed": 1}


def test_resize_to_an_error(lora: LoRA) -> None:
    found = gl.resize(lora, error=0.3)
    for name, W in deltas(lora).items():
        S = torch.linalg.svdvals(W)
        tail = [float(S[k:].norm()) for k in range(len(S) + 1)]
        wanted = next(k for k in range(len(S) + 1) if tail[k] <= 0.3 * tail[0])
        assert found.ranks[name] == max(1, wanted)
    assert max(gl.resize(lora, 2, energy=0.999).ranks.values()) == 2
    assert gl.resize(lora, energy=1.0).ranks["gate"] == 1
    for wrong in ({}, {"energy": 0.5, "error": 0.1}):
        with pytest.raises(ValueError, match="energy"):
            gl.resize(lora, **wrong)
    with pytest.raises(ShapeError, match="rank 0"):
        gl.resize(lora, 0)
    with pytest.raises(SpecError, match="nothing"):
        gl.resize(lora, {"nothing": 2})


def test_forms_of_a_lora(lora: LoRA, dtype: torch.dtype) -> None:
    moved, _ = regauge(lora, condition=10, generator=torch.Generator().manual_seed(8))
    for fn in (gl.canonical_lora, gl.balance_lora):
        found = fn(moved)
        assert found.ranks == lora.ranks and found.dtype == dtype
        for name, W in deltas(moved).items():
            assert float((deltas(found)[name] - W).norm()) <= EXACT[dtype] * float(W.norm())
            f = found[name]
            assert f.scale == 1 and relative(f.B.T @ f.B, f.A @ f.A.T) < 10 * EXACT[dtype]


def test_balancing_saves_half_precision() -> None:
    U, V = pair((12, 10, 4), torch.float64)
    lora = LoRA(Spec((ModuleSpec("m", 12, 10),)), {"m": Factors(U * 1e-7, V.T * 1e7)})
    W = delta(U, V)
    saved = gl.balance_lora(lora).to(torch.float16).to(torch.float64)
    assert relative(saved["m"].delta(), W) < 2e-3
    lost = lora.to(torch.float16).to(torch.float64)["m"].delta()
    assert not relative(lost, W) < 0.1
