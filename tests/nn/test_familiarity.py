"""Truncation in the norm that the base feels, against a dense SVD; bounds of what a zoo holds."""

from __future__ import annotations

import pytest
import torch

from lolgen.lora import Batch, ModuleSpec, Spec
from lolgen.nn import Familiarity
from lolgen.testing import assert_invariant, random_lora

SPEC = Spec((ModuleSpec("a", 9, 7), ModuleSpec("b", 8, 7), ModuleSpec("c", 9, 7)))


@pytest.fixture
def moments() -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    found = {}
    for name in SPEC.names:
        X = torch.randn(7, 40, generator=g, dtype=torch.float64) * torch.logspace(0, -2, 7)[:, None]
        found[name] = X @ X.T / 40
    return found


@pytest.fixture
def batch(generator) -> Batch:
    return Batch.stack(
        [random_lora(SPEC, 5, generator=generator, dtype=torch.float64) for _ in range(3)], torch.float64
    )


def test_truncation_is_the_optimum_of_the_weighted_norm(moments, batch):
    made = Familiarity.from_moments(SPEC, moments, ridge=0.0)
    for (_, index), group in zip(SPEC.groups, batch.groups, strict=True):
        ranks = torch.tensor([[2] * len(index), [1] * len(index), [3] * len(index)])
        U, V = made.truncate(group.U, group.V, index, ranks, 4)
        assert U.shape[-1] == V.shape[-1] == 4
        for n in range(3):
            for j in range(len(index)):
                r = int(ranks[n, j])
                assert not U[n, j, :, r:].any() and not V[n, j, :, r:].any()
                delta = group.U[n, j] @ group.V[n, j].T
                root = torch.linalg.cholesky(moments[SPEC.names[index[j]]])  # another root of the same S
                found = torch.linalg.matrix_norm((delta - U[n, j] @ V[n, j].T) @ root)
                best = torch.linalg.svdvals(delta @ root)[r:].square().sum().sqrt()
                assert abs(found - best) < 1e-8 * best
                plain = torch.linalg.svd(delta)
                naive = plain.U[:, :r] * plain.S[:r] @ plain.Vh[:r]
                assert torch.linalg.matrix_norm((delta - naive) @ root) > best * 1.0001, (
                    "the norm must matter"
                )


def test_the_result_does_not_depend_on_the_gauge(moments, batch):
    made = Familiarity.from_moments(SPEC, moments)

    def run(x: Batch) -> Batch:
        ranks = torch.full((len(x), len(SPEC)), 2)
        return x.map(
            lambda U, V: made.truncate(
                U, V, next(i for (s, i) in SPEC.groups if s[0] == U.shape[2]), ranks[:, : U.shape[1]], 5
            )
        )

    assert_invariant(run, batch)
    with pytest.raises(AssertionError):
        assert_invariant(run, batch, off_group=True)


def test_strange_is_what_lies_outside(batch):
    made = Familiarity(SPEC)
    g = torch.Generator().manual_seed(0)
    made.fit(torch.rand(400, 3, generator=g, dtype=torch.float64))
    usual = torch.full((1, 3), 0.5)
    assert made.strange(usual) == [[]]
    assert len(made.strange(torch.tensor([[5.0, 5.0, 5.0]]))[0]) == 3
    assert made.strange(torch.tensor([[-5.0, 0.5, 0.5]])) == [["it is far weaker than any LoRA of the zoo"]]


def test_weighing_makes_plain_norms_the_weighted_ones(moments, batch):
    made = Familiarity.from_moments(SPEC, moments, ridge=0.0)
    weighed = made.weigh(batch)
    for (_, index), group, plain in zip(SPEC.groups, weighed.groups, batch.groups, strict=True):
        for j, m in enumerate(index):
            delta = plain.U[0, j] @ plain.V[0, j].T
            wanted = (delta @ moments[SPEC.names[m]] @ delta.T).trace()
            assert torch.allclose((group.U[0, j] @ group.V[0, j].T).square().sum(), wanted)


def test_saved_and_loaded(tmp_path, moments):
    made = Familiarity.from_moments(SPEC, moments).fit(torch.rand(50, 3))
    made.save_pretrained(tmp_path)
    again = Familiarity.from_pretrained(tmp_path)
    assert torch.equal(made.bounds, again.bounds)
    assert all(torch.equal(a, b) for a, b in zip(made.roots, again.roots, strict=True))
