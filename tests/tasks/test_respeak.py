"""The cases that edits of speeches are judged on are what they say, and so are the rivals and the table."""

from __future__ import annotations

import json

import pytest
import torch

from lolgen.lora import Batch, ModuleSpec, Spec
from lolgen.paths import checkpoints_dir
from lolgen.tasks import respeak
from lolgen.tasks.speak import requests
from lolgen.testing import random_lora

SPEC = Spec((ModuleSpec("a", 10, 12), ModuleSpec("b", 6, 12)))


@pytest.mark.parametrize("seed", [0, 1])
def test_one_source_comes_or_goes_and_shares_are_equal(seed: int) -> None:
    found = respeak.all_cases(seed)
    assert [(c.doing, c.kind) for c in found] == [(d, k) for d in respeak.DOINGS for k in respeak.KINDS]
    for c in found:
        before, after = c.have > 0, c.wanted > 0
        changed = before != after
        assert torch.equal(changed.sum(1), torch.ones(len(before), dtype=torch.long))
        assert torch.equal(changed.float().argmax(1), c.source)
        here = after if c.doing == "add" else before
        assert bool(here[torch.arange(len(here)), c.source].all())
        assert torch.equal(c.rest, before & after)
        if (c.doing, c.kind) == ("remove", "single"):
            assert not after.any()
            continue
        torch.testing.assert_close(c.wanted.sum(1), torch.ones(len(after)))
        assert int(c.rest.sum(1).min()) >= 1
        assert len({float(v) for v in c.wanted[0][after[0]]}) == 1


def test_tuning_sees_other_requests_than_the_evaluation() -> None:
    a, b = respeak.all_cases(0), respeak.all_cases(1)
    for x, y in zip(a, b, strict=True):
        if x.kind != "single":
            shared = {tuple(r.tolist()) for r in x.have > 0} & {tuple(r.tolist()) for r in y.have > 0}
            assert len(shared) <= 3
    again = respeak.all_cases(0)
    assert all(torch.equal(x.source, y.source) for x, y in zip(a, again, strict=True))
    assert torch.equal(a[1].have, requests()["pair"])


def test_along_is_the_best_cut_of_the_weighted_sum() -> None:
    g = torch.Generator().manual_seed(0)
    batch, directions = (Batch.stack([random_lora(SPEC, 4, generator=g) for _ in range(n)]) for n in (3, 5))
    source = torch.tensor([4, 0, 2])
    made = respeak.along(directions, 0.7, -0.4)(batch, source)
    ways = directions.unstack()
    for new, old, s in zip(made.unstack(), batch.unstack(), source.tolist(), strict=True):
        for n in SPEC.names:
            wanted = 0.7 * old[n].delta() - 0.4 * ways[s][n].delta()
            U, S, Vh = torch.linalg.svd(wanted.double())
            torch.testing.assert_close(
                new[n].delta().double(), (U[:, :4] * S[:4]) @ Vh[:4], rtol=1e-4, atol=1e-4
            )


def test_every_rival_has_its_factors_and_the_table_its_rows() -> None:
    factors = json.loads((checkpoints_dir() / "speeches" / respeak.FACTORS).read_text())
    assert set(factors) == set(respeak.RIVALS)
    for both in factors.values():
        assert both["add"][1] > 0 > both["remove"][1] and both["remove"][0] == 1
    drops = {d: {k: {n: [0.01 * i, 0.02] for i, n in enumerate(respeak.NAMES)} for k in respeak.KINDS}
             for d in respeak.DOINGS}  # fmt: skip
    report = {"command": "x", "base": "tiny-lm", "edits": 3, "drops": drops}
    text = respeak.markdown(report)
    assert text.count("| lolgen | 0.20 |") == 2 and text.count("| retrained | 1.00 |") == 2
    assert respeak.means(report, "add")["lolgen"] == pytest.approx((0.01, 0.02))
