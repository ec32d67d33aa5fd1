"""Edits of speeches: against dense algebra, in every gauge, and for whatever a user may ask."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from test_speaker import SPEC, fitted, zoo

from lolgen import gl
from lolgen.errors import LolgenError, SpecError
from lolgen.language.texts import SOURCES
from lolgen.lora import Batch, Group, ModuleSpec, Spec
from lolgen.nn import Latent
from lolgen.speech_editor import NAMES, Amounts, SpeechEditor
from lolgen.testing import random_lora

AMOUNTS = Amounts(kept=0.7, reach=0.8, common=0.25, removed=2.0, deepest=0.3)
NONE: list[list[str]] = [[], [], []]


@pytest.fixture(scope="module")
def editor() -> SpeechEditor:
    return SpeechEditor(fitted(*zoo()), AMOUNTS)


def mixed(dtype: torch.dtype = torch.float64) -> Batch:
    """Three LoRAs of ranks 1, 3 and 4, the second with a module of zeros."""
    g = torch.Generator().manual_seed(5)
    batch = Batch.stack([random_lora(SPEC, r, generator=g, dtype=dtype) for r in (1, 3, 4)], dtype)
    groups = []
    for group in batch.groups:
        U = group.U.clone()
        if 1 in group.index:
            U[1, list(group.index).index(1)] = 0
        groups.append(Group(group.index, U, group.V))
    return Batch(batch.spec, groups, batch.ranks)


def dense(batch: Batch) -> list[list[torch.Tensor]]:
    return [[lora[n].delta() for n in SPEC.names] for lora in batch.unstack()]


def cut(delta: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(delta)
    return (U[:, :rank] * S[:rank]) @ Vh[:rank]


def direction(editor: SpeechEditor, name: str | None) -> list[torch.Tensor]:
    """delta W of a source's direction (None: of what all share), from the template's weights and the decoder's maps."""
    weight = editor.speaker.template.weight.double()
    mean = weight[1:-1].mean(0)
    latent = weight[0] + mean if name is None else weight[1 + NAMES.index(name)] - mean
    eye = torch.eye(latent.shape[-1], dtype=torch.float64).expand_as(latent)[None]
    full = torch.full((1, len(SPEC)), latent.shape[-1])
    decoder = deepcopy(editor.speaker.decoder).double()
    return dense(decoder(Latent(latent[None], eye, full)))[0]


def test_an_addition_is_what_dense_algebra_gives(editor: SpeechEditor) -> None:
    batch = mixed()
    made = dense(editor.edit(batch, [["grant"]] * 3, NONE))
    common, grant = direction(editor, None), direction(editor, "grant")
    for lora, rank, old in zip(made, (1, 3, 4), dense(batch), strict=True):
        for new, before, c, d in zip(lora, old, common, grant, strict=True):
            wanted = cut(AMOUNTS.kept * before + AMOUNTS.common * c + AMOUNTS.reach * d, rank)
            torch.testing.assert_close(new, wanted, rtol=1e-6, atol=1e-8)


def test_a_removal_is_what_dense_algebra_gives(editor: SpeechEditor) -> None:
    batch = mixed()
    sign = editor.read(batch)[:, NAMES.index("taft")].sign()
    batch = batch.map(
        lambda U, V: (sign[:, None, None, None] * U, V)
    )  # where nothing is read, nothing is removed
    has = editor.read(batch)[:, NAMES.index("taft")]
    assert float(has.min()) > 0
    made = dense(editor.edit(batch, NONE, [["taft"]] * 3, strength=0.5))
    taft = direction(editor, "taft")
    for lora, rank, old, h in zip(made, (1, 3, 4), dense(batch), has, strict=True):
        amount = 0.5 * max(min(AMOUNTS.removed * float(h), float(h) + AMOUNTS.deepest), 0)
        for new, before, d in zip(lora, old, taft, strict=True):
            torch.testing.assert_close(new, cut(before - amount * d, rank), rtol=1e-6, atol=1e-8)


def test_an_exchange_removes_what_the_addition_left(editor: SpeechEditor) -> None:
    batch = editor.speaker.batch(torch.eye(len(SOURCES))[NAMES.index("taft")][None], 4).to(torch.float64)
    has = AMOUNTS.kept * float(editor.read(batch)[0, NAMES.index("taft")])
    amount = min(AMOUNTS.removed * has, has + AMOUNTS.deepest)
    made = dense(editor.edit(batch, [["grant"]], [["taft"]]))[0]
    parts = (direction(editor, n) for n in (None, "grant", "taft"))
    for new, before, c, g, t in zip(made, dense(batch)[0], *parts, strict=True):
        wanted = AMOUNTS.kept * before + AMOUNTS.common * c + AMOUNTS.reach * g - amount * t
        torch.testing.assert_close(new, cut(wanted, 4), rtol=1e-6, atol=1e-8)


def test_what_is_read_is_what_was_planted(editor: SpeechEditor) -> None:
    full = editor.speaker.template.config.d
    made = editor.speaker.batch(torch.eye(len(SOURCES)), full)
    read = editor.read(made)
    assert float(read.diagonal().min()) > 0.8
    assert float((read - torch.diag(read.diagonal())).abs().max()) < 0.3
    # Twice the adapter has twice of everything; half of two has half of each.
    torch.testing.assert_close(editor.read(made.map(lambda U, V: (2 * U, V))), 2 * read)


def test_edits_move_the_reading_of_what_was_asked_for(editor: SpeechEditor) -> None:
    full = editor.speaker.template.config.d
    pair = torch.zeros(1, len(SOURCES))
    pair[0, :2] = 0.5
    batch, names = editor.speaker.batch(pair, full), NAMES[:2]
    before = editor.read(batch)[0]
    after = editor.read(editor.edit(batch, [[]], [[names[1]]]))[0]
    assert float(after[1]) < 0 < float(before[1]) and abs(float(after[0] - before[0])) < 0.1
    more = editor.read(editor.edit(batch, [[NAMES[5]]], [[]]))[0]
    assert float(more[5]) > float(before[5]) + 0.5 and float(more[1]) < float(before[1])


def test_several_sources_at_once_are_alike_and_in_any_order(editor: SpeechEditor) -> None:
    batch = mixed()
    one = dense(editor.edit(batch, [["grant", "taft"]] * 3, NONE, rank=12))
    two = dense(editor.edit(batch, [["taft", "grant", "taft"]] * 3, NONE, rank=12))
    common, grant, taft = (direction(editor, n) for n in (None, "grant", "taft"))
    turns = 1 + AMOUNTS.kept
    for a, b, old in zip(one, two, dense(batch), strict=True):
        for x, y, before, c, g, t in zip(a, b, old, common, grant, taft, strict=True):
            torch.testing.assert_close(x, y)
            wanted = AMOUNTS.kept**2 * before + turns * (AMOUNTS.common * c + AMOUNTS.reach * (g + t) / 2)
            torch.testing.assert_close(x, wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("condition", [10.0, 1e4])
def test_the_edit_of_a_regauged_lora_is_the_regauged_edit(editor: SpeechEditor, condition: float) -> None:
    batch = mixed()
    # Small against the LoRA, as edits are: the frame that an edit keeps is the LoRA's.
    small = SpeechEditor(editor.speaker, Amounts(kept=1.0, reach=0.02, common=0.0, removed=0.02, deepest=9.0))
    gauges = gl.random_gauge_batch(batch, condition=condition, generator=torch.Generator().manual_seed(2))
    ask = [["grant"], [], ["polk"]], [[], ["taft"], ["taft"]]
    one = gl.act_batch(small.edit(batch, *ask), gauges)
    two = small.edit(gl.act_batch(batch, gauges), *ask)
    for a, b in zip(one.groups, two.groups, strict=True):
        torch.testing.assert_close(a.U, b.U, rtol=1e-5, atol=1e-6 * condition)
        torch.testing.assert_close(a.V, b.V, rtol=1e-5, atol=1e-6 * condition)
    for x, y in zip(dense(one), dense(two), strict=True):
        for p, q in zip(x, y, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    # Off the group: gauges on one side only change delta W, and the edit with it.
    broken = batch.groups[0].U @ torch.linalg.inv(gauges[0])
    other = Batch(
        SPEC, [Group(batch.groups[0].index, broken, batch.groups[0].V), *batch.groups[1:]], batch.ranks
    )
    assert float((dense(small.edit(other, *ask))[2][0] - dense(one)[2][0]).norm()) > 0.1


def test_readings_do_not_depend_on_the_gauge(editor: SpeechEditor) -> None:
    batch = mixed()
    gauges = gl.random_gauge_batch(batch, condition=1e5, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(
        editor.read(batch), editor.read(gl.act_batch(batch, gauges)), rtol=1e-6, atol=1e-8
    )
    rolled = batch.map(lambda U, V: (torch.roll(U, 1, -2), V))
    assert float((editor.read(rolled) - editor.read(batch)).abs().max()) > 1e-2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_strength_nought_is_no_edit_and_ranks_stay(editor: SpeechEditor, dtype: torch.dtype) -> None:
    batch = mixed(dtype)
    made = editor.edit(batch, [["grant"]] * 3, [["taft"]] * 3, strength=0)
    assert torch.equal(made.ranks, batch.ranks)
    for a, b in zip(made.groups, batch.groups, strict=True):
        some = b.U.abs().amax((2, 3)) > 0  # a module of zeros comes back as zeros on both sides
        torch.testing.assert_close(a.U, b.U.double(), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(a.V[some], b.V.double()[some], rtol=1e-5, atol=1e-6)
    assert editor.edit(batch, [["grant"]] * 3, NONE, rank=2).rank == 2


@pytest.mark.parametrize(
    ("add", "remove", "options", "word"),
    [
        ([["lenin"]], [[]], {}, "lincoln"),
        ([[]], [["lenin"]], {}, "lincoln"),
        ([["grant"]], [["grant"]], {}, "both"),
        ([["grant"]], [[]], {"strength": 2.5}, "strength"),
        ([["grant"]], [[]], {"strength": float("nan")}, "strength"),
        ([["grant"]], [[]], {"rank": 0}, "rank"),
        ([["grant"]], [[]], {"rank": 65}, "rank"),
    ],
)  # fmt: skip
def test_what_cannot_be_asked_for_is_one_clear_error(
    editor: SpeechEditor, add: list[list[str]], remove: list[list[str]], options: dict[str, float], word: str
) -> None:
    with pytest.raises(LolgenError, match=word):
        editor.edit(mixed()[:1], add, remove, **options)  # type: ignore[arg-type]


def test_a_lora_of_another_base_and_a_folder_that_is_none(editor: SpeechEditor, tmp_path: Path) -> None:
    other = Batch.stack([random_lora(Spec((ModuleSpec("a.q", 12, 12),)), 2)])
    with pytest.raises(SpecError):
        editor.read(other)
    with pytest.raises(LolgenError, match=r"editor\.json"):
        SpeechEditor.from_pretrained(tmp_path)
    folder = editor.speaker.save_pretrained(tmp_path / "s")
    editor.save_amounts(folder)
    assert SpeechEditor.from_pretrained(folder).amounts == AMOUNTS
