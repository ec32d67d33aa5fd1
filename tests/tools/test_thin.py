"""The shared algebra: orthonormal bases by two roads, and SVDs of sums against dense ones."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lolgen import gl
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec
from lolgen.testing import regauge
from lolgen.tools import thin
from lolgen.tools.thin import Term, decompose, frames, orthonormal
from lolgen.tools.workers import each
from tools.dense import EVERY_KIND, RANKS_B, best, delta, draw, relative


def columns(condition: float, m: int = 30, k: int = 6, seed: int = 0) -> Tensor:
    """(m, k) with singular values from 1 down to 1 / condition."""
    g = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(m, k, generator=g, dtype=torch.float64))[0]
    P = torch.linalg.qr(torch.randn(k, k, generator=g, dtype=torch.float64))[0]
    return Q * torch.logspace(0, -torch.tensor(condition).log10().item(), k, dtype=torch.float64) @ P


def test_orthonormal_bases_of_every_condition() -> None:
    dead = columns(10)
    dead[:, 2] = 0
    cases = {
        "good": (columns(10), False),
        "scaled": (columns(10) * torch.logspace(0, 12, 6, dtype=torch.float64), False),
        "bad": (columns(1e9), True),
        "twice": (columns(10)[:, [0, 1, 2, 3, 4, 4]], True),
        "dead column": (dead, True),
        "zero": (torch.zeros(30, 6, dtype=torch.float64), True),
    }
    X = torch.stack([x for x, _ in cases.values()])
    side = orthonormal(X)
    Q = side.lift(X, torch.eye(6, dtype=torch.float64).expand(len(X), 6, 6))
    for j, (name, (x, householder)) in enumerate(cases.items()):
        assert (j in side.dense) == householder, name
        assert (Q[j].mT @ Q[j] - torch.eye(6)).abs().max() < 1e-8, name
        assert (Q[j] @ side.R[j] - x).norm() <= 1e-12 * x.norm(), name


def test_more_columns_than_rows() -> None:
    X = torch.randn(2, 3, 7, dtype=torch.float64)
    side = orthonormal(X)
    Q = side.lift(X, torch.eye(3, dtype=torch.float64).expand(2, 3, 3))
    assert torch.allclose(Q @ side.R, X) and torch.allclose(Q.mT @ Q, torch.eye(3, dtype=torch.float64))


@pytest.mark.parametrize("chunk", [1, 400, thin._CHUNK])
def test_the_svd_of_a_sum_is_the_dense_one(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "_CHUNK", chunk)
    a, b = draw(), draw(ranks=RANKS_B, seed=1, zero=("attn.to_v",))
    terms = {n: [Term(0, a[n]), Term(1, b[n])] for n in EVERY_KIND.names}
    found = decompose(terms, [0.6, -1.4])
    assert list(found.spectra) == list(EVERY_KIND.names)
    for name, S in found.spectra.items():
        wanted = torch.linalg.svdvals(0.6 * delta(a, name) - 1.4 * delta(b, name))
        k = min(len(S), len(wanted))
        assert torch.allclose(S[:k], wanted[:k], rtol=1e-10, atol=1e-12 * float(wanted[0]))
        assert not S[k:].any() and float(wanted[k:].sum()) < 1e-12


def test_threads_change_no_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(thin, "_CHUNK", 400)
    lora = draw()
    terms = {n: [Term(0, f)] for n, f in lora.factors.items()}
    dtypes = dict.fromkeys(lora.names, torch.float64)
    made = []
    for n in (1, 3):
        torch.set_num_threads(n)
        try:
            made.append(decompose(terms, [1.0]).truncate(dict.fromkeys(lora.names, 2), dtypes))
            assert torch.get_num_threads() == n
        finally:
            torch.set_num_threads(1)
    for name in lora.names:
        assert torch.equal(made[0][name].factors.B, made[1][name].factors.B)
        assert torch.equal(made[0][name].factors.A, made[1][name].factors.A)


def test_what_fails_in_a_thread_is_raised() -> None:
    def fail(x: int) -> int:
        if x == 2:
            raise ValueError(x)
        return x

    for n in (1, 2):
        torch.set_num_threads(n)
        try:
            with pytest.raises(ValueError, match="2"):
                list(each(fail, range(9), ""))
        finally:
            torch.set_num_threads(1)


def test_modules_of_one_shape_and_rank_are_one_batch() -> None:
    spec = Spec(tuple(ModuleSpec(f"m{i}", 12, 10 + i % 2) for i in range(6)))
    lora = draw(spec, 3)
    assert [f.names for f in frames({n: [Term(0, f)] for n, f in lora.factors.items()})] == [
        ("m0", "m2", "m4"),
        ("m1", "m3", "m5"),
    ]


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e4, 1e6])
def test_truncation_is_optimal_in_any_gauge(condition: float) -> None:
    spec = Spec((ModuleSpec("m", 40, 50), ModuleSpec("n", 40, 50)))
    lora = draw(spec, 8)
    moved, _ = regauge(lora, condition=condition, generator=torch.Generator().manual_seed(1))
    found = decompose({n: [Term(0, f)] for n, f in moved.factors.items()}, [1.0])
    for k in (1, 3, 7):
        made = found.truncate({"m": k, "n": 8}, {"m": torch.float64, "n": torch.float64})
        W = delta(lora, "m")
        optimum = relative(best(W, k), W)
        error = relative(made["m"].factors.delta(), W)
        assert optimum * (1 - 1e-9) <= error <= optimum * (1 + 1e-7) + 1e-12 * condition
        assert relative(made["n"].factors.delta(), delta(lora, "n")) < 1e-12 * condition


def test_a_tail_near_rounding_is_still_cut_optimally() -> None:
    """Singular values from 1 to 1e-7, in a gauge near the limit: at most 1e-5 above the optimum."""
    g = torch.Generator().manual_seed(0)
    U = torch.linalg.qr(torch.randn(60, 6, generator=g, dtype=torch.float64))[0]
    V = torch.linalg.qr(torch.randn(50, 6, generator=g, dtype=torch.float64))[0]
    S = torch.tensor([1, 0.5, 1e-2, 1e-4, 1e-6, 1e-7], dtype=torch.float64)
    W = U * S @ V.mT
    for seed in range(5):
        h = gl.random_gauge(
            rank=6, condition=1e3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        )
        B, A = torch.linalg.solve(h, U * S, left=False), h @ V.mT
        found = decompose({"m": [Term(0, Factors(B, A))]}, [1.0])
        for k in range(1, 6):
            made = found.truncate({"m": k}, {"m": torch.float64})["m"].factors.delta()
            assert float((made - W).norm()) <= float(S[k:].norm()) * (1 + 1e-5)


def test_canonical_form_is_balanced_and_one_gauge_is_as_good_as_another() -> None:
    lora = draw(dtype=torch.float64)
    files = []
    for seed in range(2):
        moved, _ = regauge(lora, generator=torch.Generator().manual_seed(seed))
        found = decompose({n: [Term(0, f)] for n, f in moved.factors.items()}, [1.0])
        files.append(found.truncate(dict.fromkeys(lora.names, 2), dict.fromkeys(lora.names, torch.float64)))
    for name in lora.names:
        one, two = files[0][name].factors, files[1][name].factors
        assert torch.allclose(one.B, two.B, atol=1e-9) and torch.allclose(one.A, two.A, atol=1e-9)
        assert torch.allclose(one.B.mT @ one.B, one.A @ one.A.mT, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_rounding_that_is_reported_is_the_rounding_that_happened(dtype: torch.dtype) -> None:
    lora = draw()
    terms = {n: [Term(0, f)] for n, f in lora.factors.items()}
    made = decompose(terms, [1.0]).truncate(lora.ranks, dict.fromkeys(lora.names, dtype))
    for name in lora.names:
        assert made[name].factors.B.dtype == dtype
        rounded = LoRA(Spec((lora.spec[name],)), {name: made[name].factors})
        error = float((delta(rounded, name) - delta(lora, name)).norm())
        assert made[name].rounding ** 0.5 == pytest.approx(error, rel=1e-6)
