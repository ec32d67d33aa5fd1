"""Inner products, norms and distances against full delta W in float64."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from lolgen import gl, metrics
from lolgen.errors import ShapeError, SpecError
from lolgen.lora import Batch, LoRA, ModuleSpec, Spec
from lolgen.testing import BADLY, assert_invariant, random_lora, regauge

RANKS = ([4, 3, 6, 1, 8, 5, 2, 3], [1] * 8, [2, 9, 4, 1, 1, 3, 3, 1], [3] * 8)


def several(spec: Spec, dtype: torch.dtype, seed: int = 0) -> list[LoRA]:
    generator = torch.Generator().manual_seed(seed)
    return [
        random_lora(spec, r, zero=("conv_3d",), scale=0.5 + i, generator=generator, dtype=dtype)
        for i, r in enumerate(RANKS)
    ]


def dense(lora: LoRA, name: str) -> Tensor:
    f = lora[name]
    return f.scale * (f.B.double() @ f.A.double())


def flat(lora: LoRA, S: dict[str, Tensor] | None = None, names: tuple[str, ...] | None = None) -> Tensor:
    """All delta W in one vector, in which S has become part of the entries: |dW|_S = |dW S^1/2|."""
    parts = []
    for name in names or lora.names:
        if name not in lora.spec:
            continue
        W = dense(lora, name)
        if S is not None and name in S:
            values, vectors = torch.linalg.eigh(S[name].double())
            W = W @ vectors * values.clamp(min=0).sqrt()
        parts.append(W.flatten())
    return torch.cat(parts)


def weights(spec: Spec) -> dict[str, Tensor]:
    """Positive semidefinite, one of low rank; two modules of one shape, one of them without."""
    generator = torch.Generator().manual_seed(11)
    found = {}
    for name, columns in (("attn.to_q", 20), ("conv_in", 5), ("embed", 60)):
        x = torch.randn(spec[name].in_flat, columns, generator=generator, dtype=torch.float64)
        found[name] = x @ x.T / columns
    return found


@pytest.fixture(params=[False, True], ids=["plain", "weighted"])
def S(request: pytest.FixtureRequest, spec: Spec) -> dict[str, Tensor] | None:
    return weights(spec) if request.param else None


def test_pairs_of_loras(spec: Spec, dtype: torch.dtype, S: dict[str, Tensor] | None) -> None:
    a, b, *_ = several(spec, dtype)
    x, y = flat(a, S), flat(b, S)
    exact = {"rel": 1e-12}
    assert metrics.inner(a, b, S) == pytest.approx(float(x @ y), abs=1e-12 * float(x.norm() * y.norm()))
    assert metrics.norm(a, S) == pytest.approx(float(x.norm()), **exact)
    assert metrics.distance(a, b, S) == pytest.approx(float((x - y).norm()), **exact)
    assert metrics.squared_distance(a, b, S) == pytest.approx(float((x - y).square().sum()), **exact)
    assert metrics.relative_distance(a, b, S) == pytest.approx(float((x - y).norm() / x.norm()), **exact)
    assert metrics.cosine(a, b, S) == pytest.approx(float(x @ y / x.norm() / y.norm()), abs=1e-12)
    assert isinstance(metrics.cosine(a, b), float)


def test_batches_row_by_row(spec: Spec, dtype: torch.dtype, S: dict[str, Tensor] | None) -> None:
    first, second = several(spec, dtype), several(spec, dtype, seed=1)
    a, b = Batch.stack(first, dtype), Batch.stack(second, dtype)
    one = Batch.stack(second[:1], dtype)
    for fn in (
        metrics.inner,
        metrics.cosine,
        metrics.distance,
        metrics.relative_distance,
        metrics.squared_distance,
    ):
        # The batch folds the scale into U in its own dtype; so does the reference.
        x, y = a.unstack(), b.unstack()
        for other, rows in ((b, y), (one, y[:1] * 4)):
            found = fn(a, other, S)
            assert found.shape == (4,) and found.dtype == torch.float64
            wanted = torch.tensor([fn(p, q, S) for p, q in zip(x, rows, strict=True)], dtype=torch.float64)
            torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12)
        assert fn(one, a, S).shape == (4,)
    torch.testing.assert_close(metrics.norm(a, S).tolist(), [metrics.norm(x, S) for x in a.unstack()])


def test_modules_are_matched_by_name(spec: Spec, dtype: torch.dtype) -> None:
    a, b, *_ = several(spec, dtype)
    keep = ("gate", "embed", "conv_in")
    small_spec = Spec((*(spec[n] for n in keep), ModuleSpec("extra", 3, 4)))
    extra = random_lora(
        Spec((small_spec["extra"],)), 2, generator=torch.Generator().manual_seed(1), dtype=dtype
    )
    small = LoRA(small_spec, {**{n: b[n] for n in keep}, "extra": extra["extra"]})
    x, y = flat(a, names=keep), flat(small, names=keep)
    inner = float(x @ y)
    squared = float(flat(a).square().sum() + flat(small).square().sum() - 2 * inner)
    for p, q in ((a, small), (Batch.stack([a, a], dtype), Batch.stack([small], dtype))):
        assert torch.as_tensor(metrics.inner(p, q)).tolist() == pytest.approx(
            inner if isinstance(p, LoRA) else [inner] * 2, rel=1e-5, abs=1e-5
        )
        assert torch.as_tensor(metrics.squared_distance(p, q)).tolist() == pytest.approx(
            squared if isinstance(p, LoRA) else [squared] * 2, rel=1e-5
        )
        assert torch.as_tensor(metrics.squared_distance(q, p)).tolist() == pytest.approx(
            squared if isinstance(p, LoRA) else [squared] * 2, rel=1e-5
        )
    assert metrics.inner(a, extra) == metrics.cosine(a, extra) == 0.0
    assert metrics.squared_distance(a, extra) == pytest.approx(
        float(flat(a).square().sum() + flat(extra).square().sum())
    )


def test_zero_loras(spec: Spec) -> None:
    a = several(spec, torch.float64)[0]
    zero = gl.scale(a, 0.0)
    assert metrics.cosine(a, zero) == metrics.norm(zero) == metrics.relative_distance(zero, zero) == 0.0
    assert (
        metrics.relative_distance(a, zero) == pytest.approx(1.0)
        and metrics.relative_distance(zero, a) == math.inf
    )
    A, Z = Batch.stack([a, a], torch.float64), Batch.stack([zero, zero], torch.float64)
    assert (
        metrics.cosine(A, Z).tolist()
        == metrics.norm(Z).tolist()
        == metrics.relative_distance(Z, Z).tolist()
        == [0, 0]
    )
    assert metrics.relative_distance(Z, A).tolist() == [math.inf] * 2
    nothing = LoRA(Spec(()), {})
    assert metrics.norm(nothing) == metrics.distance(nothing, nothing) == 0.0
    assert metrics.distance(a, nothing) == pytest.approx(metrics.norm(a))


def test_near_copies_are_told_apart(spec: Spec, dtype: torch.dtype) -> None:
    a = several(spec, torch.float64)[0]
    near = gl.add([a, gl.scale(several(spec, torch.float64)[1], 1e-11)])
    wanted = 1e-11 * metrics.norm(several(spec, torch.float64)[1])
    assert metrics.distance(a, near) == pytest.approx(wanted, rel=1e-3)
    assert metrics.distance(a, a) < 1e-14 * metrics.norm(a)
    moved, _ = regauge(a.to(dtype), condition=10, generator=torch.Generator().manual_seed(1))
    assert metrics.relative_distance(a.to(dtype), moved) < 20 * torch.finfo(dtype).eps
    assert metrics.cosine(a.to(dtype), moved) == pytest.approx(1, abs=1e-12)
    off, _ = regauge(a.to(dtype), off_group=True, generator=torch.Generator().manual_seed(1))
    assert metrics.relative_distance(a.to(dtype), off) > 0.1


def test_metrics_are_invariant(spec: Spec, dtype: torch.dtype, S: dict[str, Tensor] | None) -> None:
    loras = several(spec, dtype)
    batch, fixed = Batch.stack(loras, dtype), Batch.stack(several(spec, dtype, seed=1), dtype)
    a, b = loras[0], loras[1]
    for on_batch in (
        lambda x: metrics.inner(x, fixed, S),
        lambda x: metrics.norm(x, S),
        lambda x: metrics.distance(x, fixed, S),
        lambda x: metrics.gram(x, fixed, S=S),
        lambda x: metrics.gram(x, S=S, per_module=True),
    ):
        assert_invariant(on_batch, batch)
        with pytest.raises(AssertionError):
            assert_invariant(on_batch, batch, off_group=True)
    assert_invariant(lambda x: [metrics.inner(x, b, S), metrics.cosine(x, b, S), metrics.norm(x, S)], a)
    with pytest.raises(AssertionError):
        assert_invariant(lambda x: metrics.norm(x, S), a, off_group=True)


def test_a_bad_gauge_costs_its_condition_once() -> None:
    """By Gram matrices of the factors as they are it would cost the square, 1e-4 here."""
    spec = Spec((ModuleSpec("m", 30, 20),))
    a = random_lora(spec, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved, _ = regauge(a, condition=BADLY[torch.float64], generator=torch.Generator().manual_seed(3))
    own = dense(moved, "m").norm()
    assert metrics.norm(moved) == pytest.approx(float(own), rel=1e-9)
    f = moved["m"]
    plain = ((f.U.T @ f.U) * (f.V.T @ f.V)).sum().sqrt()
    assert abs(metrics.norm(moved) - own) < abs(plain - own)


def test_gram(
    spec: Spec, dtype: torch.dtype, S: dict[str, Tensor] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    x, y = Batch.stack(several(spec, dtype), dtype), Batch.stack(several(spec, dtype, seed=1)[:3], dtype)
    X = torch.stack([flat(lora, S) for lora in x.unstack()])
    Y = torch.stack([flat(lora, S) for lora in y.unstack()])
    wanted = {"cross": X @ Y.T, "own": X @ X.T}
    exact = {"rtol": 1e-10, "atol": 1e-10}
    # Whole, then in blocks of one LoRA, then of two.
    for block in (1 << 18, 1, 4 * 81):
        monkeypatch.setattr(metrics, "_BLOCK", block)
        torch.testing.assert_close(metrics.gram(x, y, S=S), wanted["cross"], **exact)
        torch.testing.assert_close(metrics.gram(x, S=S), wanted["own"], **exact)
        modules = metrics.gram(x, y, S=S, per_module=True)
        assert modules.shape == (8, 4, 3)
        torch.testing.assert_close(modules.sum(0), wanted["cross"], **exact)
    for i, name in enumerate(spec.names):
        X1 = torch.stack([flat(lora, S, (name,)) for lora in x.unstack()])
        Y1 = torch.stack([flat(lora, S, (name,)) for lora in y.unstack()])
        torch.testing.assert_close(modules[i], X1 @ Y1.T, **exact)
    single = metrics.gram(x, S=S, dtype=torch.float32)
    assert single.dtype == torch.float32 and single.equal(single.T)
    torch.testing.assert_close(
        single.double(), wanted["own"], rtol=1e-5, atol=1e-5 * float(wanted["own"].max())
    )
    assert metrics.gram(x[:0], y).shape == (0, 3)


def test_gradients_are_those_of_the_dense_loss(spec: Spec) -> None:
    a = Batch.stack(several(spec, torch.float64), torch.float64)
    b = Batch.stack(several(spec, torch.float64, seed=1), torch.float64)
    for g in a.groups:
        g.U.requires_grad_(), g.V.requires_grad_()
    factors = [t for g in a.groups for t in (g.U, g.V)]
    found = torch.autograd.grad(metrics.squared_distance(a, b).sum() + metrics.inner(a, b).sum(), factors)
    loss = sum(
        ((x.U @ x.V.mT - y.U @ y.V.mT) ** 2).sum() + ((x.U @ x.V.mT) * (y.U @ y.V.mT)).sum()
        for x, y in zip(a.groups, b.groups, strict=True)
    )
    assert isinstance(loss, Tensor)
    for f, w in zip(found, torch.autograd.grad(loss, factors), strict=True):
        torch.testing.assert_close(f, w)


def test_what_cannot_be_compared(spec: Spec) -> None:
    loras = several(spec, torch.float32)
    batch = Batch.stack(loras)
    other = random_lora(Spec((ModuleSpec("gate", 2, 10),)), 1)
    with pytest.raises(ShapeError, match="'gate': found \\(2, 10\\)"):
        metrics.inner(loras[0], other)
    with pytest.raises(SpecError, match="4 and 2"):
        metrics.inner(batch, batch[:2])
    with pytest.raises(SpecError):
        metrics.gram(batch, Batch.stack([other]))
    with pytest.raises(TypeError, match="two LoRAs"):
        metrics.inner(batch, loras[0])  # type: ignore[call-overload]
    with pytest.raises(ShapeError, match="S of module 'gate'"):
        metrics.norm(batch, {"gate": torch.eye(3)})
