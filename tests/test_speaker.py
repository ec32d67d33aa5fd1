"""The generator of speeches: its symmetry is the template's; what users ask for, and what they get wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lolgen import gl
from lolgen.errors import LolgenError
from lolgen.language.texts import SOURCES
from lolgen.lora import Batch, ModuleSpec, Spec
from lolgen.nn import Decoder, Encoder, EncoderConfig, Template, TemplateConfig
from lolgen.speaker import Speaker, conditions, shares_of
from lolgen.testing import random_lora

SPEC = Spec((ModuleSpec("a.q", 12, 12), ModuleSpec("a.v", 6, 12), ModuleSpec("b.q", 12, 12)))


def zoo(count: int = 60, seed: int = 0) -> tuple[Batch, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    shares = torch.rand(count, len(SOURCES), generator=g)
    shares = shares / shares.sum(1, keepdim=True)
    return Batch.stack([random_lora(SPEC, 3, generator=g) for _ in range(count)]), shares


def fitted(batch: Batch, shares: torch.Tensor) -> Speaker:
    encoder = Encoder.from_batch(batch, EncoderConfig(d=6, p=4, features=2, width=8, heads=1))
    config = TemplateConfig(d=6, attributes=len(SOURCES), groups=((len(SOURCES),),))
    template = Template(SPEC, config).fit(conditions(shares), encoder.encode(batch), 1.0)
    return Speaker(encoder, Decoder.from_encoder(encoder), template, {"gain": 1.0})


def test_what_it_learns_does_not_depend_on_the_gauge_of_the_zoo() -> None:
    batch, shares = zoo()
    gauges = gl.random_gauge_batch(batch, condition=1e3, generator=torch.Generator().manual_seed(1))
    ask = torch.eye(len(SOURCES))[:3]
    one, two = (fitted(b, shares).batch(ask, 3) for b in (batch, gl.act_batch(batch, gauges)))
    for x, y in zip(one.unstack(), two.unstack(), strict=True):
        for n in SPEC.names:
            torch.testing.assert_close(x[n].delta(), y[n].delta(), rtol=1e-2, atol=1e-4)
    # Off the group: the same change on one side only is another zoo.
    broken = batch.map(lambda U, V: (U + 0.5 * torch.roll(U, 1, -2), V))
    other = fitted(broken, shares).batch(ask, 3).unstack()[0]["a.q"].delta()
    plain = one.unstack()[0]["a.q"].delta()
    assert (other - plain).norm() > 0.1 * plain.norm()


@pytest.mark.parametrize("rank", [1, 2, 6, 9])
def test_every_rank_can_be_asked_for(rank: int, tmp_path: Path) -> None:
    speaker = fitted(*zoo())
    lora = speaker.generate([{"lincoln": 1.0}], rank)[0]
    assert all(f.rank == rank for f in lora.factors.values())
    again = Speaker.from_pretrained(speaker.save_pretrained(tmp_path / "s")).generate(
        [{"lincoln": 3.0}], rank
    )[0]
    for n in SPEC.names:
        torch.testing.assert_close(lora[n].delta(), again[n].delta(), rtol=2e-2, atol=1e-3)  # stored in half


@pytest.mark.parametrize(
    "request_", [{"lenin": 1.0}, {}, {"grant": 0.0}, {"grant": -1.0}, {"grant": float("nan")}]
)
def test_what_cannot_be_asked_for_is_one_clear_error(request_: dict[str, float]) -> None:
    with pytest.raises(LolgenError, match="source"):
        shares_of(request_)


def test_a_rank_out_of_range_and_a_folder_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(LolgenError, match="rank"):
        fitted(*zoo()).generate([{"grant": 1.0}], 65)
    with pytest.raises(LolgenError, match=r"settings\.json"):
        Speaker.from_pretrained(tmp_path)
