"""The pieces behind the models, each against an independent reference."""

from __future__ import annotations

import torch
from synthetic import CLASSES, SPEC, make
from torch import Tensor

from lolgen.lora import Batch
from lolgen.tasks import features
from lolgen.tasks.features import Components, cosine_gram, gram, norms
from lolgen.tasks.mlp import flatten
from lolgen.tasks.ours import blend
from lolgen.tasks.reader import FULL, QUICK, Budget, Classes, Reader, choose
from lolgen.tasks.ridge import coefficients

BATCH, Y = make(30, 0)
OTHER, _ = make(9, 1)
LAYOUT = Classes(CLASSES)


def deltas(batch: Batch) -> list[Tensor]:
    """delta W of every module in the spec's order, (N, out, in)."""
    found = {m: g.U[:, j] @ g.V[:, j].mT for g in batch.groups for j, m in enumerate(g.index)}
    return [found[m].double() for m in range(len(batch.spec))]


def flat(batch: Batch) -> Tensor:
    return torch.cat([d.flatten(1) for d in deltas(batch)], dim=1)


def test_norms_are_the_same_by_slices(monkeypatch) -> None:
    whole = norms(make(7, 5)[0])
    for slice_ in (1, 3 * flatten(BATCH).shape[1]):
        monkeypatch.setattr(features, "_SLICE", slice_)
        torch.testing.assert_close(norms(make(7, 5)[0]), whole)
    assert norms(BATCH[:0]).shape == (0,)


def test_gram_is_kept_as_long_as_its_batches() -> None:
    batch = make(5, 3)[0]
    assert gram(batch) is gram(batch)
    assert gram(OTHER, batch) is gram(OTHER, batch)
    torch.testing.assert_close(gram(batch).double(), flat(batch) @ flat(batch).T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(gram(OTHER, batch).double(), flat(OTHER) @ flat(batch).T, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(cosine_gram(batch).diagonal(), torch.ones(5))
    assert norms(batch) is norms(batch) and norms(OTHER) is not norms(batch)
    torch.testing.assert_close(norms(batch).double(), flat(batch).norm(dim=1), rtol=1e-5, atol=1e-6)


def test_components_are_the_principal_components_of_delta_w() -> None:
    x, new = flat(BATCH), flat(OTHER)
    components = Components.fit(gram(BATCH))
    centred = x - x.mean(0)
    _, s, Vh = torch.linalg.svd(centred, full_matrices=False)
    k = len(components.variance)
    assert k == len(BATCH) - 1
    torch.testing.assert_close(components.variance.double(), (s[:k] ** 2 / len(x)), rtol=1e-4, atol=0)
    for rows, K in ((x, gram(BATCH)), (new, gram(OTHER, BATCH))):
        scores, wanted = components.scores(K).double(), (rows - x.mean(0)) @ Vh[:k].T
        torch.testing.assert_close(scores @ scores.T, wanted @ wanted.T, rtol=1e-3, atol=1e-2)


def test_flatten() -> None:
    total = sum((m.out + m.in_flat) * BATCH.rank for m in SPEC)
    assert flatten(BATCH).shape == (len(BATCH), total)


def test_ridge_solves_each_attribute_on_its_visible_rows() -> None:
    K = gram(BATCH)
    weights, offsets = coefficients(K, Y, LAYOUT, 0.3)
    for k, part in enumerate(LAYOUT.slices):
        seen = Y[:, k] >= 0
        target = torch.nn.functional.one_hot(Y[seen, k], part.stop - part.start).double()
        torch.testing.assert_close(offsets[part].double(), target.mean(0))
        A = K[seen][:, seen].double() + 0.3 * K.diagonal().mean() * torch.eye(int(seen.sum()))
        wanted = torch.linalg.solve(A, target - target.mean(0))
        torch.testing.assert_close(weights[seen, part].double(), wanted, rtol=1e-3, atol=1e-5)
        assert not weights[~seen, part].any()


def test_loss_skips_what_cannot_be_seen() -> None:
    scores = torch.randn(30, LAYOUT.total, generator=torch.Generator().manual_seed(0), requires_grad=True)
    LAYOUT.loss(scores, Y).backward()
    assert scores.grad is not None
    assert bool((scores.grad.abs() > 0).eq(LAYOUT.seen(Y)).all())
    hidden = torch.full_like(Y, -1)
    assert float(LAYOUT.loss(scores.detach(), hidden)) == 0.0
    assert LAYOUT.score(scores.detach(), hidden) == 0.0
    assert torch.equal(LAYOUT.calibrate(scores.detach(), hidden), torch.ones(3))


def test_temperature_undoes_a_scale() -> None:
    g = torch.Generator().manual_seed(0)
    scores = torch.randn(4000, LAYOUT.total, generator=g)
    p = LAYOUT.log_probabilities(scores, torch.ones(3)).exp()
    y = torch.stack([torch.multinomial(p[:, s], 1, generator=g)[:, 0] for s in LAYOUT.slices], dim=1)
    assert (LAYOUT.calibrate(scores * 8, y) - 8).abs().max() < 2
    assert abs(LAYOUT.score(scores * 8, y) - LAYOUT.score(scores, y)) < 2e-3


def test_blend_prefers_who_is_right() -> None:
    g = torch.Generator().manual_seed(0)
    guess = LAYOUT.log_probabilities(torch.randn(30, LAYOUT.total, generator=g), torch.ones(3))
    right = LAYOUT.log_probabilities(4 * LAYOUT.targets(Y), torch.ones(3))
    shares = blend(torch.stack([guess, right, guess]), Y, LAYOUT)
    torch.testing.assert_close(shares.sum(0), torch.ones(LAYOUT.total))
    assert (shares[1] > 0.6).all() and (shares[0] < 0.2).all()
    hidden = Y.clone()
    hidden[:, 0] = -1
    torch.testing.assert_close(
        blend(torch.stack([guess, right]), hidden, LAYOUT)[:, :4], torch.full((2, 4), 0.5)
    )


def test_choose_takes_the_least_within_the_budget() -> None:
    tried = []

    def one(config: dict[str, float]) -> tuple[str, float]:
        tried.append(config["a"])
        return f"model {config['a']}", config["a"]

    configurations = [{"a": a} for a in (3.0, 2.0, 1.0)]
    assert choose(configurations, one, None, Budget(2)) == ("model 2.0", {"a": 2.0})
    assert choose(configurations, one, {"a": 9.0}, QUICK) == ("model 9.0", {"a": 9.0})
    assert tried == [3.0, 2.0, 9.0]
    assert FULL.configurations == 4


def test_every_model_is_tuned_over_as_many_configurations() -> None:
    from lolgen.tasks import dense, glnet, kernel, mlp, svd

    for module in (dense, glnet, kernel, mlp, svd):
        assert len(module.CONFIGURATIONS) == FULL.configurations, module


def test_a_reader_reports_probabilities_by_name() -> None:
    scores = torch.randn(9, LAYOUT.total)
    found = Reader(LAYOUT, lambda _: scores, torch.full((3,), 2.0)).predict(OTHER)
    torch.testing.assert_close(found["strength"], (scores[:, 4:6] / 2).softmax(1))
