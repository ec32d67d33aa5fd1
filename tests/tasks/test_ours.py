"""lolgen's reader: each tier of its features keeps the symmetry that it states and no more; it survives the shelf."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from synthetic import CLASSES, SPEC, make
from torch import Tensor

from lolgen import gl
from lolgen.errors import LolgenError
from lolgen.lora import Batch
from lolgen.tasks import ours, shelf
from lolgen.tasks.reader import Budget, Numbers
from lolgen.tasks.traits import Ears, Traits, sizes

TRAIN, VALIDATION, TEST = make(160, 0), make(60, 1), make(80, 2)
BUDGET = Budget(configurations=1, epochs=0.2)


def moved(batch: Batch, draw: Callable[[int], Tensor]) -> Batch:
    """Each module of each LoRA in a gauge (r, r) that `draw` gives for its number."""
    groups = []
    for k, g in enumerate(batch.groups):
        N, M = g.U.shape[:2]
        gauge = torch.stack([draw(k * 10_000 + i) for i in range(N * M)]).view(N, M, *draw(0).shape)
        groups.append(type(g)(g.index, g.U @ torch.linalg.inv(gauge.to(g.U)), g.V @ gauge.to(g.V).mT))
    return Batch(batch.spec, groups, batch.ranks)


def general(i: int) -> Tensor:
    return gl.random_gauge(rank=3, condition=1e3, generator=torch.Generator().manual_seed(i)).reshape(3, 3)


def orthogonal(i: int) -> Tensor:
    return torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(i)))[0]


def signed_permutation(i: int) -> Tensor:
    g = torch.Generator().manual_seed(i)
    return torch.eye(3)[torch.randperm(3, generator=g)] * (torch.randint(2, (3, 1), generator=g) * 2 - 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "tier, group, off", [(0, general, None), (1, orthogonal, general), (2, signed_permutation, orthogonal)]
)
def test_sizes_keep_the_symmetry_of_their_tier(tier, group, off, dtype) -> None:
    batch = TEST[0][:12].to(dtype)
    wanted = sizes(batch, 3, tier)
    change = (sizes(moved(batch.to(torch.float64), group).to(dtype), 3, tier) - wanted).abs().max()
    assert change < 2e-2, change
    if off is not None:
        change = (sizes(moved(batch.to(torch.float64), off).to(dtype), 3, tier) - wanted).abs().max()
        assert change > 0.3, change


def test_answers_are_what_modules_do_to_inputs_and_do_not_see_the_gauge() -> None:
    directions = torch.randn(2, 4, 10, generator=torch.Generator().manual_seed(0))
    spec_like = Ears.of(TRAIN[0], None)
    # Modules hear text where they are told to: here all of them, by hand.
    heard = Ears([directions] * len(SPEC))
    for ears in (spec_like, heard):
        found, loud = ears.answers(TEST[0][:9])
        again, louder = ears.answers(moved(TEST[0][:9], general))
        torch.testing.assert_close(again, found, atol=2e-3, rtol=0)
        torch.testing.assert_close(louder, loud, atol=2e-2, rtol=0)
        norms = found.norm(dim=1)
        torch.testing.assert_close(norms, torch.ones_like(norms))
    lora = TEST[0][:1]
    deltas = {m: (g.U[0, j] @ g.V[0, j].mT) for g in lora.groups for j, m in enumerate(g.index)}
    words = [
        torch.cat([(deltas[m] @ directions[w].mT).flatten() for m in range(len(SPEC))]) for w in range(2)
    ]
    loudest = max(words, key=lambda x: float(x.norm()))
    torch.testing.assert_close(heard.answers(lora)[0][0], loudest / loudest.norm(), atol=1e-4, rtol=1e-3)


def test_traits_of_training_rows_have_unit_size_and_outliers_are_cut() -> None:
    traits = Traits.fit(TRAIN[0], 0, most=40)
    a, s = traits(TRAIN[0])
    assert a.shape[1] <= 40 and abs(float(a.square().sum(1).mean()) - 1) < 0.3
    torch.testing.assert_close(s.square().sum(1).mean(), torch.tensor(1.0), atol=0.1, rtol=0)
    huge = TEST[0][:3].map(lambda U, V: (U * 1e6, V))
    assert torch.isfinite(traits(huge)[1]).all() and traits(huge)[1].abs().max() <= 4
    torch.testing.assert_close(traits(huge)[0], traits(TEST[0][:3])[0], atol=1e-3, rtol=1e-3)
    zero = TEST[0][:3].map(lambda U, V: (U * 0, V * 0))
    assert all(torch.isfinite(x).all() for x in traits(zero))


@pytest.fixture(scope="module")
def of_classes() -> ours.OursReader:
    return ours.fit(*TRAIN, *VALIDATION, CLASSES, budget=BUDGET)


def test_the_shelf_gives_back_what_was_put_there(of_classes, tmp_path: Path) -> None:
    wanted = of_classes.predict(TEST[0])
    shelf.save(of_classes, SPEC, tmp_path / "reader")
    again = shelf.load(tmp_path / "reader")
    for name, p in again.predict(TEST[0]).items():
        torch.testing.assert_close(p, wanted[name], atol=0.02, rtol=0)
    assert shelf.spec_of(tmp_path / "reader") == SPEC
    assert torch.equal(again.familiar(TEST[0]), of_classes.familiar(TEST[0]))
    with pytest.raises(LolgenError, match=r"no model\.safetensors"):
        shelf.load(tmp_path / "nothing")


def test_readers_of_one_zoo_share_their_largest_tensors(of_classes, tmp_path: Path) -> None:
    for name in ("one", "two"):
        shelf.save(of_classes, SPEC, tmp_path / name)
    assert [p.name for p in shelf.folders(tmp_path)] == ["one", "two"]
    shared = sorted((tmp_path / shelf.SHARED).iterdir())
    assert len(shared) == len(shelf.IN_COMMON)
    shared[0].unlink()
    with pytest.raises(LolgenError, match=shared[0].name):
        shelf.load(tmp_path / "one")


def numbers(batch: Batch, y: Tensor) -> Tensor:
    g = torch.Generator().manual_seed(9)
    size = torch.stack([(g_.U.mT @ g_.U * (g_.V.mT @ g_.V)).sum((2, 3)).sum(1) for g_ in batch.groups]).sum(0)
    return (3 * size.log() + 0.2 * torch.randn(len(batch), generator=g))[:, None]


def test_numbers_have_intervals_that_cover(tmp_path: Path) -> None:
    y, y_val, y_test = (numbers(*d) for d in (TRAIN, VALIDATION, TEST))
    layout = Numbers.of(["size"], y)
    reader = ours.fit(TRAIN[0], y, VALIDATION[0], y_val, layout, budget=BUDGET)
    mean = reader.predict(TEST[0])["size"][:, 0]
    assert float((mean - y_test[:, 0]).square().mean()) < 0.3 * float(y_test.var())
    low, high = reader.interval(TEST[0])["size"].T
    inside = float(((low <= y_test[:, 0]) & (y_test[:, 0] <= high)).float().mean())
    assert 0.85 <= inside <= 1.0, inside
    shelf.save(reader, SPEC, tmp_path / "n")
    torch.testing.assert_close(
        shelf.load(tmp_path / "n").predict(TEST[0])["size"][:, 0], mean, atol=0.05, rtol=0.02
    )


def test_what_is_unlike_the_zoo_is_said(of_classes) -> None:
    assert float(of_classes.familiar(TEST[0]).float().mean()) > 0.85
    g = torch.Generator().manual_seed(1)
    noise = TEST[0].map(lambda U, V: (torch.randn(U.shape, generator=g), torch.randn(V.shape, generator=g)))
    assert float(of_classes.familiar(noise).float().mean()) < 0.1
    assert not bool(of_classes.familiar(TEST[0].map(lambda U, V: (U * 1e4, V))).any())


@pytest.mark.parametrize("count", [2, 40])
def test_inputs_that_are_used_most_come_first(count: int) -> None:
    """Against the eigenvectors of the whole second moment, on either side of the smaller matrix."""
    batch = TRAIN[0][:count]
    ears = Ears.of(batch, most=3)
    for m, group, j in ((m, g, j) for g in batch.groups for j, m in enumerate(g.index)):
        delta = (group.U[:, j] @ group.V[:, j].mT).double()
        delta = delta / delta.flatten(1).norm(dim=1)[:, None, None]
        values, vectors = torch.linalg.eigh((delta.mT @ delta).sum(0))
        wanted = vectors.flip(1)[:, :3] * (values.flip(0)[:3] / values[-1]) ** 0.25
        P = ears.P[m].double()
        torch.testing.assert_close((P.mT @ wanted).abs(), (wanted.mT @ wanted), atol=2e-3, rtol=1e-2)


def test_singular_values_that_a_rank_cannot_have_are_unknown_not_small() -> None:
    traits = Traits.fit(TRAIN[0], 1, most=20)
    one = Batch.stack([gl.resize(x, 1) for x in TEST[0][:6].unstack()])
    raw = sizes(one, 3, 1, traits.least)
    assert bool(raw.isnan().any()) and not bool(sizes(TEST[0][:6], 3, 1, traits.least).isnan().any())
    a, s = traits(one)
    assert torch.isfinite(s).all() and torch.isfinite(a).all()
    # Padded with zeros it is the same LoRA; where rank 1 was trained on, zeros are facts.
    torch.testing.assert_close(traits(one.padded(3))[1], s, atol=1e-3, rtol=1e-3)
    assert not bool(sizes(one, 3, 1, 1).isnan().any())


def test_no_readout_of_the_size_of_delta_w_where_that_is_large(monkeypatch) -> None:
    kinds = []
    for most in (ours.READOUT, 100):
        monkeypatch.setattr(ours, "READOUT", most)
        reader = ours.fit(*TRAIN, *VALIDATION, CLASSES, config={"tier": 0.0}, budget=BUDGET)
        assert reader.model is not None
        kinds.append({m.kind for m in reader.model.members})
    assert kinds == [{"kernel", "net", "glnet", "cosine"}, {"kernel", "net", "glnet"}]
