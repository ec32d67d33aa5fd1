"""The editor on the shipped models: exact symmetry, nothing moved at strength 0, every rank, honest warnings."""

from __future__ import annotations

import pytest
import torch

from lolgen import gl, metrics, pictures, pipeline
from lolgen.editor import Editor, changes, layout
from lolgen.errors import AttributeValueError, LolgenError, SpecError
from lolgen.lora import Batch, Factors, LoRA, ModuleSpec, Spec
from lolgen.paths import zoos_dir
from lolgen.testing import assert_equivariant, assert_invariant, random_lora, regauge
from lolgen.zoo.zoo import Zoo

REQUESTS = ({"glasses": "yes"}, {"top": "hat", "skin": "dark"}, {"beard": "no"})


@pytest.fixture(scope="module")
def editor() -> Editor:
    return pipeline.load_editor()


@pytest.fixture(scope="module")
def held() -> Zoo:
    return Zoo.open(zoos_dir() / "faces").split("validation")


@pytest.fixture(scope="module")
def batch(held) -> Batch:
    return held.load()[[0, 1, 2]].to(torch.float64)


def edited(editor: Editor, batch: Batch, **options: object) -> Batch:
    return editor.edit(batch, REQUESTS[: len(batch)], [0, 1, 2][: len(batch)], **options)[0]  # type: ignore[arg-type]


@pytest.mark.parametrize("keep", ["all", "identity"])
def test_an_edit_of_a_regauged_lora_is_the_regauged_edit(editor, batch, keep):
    conditions = (10.0, 1e4) if keep == "all" else (10.0,)
    slack = 50.0 if keep == "all" else 1e9  # the flow runs in float32
    assert_equivariant(
        lambda x: edited(editor, x, keep=keep), batch, draws=1, conditions=conditions, slack=slack
    )


def test_in_float32_files_too(editor, held):
    """What the command line does: factors of single precision, a relative 1e-4 on delta W and on the factors."""
    single = held.load()[[3]]
    moved, gauges = regauge(single, condition=30.0, generator=torch.Generator().manual_seed(0))
    one = editor.edit(single, [{"glasses": "yes"}], [0])[0]
    two = editor.edit(moved, [{"glasses": "yes"}], [0])[0]
    assert float(metrics.relative_distance(one, two).max()) < 1e-4
    wanted = gl.act_batch(one, [g.double() for g in gauges])
    for a, b in zip(wanted.groups, two.groups, strict=True):
        assert (a.U - b.U).norm() < 1e-4 * a.U.norm() and (a.V - b.V).norm() < 1e-4 * a.V.norm()


def test_off_the_group_it_is_another_edit(editor, batch):
    with pytest.raises(AssertionError):
        assert_equivariant(lambda x: edited(editor, x), batch, draws=1, off_group=True)


def test_strength_0_gives_back_delta_w(editor, batch):
    same = edited(editor, batch, strength=0.0)
    assert float(metrics.relative_distance(batch, same).max()) < 1e-10
    assert float(metrics.relative_distance(batch, edited(editor, batch)).min()) > 0.05


def test_strength_is_a_straight_way(editor, batch):
    half, whole = edited(editor, batch, strength=0.5), edited(editor, batch)
    ratio = metrics.distance(batch, half) / metrics.distance(batch, whole)
    assert ((ratio - 0.5).abs() < 0.2).all()


def test_what_is_asked_is_read_and_the_rest_stays(editor, held):
    many = held.load()[list(range(24))]
    value = ["no" if r["identity"]["attributes"]["glasses"] == "yes" else "yes" for r in held.rows[:24]]
    after = editor.edit(many, [{"glasses": v} for v in value], list(range(24)))[0]
    rows = changes(editor.read(many), editor.read(after))
    assert sum(r["glasses"]["after"]["value"] == v for r, v in zip(rows, value, strict=True)) >= 23
    others = [(r[n]["before"]["value"], r[n]["after"]["value"]) for r in rows for n in r if n != "glasses"]
    assert sum(a == b for a, b in others) >= 0.95 * len(others)


def test_edits_compose(editor, held):
    one = held.load()[[5]]
    asked = {"glasses": "yes", "beard": "yes", "clothes": "yellow"}
    together = editor.edit(one, [asked], [0])[0]
    step = one
    for name, value in asked.items():
        step = editor.edit(step, [{name: value}], [0])[0]
    for result in (together, step):
        values = editor.read(result).values()[0]
        assert {n: values[n] for n in asked} == asked
    assert float(metrics.cosine(together, step)) > 0.9


@pytest.mark.parametrize("rank", [1, 2, 4, 8, 16, 32])
def test_every_rank_comes_back_at_its_rank(editor, rank):
    zoo = Zoo.open(zoos_dir() / "faces").split("test", rank)
    few = Zoo(zoo.folder, zoo.info, zoo.rows[:4]).load()
    after = editor.edit(few, [{"glasses": "yes"}] * 4, [0] * 4)[0]
    assert torch.equal(after.ranks, few.ranks) and after.rank == rank
    assert [v["glasses"] for v in editor.read(after).values()] == ["yes"] * 4


def test_mixed_ranks_and_a_zero_module(editor, held):
    lora = held.load()[[7]].unstack()[0]
    names = lora.names
    factors = {n: gl.resize(lora, {n: 1 + i % 4}).factors[n] for i, n in enumerate(names)}
    factors[names[2]] = Factors(torch.zeros_like(factors[names[2]].B), factors[names[2]].A)
    mixed = Batch.stack([LoRA(lora.spec, factors)], torch.float64)
    after = editor.edit(mixed, [{"top": "bald"}], [0])[0]
    assert torch.equal(after.ranks, mixed.ranks)
    assert_equivariant(
        lambda x: editor.edit(x, [{"top": "bald"}], [0])[0], mixed, draws=1, conditions=(10.0,)
    )
    assert editor.read(after).values()[0]["top"] == "bald"


def test_another_rank_on_request(editor, batch):
    after = editor.edit(batch, REQUESTS, [0, 1, 2], rank=9)[0]
    assert after.rank == 9
    # In the norm that the base feels; in the plain one rank 9 keeps directions that no input reaches.
    four, nine = (editor.familiarity.weigh(x) for x in (edited(editor, batch), after))
    assert float(metrics.relative_distance(nine, four).max()) < 0.2


def test_hair_that_an_edit_uncovers_gets_a_colour(editor, held):
    bald = [i for i, r in enumerate(held) if r["labels"][1] < 0][:3]
    some = held.load()[bald]
    _, asked = editor.edit(some, [{"top": "long"}] * len(bald), [0, 1, 2])
    assert all(a["hair_color"] in pictures.ATTRIBUTES["hair_color"] for a in asked)
    _, asked = editor.edit(some, [{"top": "long", "hair_color": "pink"}] * len(bald), [0, 1, 2])
    assert all(a["hair_color"] == "pink" for a in asked)


def test_mixing_starts_at_a_and_ends_at_b(editor, held):
    rows = [i for i, r in enumerate(held) if "sks" in r["recipe"]["subject"]][:2]
    a, b = (held.load()[[i]].to(torch.float64) for i in rows)
    for t, end in ((0.0, a), (1.0, b)):
        assert float(metrics.relative_distance(end, editor.mix(a, b, torch.tensor([t])))) < 1e-10
    middle = editor.mix(a, b, torch.tensor([0.5]))
    assert 0.1 < float(metrics.cosine(a, middle)) < 0.99
    assert_invariant(lambda x: editor.mix(x, b, torch.tensor([0.3])), a, draws=1)
    assert_invariant(lambda x: editor.mix(a, x, torch.tensor([0.3])), b, draws=1)
    with pytest.raises(AssertionError):
        assert_invariant(lambda x: editor.mix(x, b, torch.tensor([0.3])), a, draws=1, off_group=True)


def test_unlike_the_zoo_is_said(editor, held):
    usual = held.load()
    said = editor.familiarity.strange(editor.facts(usual, editor.read(usual)))
    assert sum(bool(s) for s in said) <= 0.05 * len(said)
    odd = Batch.stack([random_lora(usual.spec, 4, generator=torch.Generator().manual_seed(0))])
    zero = usual[[0]].map(lambda U, V: (U * 0, V))
    loud = usual[[0]].map(lambda U, V: (U * 1000, V))
    for batch in (odd, zero, loud):
        assert editor.familiarity.strange(editor.facts(batch, editor.read(batch)))[0]
        after = editor.edit(batch, [{"glasses": "yes"}], [0])[0]
        assert all(torch.isfinite(g.U).all() and torch.isfinite(g.V).all() for g in after.groups)


def test_the_blocks_are_those_of_a_condition():
    from lolgen.conditions import IDENTITY

    blocks, parents = layout()
    assert blocks[0].start == 0 and blocks[-1].stop == IDENTITY and len(blocks) == len(parents)
    assert all(a.stop == b.start for a, b in zip(blocks, blocks[1:], strict=False))


def test_bad_requests_name_what_is_valid(editor, batch):
    with pytest.raises(AttributeValueError, match="glasses"):
        editor.edit(batch[0], [{"nose": "big"}], [0])
    with pytest.raises(LolgenError, match="keep"):
        editor.edit(batch[0], [{"glasses": "yes"}], [0], keep="some")
    with pytest.raises(LolgenError, match="strength"):
        editor.edit(batch[0], [{"glasses": "yes"}], [0], strength=float("nan"))
    with pytest.raises(LolgenError, match="rank"):
        editor.edit(batch[0], [{"glasses": "yes"}], [0], rank=0)
    other = Batch.stack([random_lora(Spec((ModuleSpec("q", 4, 3),)), 2)])
    with pytest.raises(SpecError):
        editor.edit(other, [{"glasses": "yes"}], [0])
    with pytest.raises(SpecError):
        editor.mix(batch[0], other, torch.tensor([0.5]))
