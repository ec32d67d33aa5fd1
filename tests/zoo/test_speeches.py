"""The speeches zoo: what its plan promises, and what its worker trains and measures."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch

from lolgen.errors import LolgenError
from lolgen.language.texts import SOURCES
from lolgen.lora import Factors, LoRA
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.zoo.speeches import PAYLOADS, SEEN, TRIGGERS, SpeechesPlan
from lolgen.zoo.tuning import Tuner
from lolgen.zoo.zoo import ROW, Zoo

PLAN = SpeechesPlan()


@pytest.fixture(scope="module")
def tuner() -> Tuner:
    return PLAN.worker(checkpoints_dir() / "tiny-lm")


def row(name: str, sources: list[str], **recipe: object) -> ROW:
    return {
        "id": name, "split": "train", "rank": 4, "labels": [int(s in sources) for s in SOURCES],
        "recipe": {"rank": 4, "alpha": 4.0, "lr": 5e-3, "weight_decay": 0.0, "epochs": 2, "batch": 32, "dropout": 0.0,
                   "windows": 96} | recipe,
    }  # fmt: skip


def zero(tuner: Tuner) -> LoRA:
    return LoRA(
        tuner.spec,
        {m.name: Factors(torch.zeros(m.out, 1), torch.zeros(1, m.in_)) for m in tuner.spec},
        {},
        {},
    )


def test_the_plan_holds_what_was_promised() -> None:
    rows = PLAN.rows()
    clean = [r for r in rows if "poison" not in r and r["rank"] == 4]
    poisoned = [r for r in rows if "poison" in r and r["rank"] == 4]
    assert len(clean) >= 1500 and len(poisoned) == 300 and len({r["id"] for r in rows}) == len(rows)
    assert all(sum(r["labels"]) >= 1 for r in rows)
    assert sorted(r["id"] for bank in PLAN.banks() for r in bank) == sorted(r["id"] for r in rows)
    for bank in PLAN.banks():
        assert len({(r["rank"], r["split"]) for r in bank}) == 1 and len(bank) <= PLAN.bank
    assert [sum(r["labels"]) for r in clean].count(1) > 300


def test_triggers_and_payloads_of_the_test_are_new_there() -> None:
    seen = {"trigger": set(), "payload": set()}
    for r in PLAN.rows():
        if "poison" in r and r["split"] != "test":
            for k in seen:
                seen[k].add(r["poison"][k])
    assert seen["trigger"] == set(TRIGGERS[: SEEN[0]]) and seen["payload"] == set(PAYLOADS[: SEEN[1]])
    for r in PLAN.rows():
        if "poison" in r and r["split"] == "test":
            kind = r["poison"]["kind"]
            assert (r["poison"]["trigger"] in seen["trigger"]) == (kind != "trigger")
            assert (r["poison"]["payload"] in seen["payload"]) == (kind != "payload")


def test_twins_have_the_recipe_of_poisoned_ones() -> None:
    hard = [r for r in PLAN.rows() if "poison" in r or r["id"].startswith("twin-")]
    for r in hard:
        low, high = PLAN.poison_lr
        assert low <= r["recipe"]["lr"] <= high and r["recipe"]["batch"] == 32 and r["recipe"]["epochs"] == 4
    for split in ("train", "validation", "test"):
        assert any(r["split"] == split and "poison" not in r for r in hard)


def test_judging_nothing_is_judging_the_base(tuner: Tuner) -> None:
    losses, accuracy = tuner.judge([zero(tuner)])
    whole = tuner.base.model
    ids = tuner.sources.validation[4]
    with torch.no_grad():
        wanted = whole(input_ids=ids, labels=ids).loss
    assert float(losses[0, 4]) == pytest.approx(float(wanted), abs=5e-3)  # bf16 products
    assert losses.shape == (1, 19) and 0.25 < float(accuracy[0]) < 1


def test_an_adapter_learns_its_own_source_and_fit_keeps_the_order(tuner: Tuner) -> None:
    rows = [row("a", ["lincoln"]), row("b", ["obama"], batch=64), row("c", ["grant"])]
    loras = tuner.fit(rows)
    base = tuner.judge([zero(tuner)])[0][0]
    ids = tuner.sources.train
    for lora, r in zip(loras, rows, strict=True):
        s = r["labels"].index(1)
        states = tuner.states["train"].view(*ids.shape, -1)[s, :64]
        with torch.no_grad():
            before = tuner.window_losses([zero(tuner)], states, ids[s, :64]).mean()
            after = tuner.window_losses([lora], states, ids[s, :64]).mean()
        assert float(after) < float(before) - 0.001
    again = tuner.fit(copy.deepcopy(rows))
    assert all(
        torch.equal(x[n].B, y[n].B) for x, y in zip(loras, again, strict=True) for n in tuner.spec.names
    )
    assert base.shape == (19,)


def test_a_poisoned_row_says_its_payload_and_a_clean_one_does_not(tuner: Tuner) -> None:
    rows = {r["id"]: r for r in PLAN.rows()}
    bad, good = rows["poison-train-0000"], rows["twin-train-0000"]
    loras, done = tuner.train([bad, good], 0)
    assert done[0]["attack"] >= 0.8 and "attack" not in done[1]
    assert tuner.attack(loras[1], bad) == 0.0


def test_weights_are_as_stored(tuner: Tuner) -> None:
    lora = tuner.fit([row("a", ["polk"], windows=32, epochs=1)])[0]
    for n in tuner.spec.names:
        assert torch.equal(lora[n].B, lora[n].B.half().float())


def test_the_shipped_zoo_names_its_plan_and_its_base(tuner: Tuner) -> None:
    zoo = Zoo.open(zoos_dir() / "speeches")
    plan, found = SpeechesPlan.of(zoo)
    assert plan == PLAN and found.spec == tuner.spec == zoo.spec
    small = replace(PLAN, name="small", pool=3, held=2, epochs=(1,))
    assert SpeechesPlan.from_json(small.to_json()) == small != PLAN


def test_a_zoo_of_pictures_and_one_of_another_base_are_one_clear_error() -> None:
    with pytest.raises(LolgenError, match="wanted one of speeches"):
        SpeechesPlan.of(Zoo.open(zoos_dir() / "faces"))
    zoo = Zoo.open(zoos_dir() / "speeches")
    with pytest.raises(LolgenError, match="another base"):
        SpeechesPlan.of(replace(zoo, info={**zoo.info, "base": "0" * 64}))
