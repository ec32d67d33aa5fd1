"""`compare` and `diff`: figures against dense arithmetic, whatever the gauge."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lolgen import io, metrics, pipeline
from lolgen.errors import LolgenError, ShapeError
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec
from lolgen.testing import assert_invariant
from lolgen.tools import files
from lolgen.tools.compare import compare, overall, principal_angles, rows
from lolgen.tools.diff import diff
from tools.dense import EVERY_KIND, RANKS_B, best, delta, draw, given, relative, without


def dense_angles(A: Tensor, B: Tensor) -> list[float]:
    """Between column spaces, from the projectors: the singular values of P_a P_b are the cosines."""
    bases = []
    for W in (A, B):
        P, S, _ = torch.linalg.svd(W, full_matrices=False)
        bases.append(P[:, 1e-9 * S[0] < S])
    k = min(b.shape[1] for b in bases)
    cosines = torch.linalg.svdvals(bases[0] @ bases[0].mT @ bases[1] @ bases[1].mT)[:k]
    return [math.degrees(math.acos(min(1.0, float(c)))) for c in cosines]


def test_rows_are_the_dense_figures() -> None:
    a, b = draw(), without(draw(ranks=RANKS_B, seed=1), "conv_in")
    table = rows(given(a, b))
    assert [r["name"] for r in table] == list(EVERY_KIND.names)
    for row in table:
        A = delta(a, row["name"])
        if row["name"] == "conv_in":
            assert row["in"] == "a" and row["rank_b"] == 0 and row["relative_distance"] == 1
            assert row["norm_a"] == pytest.approx(float(A.norm())) and row["cosine"] == 0
            assert "column_angles" not in row
            continue
        B = delta(b, row["name"])
        assert row["in"] == "both"
        assert (row["rank_a"], row["rank_b"]) == (a[row["name"]].rank, b[row["name"]].rank)
        assert row["norm_a"] == pytest.approx(float(A.norm()))
        assert row["norm_b"] == pytest.approx(float(B.norm()))
        assert row["distance"] == pytest.approx(float((A - B).norm()))
        assert row["relative_distance"] == pytest.approx(relative(B, A))
        assert row["cosine"] == pytest.approx(float((A * B).sum() / A.norm() / B.norm()))
        assert row["column_angles"] == pytest.approx(dense_angles(A, B), abs=1e-5)
        assert row["row_angles"] == pytest.approx(dense_angles(A.mT, B.mT), abs=1e-5)
    whole = overall(table)
    assert whole["cosine"] == pytest.approx(metrics.cosine(a, b))
    assert whole["relative_distance"] == pytest.approx(metrics.relative_distance(a, b))


@pytest.mark.parametrize("angle", [0.0, 1e-9, 1e-4, 1.0, 45.0, 90.0])
def test_small_angles_are_seen(angle: float) -> None:
    t = math.radians(angle)
    Q1 = torch.tensor([[1.0, 0], [0, 1], [0, 0], [0, 0]], dtype=torch.float64)
    Q2 = torch.tensor([[math.cos(t)], [0], [math.sin(t)], [0]], dtype=torch.float64)
    for one, two in ((Q1, Q2), (Q2, Q1)):
        (found,) = principal_angles(one, two)
        assert found == pytest.approx(angle, rel=1e-6, abs=1e-14)


def test_no_gauge_changes_the_figures(dtype: torch.dtype) -> None:
    a, b = draw(dtype=dtype), draw(ranks=RANKS_B, seed=1, dtype=dtype)

    def figures(x: LoRA) -> list[Any]:
        # Angles from 90 degrees on: where spaces meet, the angle is 0 and has no relative error.
        keys = ("norm_a", "norm_b", "distance", "inner")
        angles = ("column_angles", "row_angles")
        return [
            [*(r[k] for k in keys), *(90 + angle for k in angles for angle in r[k])]
            for r in rows(given(x, b))
        ]

    conditions = (10.0,) if dtype == torch.float32 else (10.0, 1e4)
    assert_invariant(figures, a, conditions=conditions, slack=1e4)
    with pytest.raises(AssertionError):
        assert_invariant(figures, a, conditions=conditions, slack=1e4, off_group=True)


def test_near_equal_loras_are_told_apart() -> None:
    """The distance comes from the difference itself, not from norms that cancel."""
    a = draw()
    b = a.replace({n: Factors(f.B * (1 + 1e-9), f.A, f.scale) for n, f in a.factors.items()})
    assert overall(rows(given(a, b)))["relative_distance"] == pytest.approx(1e-9, rel=1e-4)
    assert overall(rows(given(a, a)))["relative_distance"] < 1e-14


def test_zero_modules() -> None:
    a, b = draw(zero=EVERY_KIND.names), draw(seed=1)
    table = rows(given(a, b))
    assert all(r["cosine"] == 0 and r["relative_distance"] == math.inf for r in table)
    assert all(r["column_angles"] == [] for r in table)
    assert overall(rows(given(a, a)))["relative_distance"] == 0


def files_of(tmp_path: Path) -> tuple[Path, Path]:
    a, b = draw(dtype=torch.float32), without(draw(ranks=RANKS_B, seed=1, dtype=torch.float32), "gate")
    return io.save(a, tmp_path / "a", "peft"), io.save(b, tmp_path / "b", "peft")


def test_compare_keeps_its_keys(tmp_path: Path) -> None:
    one, two = files_of(tmp_path)
    report = compare(one, two)
    assert report["modules"] == {"shared": 5, "only_a": 1, "only_b": 0}
    assert report["cosine"] == pytest.approx(metrics.cosine(io.load(one), io.load(two)))
    assert "per_module" not in report and len(compare(one, two, modules=True)["per_module"]) == 6
    assert pipeline.compare(one, two) == report
    other = io.save(draw(Spec((ModuleSpec("x", 3, 3),)), 1), tmp_path / "c", "peft")
    with pytest.raises(LolgenError, match="share no module"):
        compare(one, other)
    wide = io.save(draw(Spec((ModuleSpec("attn.to_q", 12, 11),)), 1), tmp_path / "d", "peft")
    with pytest.raises(ShapeError, match="different bases"):
        compare(one, wide)


def test_diff_is_what_turns_a_into_b(tmp_path: Path) -> None:
    one, two = files_of(tmp_path)
    report = diff(one, two, out=tmp_path / "d")
    a, b, d = io.load(one), io.load(two), io.load(tmp_path / "d")
    for row in report["modules"]:
        name = row["name"]
        wanted = (delta(b, name) if name in b.spec else 0) - delta(a, name)
        assert relative(delta(d, name), wanted) < 1e-6
        assert row["rank"] == d[name].rank == int(torch.linalg.matrix_rank(wanted, rtol=1e-6))
        assert row["error"] < 1e-6 and row["distance"] == pytest.approx(float(wanted.norm()))
    assert report["distance"] == pytest.approx(report["norm"])
    recipe = json.loads(d.metadata[files.RECIPE])
    assert recipe["command"] == "diff" and [i["weight"] for i in recipe["inputs"]] == [-1, 1]
    small = diff(one, two, rank=2, out=tmp_path / "small")
    found = io.load(tmp_path / "small")
    for row in small["modules"]:
        name = row["name"]
        wanted = (delta(b, name) if name in b.spec else 0) - delta(a, name)
        assert relative(delta(found, name), best(wanted, 2)) < 1e-6
        assert row["error"] == pytest.approx(relative(best(wanted, 2), wanted), abs=1e-6)


def test_diff_of_extras_is_an_error_and_compare_counts_them(tmp_path: Path) -> None:
    one, _ = files_of(tmp_path)
    lora = draw(dtype=torch.float32)
    lora.extras["attn.to_q.lora_magnitude_vector"] = torch.ones(12)
    dora = io.save(lora, tmp_path / "dora", "peft")
    with pytest.raises(LolgenError, match="lora_magnitude_vector"):
        diff(one, dora, out=tmp_path / "d")
    assert not (tmp_path / "d").exists()
    assert compare(one, dora)["extras"] == {"a": 0, "b": 1}
