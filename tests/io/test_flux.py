"""Flux: the original names, fused modules taken apart and put together, and diffusers' own conversion as referee."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from adapters import assert_same, double, linear_spec, random, relative
from torch import Tensor, nn

from lolgen import gl, io, metrics
from lolgen.errors import FormatError
from lolgen.io import names
from lolgen.io.families import LAYOUTS
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec

LAYOUT = LAYOUTS["flux"]
DOUBLE, SINGLE = "transformer.transformer_blocks.0", "transformer.single_transformer_blocks.0"
QKV = tuple(f"{DOUBLE}.attn.{p}" for p in ("to_q", "to_k", "to_v"))
LINEAR1 = (*(f"{SINGLE}.attn.{p}" for p in ("to_q", "to_k", "to_v")), f"{SINGLE}.proj_mlp")
W = 8
MINI = Spec(
    (
        *(ModuleSpec(n, W, W) for n in LINEAR1[:3]),
        ModuleSpec(LINEAR1[3], 4 * W, W),
        *(ModuleSpec(n, W, W) for n in QKV),
    )
)


def full_size(**counts: int) -> Any:
    from diffusers import FluxTransformer2DModel

    with torch.device("meta"):
        return FluxTransformer2DModel(guidance_embeds=True, **counts)


def test_every_module_of_the_real_model_has_an_original_name_and_comes_back() -> None:
    model = full_size()
    paths = [n for n, m in model.named_modules() if isinstance(m, nn.Linear)]
    assert len(paths) == 19 * 14 + 38 * 6 + 10
    originals = set()
    for path in paths:
        found = LAYOUT.original(path)
        assert found is not None, path
        original, i = found
        assert LAYOUT.parts(original)[i] == path
        key = "lora_unet_" + original.replace(".", "_")
        waiting = names.pending(names.from_kohya(key, {}))
        assert waiting == ("flux", original) or names.from_kohya(key, {}) == f"transformer.{path}"
        assert names.from_kohya("lora_transformer_" + path.replace(".", "_"), {}) == f"transformer.{path}"
        originals.add(key)
    assert len(originals) == 19 * 10 + 38 * 3 + 10
    assert {"lora_unet_double_blocks_18_txt_attn_qkv", "lora_unet_single_blocks_37_linear1"} <= originals


def converted(file: Path) -> dict[str, Factors]:
    """What stock diffusers makes of a file, by our names. It puts no `transformer.` before modules outside blocks."""
    from diffusers import FluxPipeline

    state = FluxPipeline.lora_state_dict(str(file))
    state = state[0] if isinstance(state, tuple) else state
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in state.items():
        name, _, letter = key.removesuffix(".weight").rpartition(".lora_")
        found.setdefault(name if name.startswith("transformer.") else f"transformer.{name}", {})[letter] = (
            tensor
        )
    return {n: Factors(h["B"], h["A"]) for n, h in found.items()}


def as_lora(found: dict[str, Factors]) -> LoRA:
    spec = Spec(tuple(ModuleSpec(n, len(f.B), f.A.shape[1]) for n, f in found.items()))
    return LoRA(spec, found)


@pytest.mark.parametrize("kind", ["equal", "mixed", "shared"])
def test_diffusers_reads_the_same_delta_w_at_true_size(kind: str, tmp_path: Path) -> None:
    """Every module of a double and a single block and all outside, 3072 wide, as stock diffusers converts it."""
    spec = linear_spec(full_size(num_layers=1, num_single_layers=1), "transformer.", ("",))
    g = torch.Generator().manual_seed(5)
    ranks = {n: 2 if kind != "mixed" else int(torch.randint(1, 4, (), generator=g)) for n in spec.names}
    lora = random(spec, ranks)
    if kind == "shared":
        for first, *others in (QKV, LINEAR1):
            for name in others:
                lora.factors[name] = Factors(lora[name].B, lora[first].A, lora[name].scale)
    report: list[io.Fused] = []
    file = io.save(lora, tmp_path / "x.safetensors", "kohya", report=report)
    stored = safetensors.torch.load_file(file)
    wanted = {"shared": (2, 2), "equal": (6, 8)}.get(
        kind, (sum(ranks[n] for n in QKV), sum(ranks[n] for n in LINEAR1))
    )
    assert stored["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].shape == (9216, wanted[0])
    assert stored["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (21504, wanted[1])
    assert {f.name: (f.rank, f.error) for f in report} | {
        "double_blocks.0.img_attn.qkv": (wanted[0], 0.0),
        "single_blocks.0.linear1": (wanted[1], 0.0),
    } == {f.name: (f.rank, f.error) for f in report}
    theirs = converted(file)
    assert theirs.keys() == set(lora.names)
    for name in lora.names:
        one = LoRA(Spec((spec[name],)), {name: lora[name]})
        assert metrics.relative_distance(one, as_lora({name: theirs[name]})) <= 1e-6, name
    again = io.load(file, modules=spec)
    assert again.spec == spec and metrics.relative_distance(lora, again) <= 1e-6
    if kind != "shared":
        assert again.ranks == lora.ranks


def test_what_stock_diffusers_leaves_out_of_a_kohya_file(tmp_path: Path) -> None:
    """Pinned, as the documentation says so: modules outside the blocks get no component's name, and no place."""
    from diffusers import FluxPipeline

    spec = Spec((ModuleSpec("transformer.x_embedder", 8, 4), ModuleSpec(f"{DOUBLE}.attn.to_out.0", 8, 8)))
    file = io.save(random(spec), tmp_path / "x.safetensors", "kohya", base="flux")
    state = FluxPipeline.lora_state_dict(str(file))
    assert {k.partition(".lora")[0] for k in state} == {"x_embedder", f"{DOUBLE}.attn.to_out.0"}
    assert io.load(file).names == (f"{DOUBLE}.attn.to_out.0", "transformer.x_embedder")


def test_the_last_modulation_has_its_halves_swapped(tmp_path: Path) -> None:
    name = "transformer.norm_out.linear"
    spec = Spec((ModuleSpec(name, 8, 4), ModuleSpec("transformer.x_embedder", 8, 4)))
    lora = random(spec, 2, scale=1.0)
    file = io.save(lora, tmp_path / "x.safetensors", "kohya", base="flux")
    stored = safetensors.torch.load_file(file)
    up = stored["lora_unet_final_layer_adaLN_modulation_1.lora_up.weight"]
    assert torch.equal(up, torch.cat([lora[name].B[4:], lora[name].B[:4]]))
    assert torch.equal(converted(file)[name].B, lora[name].B)
    assert_same(io.load(file), lora)


def fused_rank(lora: LoRA, tmp_path: Path) -> list[io.Fused]:
    """Writes, checks delta W part by part, and gives what was fused."""
    report: list[io.Fused] = []
    found = io.load(
        io.save(lora, tmp_path / "x.safetensors", "kohya", base="flux", report=report), modules=lora.spec
    )
    error = 1e-6 if lora.dtype == torch.float32 else 1e-12
    for name in lora.names:
        assert relative(double(found[name]), double(lora[name])) <= error, name
    return report


def gauged(lora: LoRA, groups: tuple[tuple[str, ...], ...], condition: float, noise: float = 0.0) -> LoRA:
    """The same with A's that span one space a group, each in a gauge of its own; `noise` moves them out of it."""
    g = torch.Generator().manual_seed(2)
    factors = dict(lora.factors)
    for first, *others in groups:
        A = lora[first].A.double()
        for name in others:
            gauge = gl.random_gauge(rank=len(A), condition=condition, generator=g, dtype=torch.float64)
            moved = gauge @ A + noise * torch.randn(A.shape, generator=g, dtype=torch.float64)
            factors[name] = Factors(lora[name].B, moved.to(lora.dtype), lora[name].scale)
    return lora.replace(factors)


def test_the_same_space_in_other_gauges_keeps_the_rank(dtype: torch.dtype, tmp_path: Path) -> None:
    lora = gauged(random(MINI, 2, dtype=dtype), (QKV, LINEAR1), 10.0)
    for found in fused_rank(lora, tmp_path):
        assert found.rank == 2
        assert 0 < found.error <= (4e-7 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("noise", [1e-5, 1e-3])
def test_a_space_that_is_only_near_does_not(noise: float, dtype: torch.dtype, tmp_path: Path) -> None:
    lora = gauged(random(MINI, 2, dtype=dtype), (QKV, LINEAR1), 10.0, noise)
    assert [f.rank for f in fused_rank(lora, tmp_path)] == [8, 6]
    assert all(f.error == 0 for f in fused_rank(lora, tmp_path))


def test_a_part_far_smaller_than_the_others_keeps_its_own_accuracy(tmp_path: Path) -> None:
    lora = gauged(random(MINI, 2), (QKV,), 10.0, 1e-4)
    lora.factors[QKV[1]] = Factors(lora[QKV[1]].B * 1e-9, lora[QKV[1]].A, lora[QKV[1]].scale)
    assert {f.rank for f in fused_rank(lora, tmp_path)} == {6, 8}


def test_a_badly_conditioned_gauge_falls_back_to_the_sum_of_ranks(tmp_path: Path) -> None:
    """Float32 A's in a gauge of condition 1e6 span the space only roughly: nothing may be lost for that."""
    fused_rank(gauged(random(MINI, 3), (QKV, LINEAR1), 1e6), tmp_path)


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_rows_are_shared_bit_for_bit(half: torch.dtype, tmp_path: Path) -> None:
    lora = random(MINI, 2, scale=1.0, dtype=half)
    for name in QKV[1:]:
        lora.factors[name] = Factors(lora[name].B, lora[QKV[0]].A)
    report: list[io.Fused] = []
    file = io.save(lora, tmp_path / "x.safetensors", "kohya", base="flux", report=report)
    assert {f.name: f.rank for f in report} == {
        "double_blocks.0.img_attn.qkv": 2,
        "single_blocks.0.linear1": 8,
    }
    assert (
        safetensors.torch.load_file(file)["lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"].dtype
        == half
    )
    assert_same(io.load(file, modules=MINI), lora, 1e-12)


@pytest.mark.parametrize("there", [(0,), (2,), (0, 2), (3,), (1, 3), (0, 1, 2)])
def test_parts_that_the_adapter_leaves_alone(there: tuple[int, ...], tmp_path: Path) -> None:
    spec = Spec(tuple(MINI[LINEAR1[i]] for i in there))
    lora = random(spec, 2)
    file = io.save(lora, tmp_path / "x.safetensors", "kohya")
    assert (
        safetensors.torch.load_file(file)["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape[0]
        == 7 * W
    )
    assert set(io.load(file).names) == set(spec.names)
    assert_same(io.load(file, modules=spec), lora)


def test_rows_that_are_zero_and_modules_that_are(tmp_path: Path) -> None:
    lora = random(MINI, 2)
    for name in QKV:
        lora[name].B.zero_()
    lora[LINEAR1[0]].B[3] = 0
    found = io.load(io.save(lora, tmp_path / "x.safetensors", "kohya"))
    assert set(found.names) == set(lora.names)
    assert not any(found[n].delta().any() for n in QKV)


def test_a_fused_file_splits_with_one_a(tmp_path: Path) -> None:
    """As trainers write it: one dense pair for the fused module, alpha beside it."""
    B, A = torch.randn(3 * W, 4), torch.randn(4, W)
    at = "lora_unet_double_blocks_0_txt_attn_qkv"
    tensors = {f"{at}.lora_up.weight": B, f"{at}.lora_down.weight": A, f"{at}.alpha": torch.tensor(2.0)}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    lora = io.load(tmp_path / "x.safetensors")
    parts = [f"{DOUBLE}.attn.add_{p}_proj" for p in "qkv"]
    assert lora.names == tuple(sorted(parts))
    for name, rows in zip(parts, B.split(W), strict=True):
        assert torch.equal(lora[name].A, A) and torch.equal(lora[name].B, rows) and lora[name].scale == 0.5
    report: list[io.Fused] = []
    again = safetensors.torch.load_file(
        io.save(lora, tmp_path / "y.safetensors", "kohya", base="flux", report=report)
    )
    assert torch.equal(again[f"{at}.lora_down.weight"], A)
    assert torch.equal(again[f"{at}.lora_up.weight"], B * 0.5)
    assert [(f.ranks, f.rank, f.error) for f in report] == [((4, 4, 4), 4, 0.0)]


@pytest.mark.parametrize(
    ("prefix", "down", "up"),
    [
        ("diffusion_model.", "lora_A.weight", "lora_B.weight"),
        ("diffusion_model.", "lora_down.weight", "lora_up.weight"),
        ("model.diffusion_model.", "lora.down.weight", "lora.up.weight"),
        ("", "lora_A.weight", "lora_B.weight"),
    ],
)
def test_the_dotted_names_of_other_programs(prefix: str, down: str, up: str, tmp_path: Path) -> None:
    B, A = torch.randn(7 * W, 2), torch.randn(2, W)
    at = f"{prefix}single_blocks.0.linear1"
    plain = f"{prefix}double_blocks.3.img_mlp.0"
    clip = "text_encoders.clip_l.transformer.text_model.encoder.layers.1.mlp.fc1"
    tensors = {f"{at}.{up}": B, f"{at}.{down}": A, f"{at}.alpha": torch.tensor(1.0)}
    tensors |= {
        f"{n}.{p}": t for n in (plain, clip) for p, t in ((up, torch.ones(4, 1)), (down, torch.ones(1, 3)))
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    assert io.detect(tmp_path / "x.safetensors") == "diffusers"
    lora = io.load(tmp_path / "x.safetensors")
    assert set(lora.names) == {
        *LINEAR1,
        "transformer.transformer_blocks.3.ff.net.0.proj",
        "text_encoder.text_model.encoder.layers.1.mlp.fc1",
    }
    stacked = torch.cat([double(lora[n]) for n in LINEAR1])
    assert relative(stacked, 0.5 * B.double() @ A.double()) <= 1e-12


def test_an_original_model_wrapped_by_peft(tmp_path: Path) -> None:
    B, A = torch.randn(3 * W, 2), torch.randn(2, W)
    at = "base_model.model.double_blocks.0.img_attn.qkv"
    safetensors.torch.save_file(
        {f"{at}.lora_A.weight": A, f"{at}.lora_B.weight": B}, tmp_path / "adapter_model.safetensors"
    )
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 2, "lora_alpha": 4}')
    lora = io.load(tmp_path)
    assert set(lora.names) == set(QKV)
    assert relative(torch.cat([double(lora[n]) for n in QKV]), 2 * B.double() @ A.double()) <= 1e-12


def test_t5_is_the_second_text_encoder(tmp_path: Path) -> None:
    t5 = "encoder.block.3.layer.1.DenseReluDense.wi_0"
    spec = Spec((ModuleSpec(f"text_encoder_2.{t5}", 4, 4), ModuleSpec(QKV[0], W, W)))
    lora = random(spec, 2)
    file = io.save(lora, tmp_path / "x.safetensors", "kohya", base="flux")
    assert (
        "lora_te3_encoder_block_3_layer_1_DenseReluDense_wi_0.lora_up.weight"
        in safetensors.torch.load_file(file)
    )
    assert_same(io.load(file), lora)
    # It also tells Flux from SD3, whose second text encoder is a CLIP.
    assert_same(io.load(io.save(lora, tmp_path / "y.safetensors", "kohya")), lora)


def test_magnitudes_go_with_their_rows(tmp_path: Path) -> None:
    lora = random(MINI, 2)
    for i, name in enumerate(QKV):
        lora.extras[f"{name}.lora_magnitude_vector"] = torch.full((W,), float(i))
    file = io.save(lora, tmp_path / "x.safetensors", "kohya", base="flux")
    scale = safetensors.torch.load_file(file)["lora_unet_double_blocks_0_img_attn_qkv.dora_scale"]
    assert scale.shape == (3 * W, 1) and scale[:, 0].tolist() == [0.0] * W + [1.0] * W + [2.0] * W
    again = io.load(file)
    for i, name in enumerate(QKV):
        assert again.extras[f"{name}.lora_magnitude_vector"].tolist() == [float(i)] * W
    del lora.extras[f"{QKV[1]}.lora_magnitude_vector"]
    with pytest.raises(FormatError, match="to_k.lora_magnitude_vector.*wanted one for every part"):
        io.save(lora, tmp_path / "y.safetensors", "kohya", base="flux")


def test_what_cannot_be_cut_or_joined(tmp_path: Path) -> None:
    at = "lora_unet_single_blocks_0_linear1"
    for out in (3 * W, 2 * W):
        tensors = {f"{at}.lora_up.weight": torch.ones(out, 1), f"{at}.lora_down.weight": torch.ones(1, W)}
        safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
        with pytest.raises(FormatError, match=r"delta W of shape \(\d+, 8\); wanted rows for .*proj_mlp"):
            io.load(tmp_path / "x.safetensors")
    spec = Spec((ModuleSpec(QKV[0], W, W), ModuleSpec(QKV[1], W, W + 1)))
    with pytest.raises(FormatError, match="wanted a linear one with 8 inputs"):
        io.save(random(spec), tmp_path / "y.safetensors", "kohya", base="flux")


def test_which_transformer_it_is(tmp_path: Path) -> None:
    shared = Spec((ModuleSpec(QKV[0], W, W),))
    with pytest.raises(FormatError, match="modules that flux and sd3 share.*--base flux"):
        io.save(random(shared), tmp_path / "x.safetensors", "kohya")
    with pytest.raises(FormatError, match="wanted modules of sdxl"):
        io.save(random(shared), tmp_path / "x.safetensors", "kohya", base="sdxl")
    other = Spec((ModuleSpec("transformer.layers.0.attention.to_q", W, W),))
    with pytest.raises(FormatError, match="kohya has no name for.*wanted modules of flux or sd3"):
        io.save(random(other), tmp_path / "x.safetensors", "kohya")
    wide = Spec((ModuleSpec(QKV[0], 2, 3072),))
    file = io.save(random(wide), tmp_path / "x.safetensors", "kohya")
    assert "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight" in safetensors.torch.load_file(file)


def test_xlabs_files(tmp_path: Path) -> None:
    """Two pairs a double block, queries, keys and values of single blocks alone; diffusers is the referee."""
    tensors = {}
    for at, out, in_ in (
        ("double_blocks.2.processor.qkv_lora1", 3 * W, W),
        ("double_blocks.2.processor.qkv_lora2", 3 * W, W),
        ("double_blocks.2.processor.proj_lora1", W, W),
        ("double_blocks.2.processor.proj_lora2", W, W),
        ("single_blocks.3.processor.qkv_lora", 3 * W, W),
        ("single_blocks.3.processor.proj_lora", W, 5 * W),
    ):
        tensors |= {f"{at}.down.weight": torch.randn(2, in_), f"{at}.up.weight": torch.randn(out, 2)}
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file(tensors, file)
    lora, theirs = io.load(file), converted(file)
    assert set(lora.names) == set(theirs) and len(lora) == 12
    for name in lora.names:
        assert relative(double(lora[name]), double(theirs[name])) <= 1e-12, name
    stored = safetensors.torch.load_file(io.save(lora, tmp_path / "y.safetensors", "kohya", base="flux"))
    assert stored["lora_unet_single_blocks_3_linear1.lora_up.weight"].shape == (7 * W, 2)
    assert_same(io.load(tmp_path / "y.safetensors"), lora)


@pytest.mark.slow
def test_stock_diffusers_runs_a_single_block_at_true_width(tmp_path: Path) -> None:
    """`linear1` as well, which diffusers cuts at 3072 whatever the model: outputs against weights merged by hand."""
    import models

    pipe = models.flux_pipeline(heads=24, width=128, double_blocks=0, single_blocks=1)
    inside = [m for m in models.spec_of(pipe) if m.name.startswith("transformer.single_transformer_blocks.")]
    assert len(inside) == 6
    lora = models.random_ranks(Spec(tuple(inside)))
    merged = models.merged("transformer", pipe.transformer, lora)
    wanted, plain = models.output("transformer", merged), models.output("transformer", pipe.transformer)
    del merged
    pipe.load_lora_weights(str(io.save(lora, tmp_path / "x.safetensors", "kohya")), adapter_name="x")
    models.assert_acts_like(pipe, {"transformer": wanted}, {"transformer": plain})
