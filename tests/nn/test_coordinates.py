"""Coordinates: least squares on a template's centred directions, against an independent solver."""

from __future__ import annotations

import pytest
import torch

from lolgen.errors import ShapeError
from lolgen.lora import ModuleSpec, Spec
from lolgen.nn import Block, Coordinates, Template, TemplateConfig

SPEC = Spec((ModuleSpec("a", 6, 5), ModuleSpec("b", 7, 5)))
BLOCKS = (Block(0, 3), Block(3, 5), Block(5, 7))
PARENTS = (None, None, (0, 2))  # the last block draws the third value of the first


@pytest.fixture
def template() -> Template:
    template = Template(SPEC, TemplateConfig(d=4, attributes=7, groups=((8,), (9,))))
    template.weight.copy_(torch.randn(template.weight.shape, generator=torch.Generator().manual_seed(0)))
    return template


def test_every_block_is_centred_and_nothing_is_lost(template):
    found = Coordinates(template, BLOCKS, PARENTS)
    d = found.directions
    for block in BLOCKS:
        assert d[:, 1 + block.start : 1 + block.stop].sum(1).abs().max() < 1e-5
    # A person with value 2 and its drawing 0 and value 1 of the other: the same sum of directions as the template's.
    c = torch.zeros(2, 7)
    c[:, [2, 4, 5]] = 1
    weight = template.weight.double().unflatten(0, (2, 9))
    wanted = weight[:, 0] + torch.einsum("wk,wkmij->wmij", c.double(), weight[:, 1:8])
    assert torch.allclose(found.products(torch.ones(2), c, torch.tensor([0, 1])), wanted, atol=1e-5)


def test_reading_is_ridge_regression(template):
    ridge = 0.1
    found = Coordinates(template, BLOCKS, PARENTS, ridge=ridge)
    products = torch.randn(3, 2, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    words = torch.tensor([0, 1, 1])
    anybody, coordinates = found.read(products, words)
    for n in range(3):
        X = found.directions[words[n]].flatten(1).T  # (M d d, 1 + K)
        level = (ridge * X.square().sum(0).mean()).sqrt()
        rows = torch.cat([X, level * torch.eye(X.shape[1], dtype=X.dtype)])
        y = torch.cat([products[n].flatten(), torch.zeros(X.shape[1], dtype=X.dtype)])
        wanted = torch.linalg.lstsq(rows, y[:, None]).solution[:, 0]
        assert torch.allclose(torch.cat([anybody[n : n + 1], coordinates[n]]), wanted, atol=1e-8)


def test_what_is_written_is_read(template):
    found = Coordinates(template, BLOCKS, PARENTS, ridge=1e-9)
    x = torch.zeros(1, 7, dtype=torch.float64)
    x[0, :3] = torch.tensor([0.8, -0.5, -0.3])  # sums to zero within its block, as what can be read does
    _, back = found.read(found.products(torch.ones(1), x, torch.tensor([1])), torch.tensor([1]))
    assert torch.allclose(back, x, atol=1e-5)


def test_blocks_must_be_those_of_the_template(template):
    with pytest.raises(ShapeError, match="7"):
        Coordinates(template, BLOCKS[:2], PARENTS[:2])
