"""Heads: names, partial labels, guidance and calibration."""

from __future__ import annotations

import pytest
import torch

from lolgen.errors import AttributeValueError
from lolgen.nn import Heads, HeadsConfig

from .tiny import SPEC

ATTRIBUTES = {"hair": ("red", "black", "blond"), "glasses": ("no", "yes")}
CONFIG = HeadsConfig(ATTRIBUTES, features=6, hidden=8)


def features(N: int) -> torch.Tensor:
    return torch.randn(N, 6, generator=torch.Generator().manual_seed(0))


def test_logits_and_probabilities_by_name() -> None:
    heads = Heads(SPEC, CONFIG).eval()
    logits, p = heads(features(5)), heads.probabilities(features(5))
    assert {k: tuple(v.shape) for k, v in logits.items()} == {"hair": (5, 3), "glasses": (5, 2)}
    for k in ATTRIBUTES:
        assert torch.allclose(p[k], logits[k].softmax(-1))


def test_loss_leaves_out_unknown_labels() -> None:
    heads = Heads(SPEC, CONFIG).eval()
    x, hair = features(4), torch.tensor([0, -1, 2, -1])
    wanted = torch.nn.functional.cross_entropy(heads(x)["hair"][[0, 2]], hair[[0, 2]])
    assert torch.allclose(heads.loss(x, {"hair": hair, "glasses": torch.full((4,), -1)}), wanted)
    assert heads.loss(x, {"hair": torch.full((4,), -1)}) == 0


def test_log_likelihood_guides() -> None:
    heads = Heads(SPEC, CONFIG).eval()
    x = features(4).requires_grad_(True)
    found = heads.log_likelihood(x, {"hair": "blond", "glasses": "yes"})
    p = heads.probabilities(x)
    assert torch.allclose(found, p["hair"][:, 2].log() + p["glasses"][:, 1].log(), atol=1e-5)
    found.sum().backward()
    assert x.grad is not None and x.grad.abs().max() > 0
    with pytest.raises(AttributeValueError, match="no attribute 'beard'.*hair, glasses"):
        heads.log_likelihood(x, {"beard": "yes"})
    with pytest.raises(AttributeValueError, match="no value 'green'.*red, black, blond"):
        heads.log_likelihood(x, {"hair": "green"})


def test_values_must_be_several_and_distinct() -> None:
    for values in (("one",), ("twice", "twice")):
        with pytest.raises(AttributeValueError, match="attribute 'hair'"):
            HeadsConfig({"hair": values})


def test_calibration_finds_the_temperature() -> None:
    heads, x = Heads(SPEC, CONFIG).eval(), features(5000)
    with torch.no_grad():
        for p in heads.parameters():
            p *= 2
        # Labels drawn from softer logits than the heads' own: the temperature is 2.5.
        soft = (heads(x)["hair"] / 2.5).softmax(-1)
        hair = torch.multinomial(soft, 1, generator=torch.Generator().manual_seed(1))[:, 0]
        before = heads(x)
    heads.calibrate(x, {"hair": hair, "glasses": torch.full_like(hair, -1)})
    assert abs(float(heads.temperature[0]) - 2.5) < 0.4 and heads.temperature[1] == 1
    assert torch.equal(heads(x)["hair"], before["hair"])
    assert torch.allclose(heads.probabilities(x)["hair"], (before["hair"] / heads.temperature[0]).softmax(-1))
