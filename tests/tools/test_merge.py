"""`merge`: exact sums, methods against dense references, no gauge, honest reports."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lolgen import io
from lolgen.errors import LolgenError, ShapeError
from lolgen.lora import LoRA, ModuleSpec, Spec
from lolgen.testing import assert_invariant
from lolgen.tools import files
from lolgen.tools.merge import merge, merged
from lolgen.tools.methods import METHODS, Options
from lolgen.tools.ranks import Target
from tools.dense import EVERY_KIND, RANKS_B, best, delta, draw, given, lora_of, relative, without

ALL = tuple(METHODS)


def run(*loras: LoRA, method: str = "sum", weights: tuple[float, ...] = (0.7, 0.3), seed: int = 0,
        density: float = 0.5, target: Target | None = None) -> LoRA:  # fmt: skip
    options = Options(weights, density, seed)
    made, _ = merged(given(*loras), method, options, target or Target(), "float64")
    return lora_of(made, *loras)


def zero(name: str, lora: LoRA) -> Tensor:
    return torch.zeros(lora.spec[name].shape, dtype=torch.float64)


def dense(lora: LoRA, name: str, like: LoRA) -> Tensor:
    return delta(lora, name) if name in lora.spec else zero(name, like)


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -1.0), (0.0, 2.0)])
def test_the_sum_is_the_dense_sum(weights: tuple[float, float]) -> None:
    a, b = draw(zero=("embed",)), without(draw(ranks=RANKS_B, seed=1), "conv_in")
    found = run(a, b, weights=weights)
    for name in EVERY_KIND.names:
        wanted = weights[0] * dense(a, name, a) + weights[1] * dense(b, name, a)
        assert float((found[name].delta() - wanted).norm()) < 1e-12 * (1 + float(wanted.norm())), name
        assert found[name].rank == max(1, int(torch.linalg.matrix_rank(wanted)))


def test_the_average_divides_by_the_weights() -> None:
    a, b = draw(), draw(ranks=RANKS_B, seed=1)
    found = run(a, b, method="average", weights=(3.0, 1.0))
    for name in EVERY_KIND.names:
        assert relative(found[name].delta(), 0.75 * delta(a, name) + 0.25 * delta(b, name)) < 1e-12
    with pytest.raises(LolgenError, match="add up to 0"):
        run(a, b, method="average", weights=(1.0, -1.0))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_a_truncated_merge_is_the_optimum_for_the_exact_one(k: int) -> None:
    a, b = draw(), draw(ranks=RANKS_B, seed=1)
    made, report = merged(given(a, b), "sum", Options((0.7, 0.3)), Target(rank=k), "float64")
    for row in report["modules"]:
        W = 0.7 * delta(a, row["name"]) + 0.3 * delta(b, row["name"])
        optimum = best(W, k)
        assert float((made[row["name"]].factors.delta() - optimum).norm()) < 1e-11 * float(W.norm())
        assert row["norm"] == pytest.approx(float(W.norm()))
        assert row["error"] == pytest.approx(relative(optimum, W), abs=1e-7)
        assert row["from_sum"] == 0


def test_disjoint_modules_stand_side_by_side() -> None:
    a = without(draw(), "attn.to_v", "conv_in", "embed")
    b = without(draw(seed=1), "attn.to_q", "conv_1x1", "gate")
    made, report = merged(given(a, b), "sum", Options((2.0, -1.0)), Target(), "float64")
    assert report["shared_modules"] == 0 and len(made) == 6
    for name in made:
        wanted = 2 * delta(a, name) if name in a.spec else -delta(b, name)
        assert relative(made[name].factors.delta(), wanted) < 1e-12


def test_a_lora_less_itself_is_zero() -> None:
    a = draw()
    found = run(a, a, weights=(1.0, -1.0))
    assert all(f.rank == 1 and not f.delta().any() for f in found.factors.values())
    assert run(a, a).ranks == run(a, weights=(1.0,)).ranks, "the same LoRA twice has no higher rank"


# The methods that look at entries, against themselves in dense arithmetic.


def tucker(matrices: list[Tensor]) -> tuple[Tensor, Tensor, int]:
    """Left vectors of the matrices side by side, right ones of the matrices stacked, product of their ranks."""
    P, S, _ = torch.linalg.svd(torch.cat(matrices, 1), full_matrices=False)
    _, T, Qh = torch.linalg.svd(torch.cat(matrices, 0), full_matrices=False)
    p, q = int((1e-10 * S[0] < S).sum()), int((1e-10 * T[0] < T).sum())
    return P[:, :p], Qh[:q].mT, p * q


def dense_ties(matrices: list[Tensor], weights: tuple[float, ...], density: float) -> Tensor:
    P, Q, count = tucker(matrices)
    keep = max(1, round(density * count))
    cores = []
    for W in matrices:
        C = P.mT @ W @ Q
        smallest = C.abs().flatten().sort(descending=True)[0][keep - 1]
        cores.append(C * (C.abs() >= smallest))
    result = torch.zeros_like(cores[0])
    for i in range(result.shape[0]):
        for j in range(result.shape[1]):
            weighted = [w * float(C[i, j]) for w, C in zip(weights, cores, strict=True)]
            total = sum(weighted)
            agree = [(x, abs(w)) for x, w in zip(weighted, weights, strict=True) if x * total > 0]
            if agree:
                result[i, j] = sum(x for x, _ in agree) / sum(w for _, w in agree)
    return P @ result @ Q.mT


@pytest.mark.parametrize("density", [0.2, 0.5, 1.0])
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, -1.0), (1.0, 2.0, 0.5)])
def test_ties_against_the_dense_definition(density: float, weights: tuple[float, ...]) -> None:
    loras = [draw(), draw(ranks=RANKS_B, seed=1), draw(ranks=2, seed=2)][: len(weights)]
    found = run(*loras, method="ties", weights=weights, density=density)
    for name in EVERY_KIND.names:
        wanted = dense_ties([delta(x, name) for x in loras], weights, density)
        assert relative(found[name].delta(), wanted) < 1e-9, name


def test_ties_of_one_lora_at_full_density_is_that_lora() -> None:
    a = draw()
    found = run(a, method="ties", weights=(0.3,), density=1.0)
    assert all(relative(found[n].delta(), delta(a, n)) < 1e-12 for n in a.names)
    twice = run(a, a, method="ties", weights=(5.0, 5.0), density=1.0)
    assert all(relative(twice[n].delta(), delta(a, n)) < 1e-12 for n in a.names)


def test_dare_is_unbiased() -> None:
    spec = Spec((ModuleSpec("m", 9, 7),))
    a, b = draw(spec, 2), draw(spec, 3, seed=1)
    wanted = 0.7 * delta(a, "m") + 0.3 * delta(b, "m")
    draws = torch.stack([run(a, b, method="dare", seed=s, density=0.4)["m"].delta() for s in range(400)])
    spread = draws.std(0).norm() / len(draws) ** 0.5
    assert float((draws.mean(0) - wanted).norm()) < 3 * float(spread)
    assert float(spread) < 0.1 * float(wanted.norm()), "or the test could not fail"
    # The twin: without the rescaling the mean is elsewhere.
    assert float((0.4 * draws.mean(0) - wanted).norm()) > 10 * float(spread)


def test_dare_depends_on_the_seed_the_module_and_the_input_alone() -> None:
    a, b = draw(), draw(ranks=RANKS_B, seed=1)
    one, same, other = (run(a, b, method="dare", seed=s) for s in (3, 3, 4))
    alone = run(without(a, "embed"), without(b, "embed"), method="dare", seed=3)
    for name in EVERY_KIND.names:
        assert torch.equal(one[name].delta(), same[name].delta())
        if name in alone.spec:
            assert relative(alone[name].delta(), one[name].delta()) < 1e-12
    assert relative(other["embed"].delta(), one["embed"].delta()) > 0.1
    assert run(a, a, method="dare", weights=(1.0, -1.0))["embed"].delta().any(), "each input its own draw"


def test_dare_at_full_density_is_the_sum() -> None:
    a, b = draw(), draw(ranks=RANKS_B, seed=1)
    one, two = run(a, b, method="dare", density=1.0), run(a, b)
    assert all(relative(one[n].delta(), two[n].delta()) < 1e-12 for n in a.names)


@pytest.mark.parametrize("method", ["ties", "dare"])
def test_zero_columns_change_nothing(method: str) -> None:
    """The same delta W in more columns, as from padding."""
    a, b = draw(), draw(ranks=RANKS_B, seed=1)
    made, _ = merged(given(a), "sum", Options((1.0,)), Target(rank=9), "float64")
    one, two = run(a, b, method=method), run(lora_of(made, a), b, method=method)
    assert all(relative(two[n].delta(), one[n].delta()) < 1e-9 for n in a.names)


def projector(W: Tensor) -> Tensor:
    """Onto the column space."""
    P, S, _ = torch.linalg.svd(W, full_matrices=False)
    P = P[:, 1e-10 * S[0] < S]
    return P @ P.mT


def test_orthogonal_leaves_the_earlier_loras_alone() -> None:
    spec = Spec((ModuleSpec("m", 20, 16), ModuleSpec("conv", 12, 3, (3, 3), "conv")))
    loras = [draw(spec, (3, 2)), draw(spec, (2, 4), seed=1), draw(spec, (4, 1), seed=2)]
    weights = (0.7, 0.5, -0.4)
    found = run(*loras, method="orthogonal", weights=weights)
    plain = run(*loras, weights=weights)
    for name in spec.names:
        R = found[name].delta()
        first = weights[0] * delta(loras[0], name)
        P, Q = projector(first), projector(first.mT)
        assert relative(P @ R, first) < 1e-10 and relative(R @ Q, first) < 1e-10
        assert relative(P @ plain[name].delta(), first) > 1e-2, "the twin: the plain sum interferes"
        # The same of the first two together: on their spaces the third does not show.
        two = run(*loras[:2], method="orthogonal", weights=weights[:2])[name].delta()
        P = projector(torch.cat([delta(x, name) for x in loras[:2]], 1))
        Q = projector(torch.cat([delta(x, name).mT for x in loras[:2]], 1))
        assert relative(P @ R, two) < 1e-10 and relative(R @ Q, two) < 1e-10
        # And the dense definition.
        wanted, one, other = 0.0 * R, torch.eye(len(P)).double(), torch.eye(len(Q)).double()
        for i, x in enumerate(loras):
            earlier = [delta(y, name) for y in loras[:i]]
            P = projector(torch.cat(earlier, 1)) if i else 0 * one
            Q = projector(torch.cat([W.mT for W in earlier], 1)) if i else 0 * other
            wanted = wanted + weights[i] * (one - P) @ delta(x, name) @ (other - Q)
        assert relative(R, wanted) < 1e-10


def test_orthogonal_when_nothing_is_left() -> None:
    a = draw()
    made, report = merged(given(a, a), "orthogonal", Options((1.0, 1.0)), Target(), "float64")
    assert all(relative(made[n].factors.delta(), delta(a, n)) < 1e-9 for n in a.names)
    assert report["inputs"][1]["used"] < 1e-9 and report["inputs"][0]["used"] == pytest.approx(1)


@pytest.mark.parametrize("method", ALL)
@pytest.mark.parametrize("other", [True, False], ids=["against another", "against itself"])
def test_no_gauge_changes_the_result(method: str, other: bool, dtype: torch.dtype) -> None:
    a = draw(dtype=dtype, zero=("gate",))
    b = draw(ranks=RANKS_B, seed=1, dtype=dtype) if other else draw(dtype=dtype, seed=1)
    # TIES flips entries whose places or signs are decided by rounding, which 1e4 in float32 makes large.
    conditions = (10.0,) if dtype == torch.float32 else (10.0, 1e4)
    # Bases that are made of singular vectors move by rounding over the gap between singular values.
    slack = 1e4 if method in ("ties", "dare") else 500
    for fn in (lambda x: run(x, b, method=method), lambda x: run(b, x, method=method)):
        assert_invariant(fn, a, conditions=conditions, slack=slack)
        with pytest.raises(AssertionError):
            assert_invariant(fn, a, conditions=conditions, slack=slack, off_group=True)


# Files.

UNET = Spec(
    (
        ModuleSpec("unet.mid_block.attentions.0.proj_in", 10, 10, (1, 1), "conv"),
        ModuleSpec("unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q", 12, 10),
    )
)


@pytest.mark.parametrize("method", ALL)
def test_files_of_two_formats(method: str, tmp_path: Path) -> None:
    a, b = draw(UNET, 4, dtype=torch.float32), draw(UNET, (2, 3), seed=1, dtype=torch.float16)
    one = io.save(a, tmp_path / "one", "peft")
    two = io.save(b, tmp_path / "two.safetensors", "kohya")
    report = merge([(one, 0.7), (two, 0.3)], method=method, out=tmp_path / "both", seed=5)
    found = io.load(tmp_path / "both")
    wanted = run(a, io.load(two), method=method, seed=5)
    assert report["format"] == "peft" and found.spec == UNET and found.dtype == torch.float32
    assert all(relative(delta(found, n), wanted[n].delta()) < 1e-5 for n in UNET.names)
    recipe = json.loads(found.metadata[files.RECIPE])
    assert recipe["method"] == method
    assert [(i["name"], i["weight"]) for i in recipe["inputs"]] == [("one", 0.7), ("two.safetensors", 0.3)]
    assert ("seed" in recipe) == (method == "dare") and ("density" in recipe) == (method in ("ties", "dare"))


def test_headers_that_agree_are_kept(tmp_path: Path) -> None:
    paths = []
    for i in range(2):
        lora = draw(UNET, 2, seed=i, dtype=torch.float32)
        lora.metadata |= {"ss_base_model_version": "sd_v1", "ss_output_name": f"n{i}", "ss_network_dim": "2"}
        paths.append(io.save(lora, tmp_path / f"{i}.safetensors", "kohya"))
    merge([(p, 1.0) for p in paths], out=tmp_path / "m.safetensors")
    found = io.load(tmp_path / "m.safetensors").metadata
    assert found["ss_base_model_version"] == "sd_v1" and found["ss_network_dim"] == "4"
    assert "ss_output_name" not in found


def test_peft_configs_keep_the_fields_that_agree(tmp_path: Path) -> None:
    paths = []
    for i in range(2):
        lora = draw(EVERY_KIND, 2, seed=i, dtype=torch.float32)
        config = {"base_model_name_or_path": "base", "lora_dropout": 0.1 * i, "r": i}
        lora.metadata["adapter_config"] = json.dumps(config)
        paths.append(io.save(lora, tmp_path / f"{i}", "peft"))
    merge([(p, 1.0) for p in paths], out=tmp_path / "m")
    config = json.loads((tmp_path / "m" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "base" and config["lora_dropout"] == 0.0
    assert config["r"] == 4 or config["rank_pattern"]


def test_a_1x1_conv_stored_as_a_matrix_is_the_same_module() -> None:
    conv = draw(UNET, 2)
    flat = LoRA(Spec(tuple(ModuleSpec(m.name, *m.shape) for m in UNET)), dict(conv.factors))
    for pair in ((conv, flat), (flat, conv)):
        modules, _ = files.match(given(*pair))
        assert tuple(modules.values()) == UNET.modules
    three = draw(Spec((ModuleSpec(UNET.names[0], 10, 1, (5, 2), "conv"),)), 2)
    with pytest.raises(ShapeError, match="proj_in.*different bases"):
        files.match(given(flat, three))


def test_errors(tmp_path: Path) -> None:
    a = draw(EVERY_KIND, 2, dtype=torch.float32)
    b = draw(Spec((ModuleSpec("attn.to_q", 12, 11),)), 2, dtype=torch.float32)
    c = draw(EVERY_KIND, 2, dtype=torch.float32)
    c.extras["attn.to_q.lora_magnitude_vector"] = torch.ones(12)
    paths = [io.save(x, tmp_path / n, "peft") for x, n in ((a, "a"), (b, "b"), (c, "c"))]
    out = tmp_path / "out"
    for inputs, method, words in (
        ([(paths[0], 1.0), (paths[1], 1.0)], "sum", r"to_q.*\(12, 11\).*\(12, 10\)"),
        ([(paths[0], 1.0), (paths[2], 1.0)], "sum", "lora_magnitude_vector.*plain LoRA"),
        ([(paths[0], 1.0)], "slerp", "method: found 'slerp'"),
        ([], "sum", "no adapter"),
    ):
        with pytest.raises(LolgenError, match=words):
            merge(inputs, method=method, out=out)
    for density in (0.0, 1.5):
        with pytest.raises(LolgenError, match="density: found"):
            merge([(paths[0], 1.0)], method="ties", density=density, out=out)
    assert not out.exists()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("a:0.7", ("a", 0.7)),
        ("a", ("a", 1.0)),
        ("a:-1", ("a", -1.0)),
        ("c:\\x\\a", ("c:\\x\\a", 1.0)),
        ("c:\\x\\a:2", ("c:\\x\\a", 2.0)),
        ("a:b:1e-1", ("a:b", 0.1)),
        ("a:b", ("a:b", 1.0)),
        (":3", (":3", 1.0)),
        ("7", ("7", 1.0)),
    ],
)
def test_weights_stand_behind_the_last_colon(text: str, wanted: tuple[str, float]) -> None:
    assert files.parse(text) == wanted


def test_a_file_that_is_really_called_so(tmp_path: Path) -> None:
    odd = tmp_path / "a:2"
    odd.touch()
    assert files.parse(str(odd)) == (str(odd), 1.0)
    (tmp_path / "a").touch()
    assert files.parse(str(odd)) == (str(tmp_path / "a"), 2.0)
    for text in ("a:nan", "a:inf"):
        with pytest.raises(LolgenError, match="finite"):
            files.parse(text)
