"""Which singular values are kept, against exhaustive search."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from lolgen.errors import LolgenError
from lolgen.tools.ranks import Target, choose

Spectra = dict[str, Tensor]


def problem(seed: int, costs: tuple[int, ...] = (7, 12, 30), k: int = 6) -> tuple[Spectra, dict[str, int]]:
    g = torch.Generator().manual_seed(seed)
    names = [f"m{i}" for i in range(len(costs))]
    spectra = {
        n: torch.rand(k, generator=g, dtype=torch.float64).square().sort(descending=True)[0] for n in names
    }
    return spectra, dict(zip(names, costs, strict=True))


def pick(spectra: Spectra, cost: dict[str, int], target: Target) -> dict[str, int]:
    return choose(spectra, cost, target, dict.fromkeys(spectra, 1e-12))


def left_out(spectra: Spectra, ranks: dict[str, int]) -> float:
    """Relative error of the whole."""
    tail = sum(float(S[ranks[n] :].square().sum()) for n, S in spectra.items())
    return math.sqrt(tail / sum(float(S.square().sum()) for S in spectra.values()))


def price(cost: dict[str, int], ranks: dict[str, int]) -> int:
    return sum(cost[n] * r for n, r in ranks.items())


def every_choice(spectra: Spectra) -> list[dict[str, int]]:
    sizes = [range(1, len(S) + 1) for S in spectra.values()]
    return [dict(zip(spectra, r, strict=True)) for r in itertools.product(*sizes)]


@pytest.mark.parametrize("target", [Target(energy=0.9), Target(error=0.2), Target(error=0.2, rank=3)])
def test_per_module_takes_the_smallest_rank_that_meets_the_target(target: Target) -> None:
    spectra, cost = problem(0)
    for name, k in pick(spectra, cost, target).items():
        S = {name: spectra[name]}
        allowed = math.sqrt(target.allowed or 0)
        meets = [r for r in range(1, 7) if left_out(S, {name: r}) <= allowed]
        assert k == min(meets[0], target.rank or 99)


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("error", [0.05, 0.2, 0.5])
def test_overall_against_exhaustive_search(seed: int, error: float) -> None:
    spectra, cost = problem(seed)
    found = pick(spectra, cost, Target(error=error, per="overall"))
    assert left_out(spectra, found) <= error * (1 + 1e-12)
    best = min(price(cost, r) for r in every_choice(spectra) if left_out(spectra, r) <= error)
    assert best <= price(cost, found) < best + max(cost.values())


@pytest.mark.parametrize("seed", range(12))
def test_overall_is_the_optimum_when_all_modules_cost_the_same(seed: int) -> None:
    spectra, cost = problem(seed, (9, 9, 9))
    found = pick(spectra, cost, Target(energy=0.93, per="overall"))
    allowed = math.sqrt(0.07)
    assert left_out(spectra, found) <= allowed
    best = min(price(cost, r) for r in every_choice(spectra) if left_out(spectra, r) <= allowed)
    assert price(cost, found) == best


@pytest.mark.parametrize("seed", range(12))
def test_overall_with_a_rank_alone_spends_its_parameters_better(seed: int) -> None:
    spectra, cost = problem(seed)
    found = pick(spectra, cost, Target(rank=3, per="overall"))
    uniform = dict.fromkeys(spectra, 3)
    assert price(cost, found) <= price(cost, uniform)
    within = [r for r in every_choice(spectra) if price(cost, r) <= price(cost, uniform)]
    best = min(left_out(spectra, r) for r in within)
    assert best <= left_out(spectra, found) <= best + 0.1
    # What it keeps, nothing of the same price keeps better.
    same = [r for r in within if price(cost, r) <= price(cost, found) - max(cost.values())]
    assert all(left_out(spectra, found) <= left_out(spectra, r) for r in same)


def test_overall_never_costs_more_than_per_module() -> None:
    for seed in range(10):
        spectra, cost = problem(seed)
        apart = pick(spectra, cost, Target(error=0.2))
        together = pick(spectra, cost, Target(error=left_out(spectra, apart), per="overall"))
        assert price(cost, together) <= price(cost, apart) + max(cost.values())


def test_a_cap_wins_over_the_target() -> None:
    spectra, cost = problem(0)
    assert set(pick(spectra, cost, Target(error=0, rank=2, per="overall")).values()) == {2}
    loose = pick(spectra, cost, Target(error=0.6, rank=5, per="overall"))
    assert loose == pick(spectra, cost, Target(error=0.6, per="overall"))


@pytest.mark.parametrize("per", ["module", "overall"])
def test_zero_modules_and_rounding(per: str) -> None:
    spectra = {
        "zero": torch.zeros(4, dtype=torch.float64),
        "noise": torch.tensor([1.0, 0.5, 1e-14, 1e-15], dtype=torch.float64),
    }
    assert pick(spectra, {"zero": 5, "noise": 5}, Target(error=0, per=per)) == {"zero": 1, "noise": 2}
    assert pick(spectra, {"zero": 5, "noise": 5}, Target()) == {"zero": 1, "noise": 2}
    only = {"zero": torch.zeros(4, dtype=torch.float64)}
    assert pick(only, {"zero": 5}, Target(energy=0.9, per=per)) == {"zero": 1}


def test_a_rank_is_every_modules_rank() -> None:
    spectra, cost = problem(0)
    assert set(pick(spectra, cost, Target(rank=9)).values()) == {9}


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"rank": 0}, "rank: found 0"),
        ({"energy": 0.0}, "energy: found 0.0"),
        ({"energy": 1.1}, "energy: found 1.1"),
        ({"error": -0.1}, "error: found -0.1"),
        ({"error": math.nan}, "error: found nan"),
        ({"error": 0.1, "energy": 0.9}, "give one"),
        ({"rank": 2, "per": "all"}, "per: found 'all'"),
    ],
)
def test_targets_out_of_range(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(LolgenError, match=words):
        Target(**wrong)  # type: ignore[arg-type]
