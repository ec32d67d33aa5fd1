"""The rivals of the speeches generator learn what is there to learn, and its requests are what they say."""

from __future__ import annotations

import torch

from lolgen import metrics
from lolgen.language.texts import SOURCES
from lolgen.lora import Batch, ModuleSpec, Spec
from lolgen.tasks import speak
from lolgen.tasks.generators import combine
from lolgen.testing import random_lora

SPEC = Spec((ModuleSpec("a", 10, 12), ModuleSpec("b", 6, 12)))
N = len(SOURCES)


def planted(count: int, seed: int) -> tuple[Batch, torch.Tensor]:
    """LoRAs that are sums of one direction for each source, at random shares, and the shares."""
    g = torch.Generator().manual_seed(7)
    directions = Batch.stack([random_lora(SPEC, 1, generator=g) for _ in range(N)])
    shares = torch.rand(count, N, generator=torch.Generator().manual_seed(seed)).pow(8)
    shares = shares / shares.sum(1, keepdim=True)
    return Batch.stack(combine(directions, shares, speak.RANK)), shares


def closeness(found: Batch, wanted: Batch) -> float:
    return float(metrics.cosine(found, wanted).mean())


def test_ridge_finds_a_linear_map_and_the_average_does_not() -> None:
    batch, shares = planted(300, 0)
    held, held_shares = planted(20, 1)
    ridge = closeness(speak.ridge(batch, shares, held, held_shares)(held_shares), held)
    average = closeness(speak.average(batch)(held_shares), held)
    mlp = closeness(speak.mlp(batch, shares, steps=150)(held_shares), held)
    assert ridge > 0.95 and ridge > average + 0.2 and ridge > mlp


def test_requests_are_shares_and_single_ones_are_every_source() -> None:
    asked = speak.requests()
    for kind, shares in asked.items():
        torch.testing.assert_close(shares.sum(1), torch.ones(len(shares)))
        sizes = (shares > 0).sum(1)
        low, high = {"single": (1, 1), "pair": (2, 2), "subset": (5, 12)}[kind]
        assert int(sizes.min()) >= low and int(sizes.max()) <= high
    assert torch.equal(asked["single"], torch.eye(N))
    assert all(torch.equal(a, b) for a, b in zip(asked.values(), speak.requests().values(), strict=True))


def test_scaling_scales_delta_w() -> None:
    batch, _ = planted(3, 2)
    before, after = batch.unstack()[0]["a"].delta(), speak.scaled(batch, 2.5).unstack()[0]["a"].delta()
    torch.testing.assert_close(after, 2.5 * before)
