"""The sketch: unbiased, blind to gauge, rank and format, its error as it is stated; and exact cosines, fast."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lolgen import io, metrics
from lolgen.errors import ShapeError
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec
from lolgen.testing import random_lora
from lolgen.tools.search.exact import likeness
from lolgen.tools.search.sketch import SIZE, canonical, direction, sketch

from .files import SPEC, copies, lora, off_group, padded, regauged


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(a @ b / (a.norm() * b.norm()))


def test_no_gauge_rank_or_precision_moves_it() -> None:
    x = lora(0, 4, scale=0.5)
    base = sketch(x)
    assert base.shape == (SIZE * SIZE,)
    for y in (regauged(x), padded(x, 9), x.replace({n: Factors(f.U, f.A) for n, f in x.factors.items()})):
        assert torch.allclose(sketch(y), base, rtol=1e-4, atol=1e-5)
    assert cosine(sketch(x.to(torch.float16)), base) > 0.9999
    assert cosine(sketch(off_group(x)), base) < 0.9


def test_no_format_moves_it(tmp_path: Path) -> None:
    x = lora()
    base = sketch(x)
    for name, path in copies(x, tmp_path).items():
        assert cosine(sketch(io.load(path)), base) > 0.9999, name


def test_it_is_linear_in_delta_w() -> None:
    x, y = lora(1), lora(2)
    both = LoRA(
        SPEC,
        {n: Factors(torch.cat([x[n].B, 2 * y[n].B], 1), torch.cat([x[n].A, y[n].A], 0)) for n in SPEC.names},
    )
    assert torch.allclose(sketch(both), sketch(x) + 2 * sketch(y), atol=1e-4)


@pytest.mark.parametrize("size", [0.0, 1e200])
def test_what_is_zero_or_overflows_points_nowhere(size: float) -> None:
    x = lora(0, dtype=torch.float64)
    y = x.replace({n: Factors(f.B * size, f.A * size) for n, f in x.factors.items()})
    assert direction(y) is None
    one = direction(x)
    assert one is not None and float(one.norm()) == pytest.approx(1, abs=1e-6)


def renamed(x: LoRA, i: int) -> LoRA:
    """The same factors under other names: another draw of the signs."""
    spec = Spec(tuple(ModuleSpec(f"{m.name}.{i}", m.out, m.in_, m.kernel, m.kind) for m in x.spec))
    return LoRA(spec, {f"{n}.{i}": f for n, f in x.factors.items()})


def test_inner_products_are_unbiased() -> None:
    """Over many draws of the signs the mean is the exact product, within its standard error."""
    x = lora(3)
    y = LoRA(SPEC, {n: Factors(x[n].B + 0.7 * lora(4)[n].B, x[n].A) for n in SPEC.names})
    exact = metrics.inner(x, y)
    draws = torch.stack([sketch(renamed(x, i), 4) @ sketch(renamed(y, i), 4) for i in range(400)])
    error = float(draws.std()) / len(draws) ** 0.5
    assert error < 0.1 * exact
    assert abs(float(draws.mean()) - exact) < 4 * error
    # Two modules' sketches cancel on average: without signs of their own they would not.
    assert abs(float(draws.mean()) - exact) < 0.2 * exact


@pytest.mark.parametrize("p, allowed", [(8, 0.20), (16, 0.12), (32, 0.08)])
def test_the_error_of_a_cosine_falls_with_the_size(p: int, allowed: float) -> None:
    """Root mean square over pairs, of a base of 8 small modules, a hard case: many modules average it out."""
    loras = [lora(i, 2) for i in range(12)]
    vectors = [sketch(x, p) for x in loras]
    errors = []
    for i in range(12):
        for j in range(i):
            errors.append(cosine(vectors[i], vectors[j]) - metrics.cosine(loras[i], loras[j]))
    assert float(torch.tensor(errors).square().mean().sqrt()) < allowed


PINNED = [-13.5, -13.5, -4.5, -4.5]


def test_it_is_the_same_everywhere() -> None:
    """Pinned numbers: indexes are kept, so the signs must never change."""
    spec = Spec((ModuleSpec("a.b", 3, 2),))
    x = LoRA(spec, {"a.b": Factors(torch.tensor([[1.0], [2.0], [4.0]]), torch.tensor([[1.0, 10.0]]))})
    assert sketch(x, 2).tolist() == PINNED
    assert canonical("unet.mid_block.attn1.to_out.0") == canonical("lora_unet_mid_block_attn1_to_out_0")
    assert canonical("lora_te_text_model_x") == canonical("text_encoder.text_model.x")
    assert canonical("lora_te2_x") == canonical("text_encoder_2.x") != canonical("lora_te1_x")


@pytest.mark.parametrize("condition", [10.0, 1e4, 1e8])
def test_exact_cosines_in_any_gauge(condition: float) -> None:
    x, y = lora(1, 4, dtype=torch.float64), lora(2, 6, scale=-0.3, dtype=torch.float64)
    z = LoRA(
        SPEC,
        {n: Factors(x[n].B + 0.2 * lora(5, 4, dtype=torch.float64)[n].B, x[n].A, 2.0) for n in SPEC.names},
    )
    for a, b in ((x, y), (x, z), (x, x)):
        found = likeness(regauged(a, condition, 1), regauged(b, condition, 2))
        assert found.cosine == pytest.approx(metrics.cosine(a, b), abs=1e-4)
        assert found.strength == pytest.approx(metrics.norm(b) / metrics.norm(a), rel=1e-4)
    assert likeness(x, off_group(x)).cosine < 0.9


def test_exact_cosines_of_different_specs(spec: Spec) -> None:
    x, part = lora(1), LoRA(Spec(SPEC.modules[:3]), {n: lora(1)[n] for n in SPEC.names[:3]})
    assert likeness(x, part).cosine == pytest.approx(metrics.cosine(x, part), abs=1e-6)
    g = torch.Generator().manual_seed(0)
    assert likeness(x, random_lora(spec, generator=g)).cosine == 0
    zero = x.replace({n: Factors(f.B * 0, f.A) for n, f in x.factors.items()})
    assert likeness(x, zero).cosine == 0 and likeness(zero, x).cosine == 0
    other = Spec((ModuleSpec(SPEC.names[0], 5, 5),))
    with pytest.raises(ShapeError, match="wanted \\(16, 16\\)"):
        likeness(x, random_lora(other))
