"""What all tests share: one thread, both dtypes, and one small base model with every kind of module."""

from __future__ import annotations

import pytest
import torch

from lolgen.lora import LoRA, ModuleSpec, Spec
from lolgen.testing import random_lora


def pytest_configure() -> None:
    # A worker a core with one thread each beats one worker with two, and sums come out the same everywhere.
    torch.set_num_threads(1)


@pytest.fixture(params=[torch.float32, torch.float64], ids=["float32", "float64"])
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    found = request.param
    assert isinstance(found, torch.dtype)
    return found


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.fixture(scope="session")
def spec() -> Spec:
    """Linear, embedding and conv modules (1-D, 1x1, 3x3, 3-D). Two pairs share a shape, and the
    order of the groups is no involution: a permutation and its inverse can be told apart."""
    return Spec(
        (
            ModuleSpec("attn.to_q", 12, 10),
            ModuleSpec("conv_in", 8, 3, (3, 3), "conv"),
            ModuleSpec("embed", 6, 40, (), "embedding"),
            ModuleSpec("attn.to_v", 12, 10),
            ModuleSpec("conv_1x1", 8, 27, (1, 1), "conv"),
            ModuleSpec("conv_1d", 5, 4, (3,), "conv"),
            ModuleSpec("conv_3d", 4, 2, (3, 1, 2), "conv"),
            ModuleSpec("gate", 1, 10),
        )
    )


MIXED = (4, 3, 6, 1, 8, 5, 2, 3)
"""One rank a module: 1, full, and above min(out, in) among them (`gate` is 1 x 10 at rank 3)."""


@pytest.fixture
def lora(spec: Spec, dtype: torch.dtype, generator: torch.Generator) -> LoRA:
    """Mixed ranks, a scale, and a module whose B is zero."""
    return random_lora(spec, MIXED, zero=("conv_3d",), scale=0.37, generator=generator, dtype=dtype)
