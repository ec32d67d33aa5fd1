"""LoHa and LoKr as LoRAs: delta W against PEFT's own layers of these kinds, Tucker forms included."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import safetensors.torch
import torch
from adapters import double, pipeline, relative, unet
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from lolgen import io
from lolgen.errors import FormatError
from lolgen.io import lycoris

pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
TARGETS = ["to_q", "to_out.0", "conv1", "proj_in", "conv_in", "ff.net.2", "conv_shortcut"]
LINEAR = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def peft_model(method: str, tucker: bool, **options: Any) -> Any:
    """A UNet with random LoHa or LoKr layers of PEFT's."""
    from peft import LoHaConfig, LoKrConfig, get_peft_model

    torch.manual_seed(4)
    config = {"loha": LoHaConfig, "lokr": LoKrConfig}[method](
        target_modules=TARGETS, init_weights=False, use_effective_conv2d=tucker, **options
    )
    model = get_peft_model(unet(), config)
    for name, parameter in model.named_parameters():
        if "hada" in name or "lokr" in name:
            nn.init.normal_(parameter, std=0.4)
    return model.eval()


def written(model: Any, file: Path) -> dict[str, Tensor]:
    """The layers' tensors in a kohya file; the delta W that PEFT gives, by our names."""
    tensors: dict[str, Tensor] = {}
    deltas = {}
    for name, layer in model.base_model.model.named_modules():
        if not hasattr(layer, "get_delta_weight"):
            continue
        head = "lora_unet_" + name.replace(".", "_")
        for part in lycoris_parts(layer):
            tensors[f"{head}.{part}"] = getattr(layer, part)["default"].detach().clone()
        both_full = {"lokr_w1", "lokr_w2"} <= set(lycoris_parts(layer))
        tensors[f"{head}.alpha"] = torch.tensor(float(layer.alpha["default"]))
        weight = layer.get_delta_weight("default").detach()
        # LyCORIS leaves the scale out where both factors are full matrices; PEFT does not.
        deltas[f"unet.{name}"] = (weight / layer.scaling["default"] if both_full else weight).double()
    safetensors.torch.save_file(tensors, file)
    return deltas


def lycoris_parts(layer: Any) -> list[str]:
    found = [n for n in vars(layer)["_modules"] if lycoris.PART.fullmatch(n)]
    return [n for n in found if "default" in getattr(layer, n)]


@pytest.mark.parametrize(
    ("method", "tucker", "options"),
    [
        ("loha", False, {"r": 2, "alpha": 3}),
        ("loha", True, {"r": 2, "alpha": 3}),
        ("loha", False, {"r": 5, "alpha": 1}),
        ("lokr", False, {"r": 1, "alpha": 3}),
        ("lokr", True, {"r": 1, "alpha": 2}),
        ("lokr", False, {"r": 1, "alpha": 2, "decompose_both": True, "decompose_factor": 4}),
        ("lokr", True, {"r": 1, "alpha": 2, "decompose_both": True, "decompose_factor": 4}),
        ("lokr", False, {"r": 64, "alpha": 2}),
    ],
)
def test_delta_w_is_that_of_peft(method: str, tucker: bool, options: dict[str, Any], tmp_path: Path) -> None:
    deltas = written(peft_model(method, tucker, **options), tmp_path / "x.safetensors")
    report: list[io.Converted] = []
    lora = io.load(tmp_path / "x.safetensors", report=report, base="sd1")
    assert set(lora.names) == set(deltas) == {c.name for c in report}
    layers = dict(unet().named_modules())
    for c in report:
        name, weight = c.name, layers[c.name.removeprefix("unet.")].weight
        assert relative(double(lora[name]), deltas[name].reshape(lora.spec[name].shape)) <= 1e-6, name
        assert lora.spec[name].kernel == tuple(weight.shape[2:]), name
        assert (c.method, c.error) == ({"loha": "LoHa", "lokr": "LoKr"}[method], 0.0)
        assert c.rank == c.exact == lora[name].rank <= min(lora.spec[name].shape)
        if method == "loha":
            assert c.exact == min(options["r"] ** 2, *lora.spec[name].shape)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_truncation_is_the_best_and_its_error_is_exact(method: str, rank: int, tmp_path: Path) -> None:
    deltas = written(peft_model(method, False, r=2, alpha=3), tmp_path / "x.safetensors")
    report: list[io.Converted] = []
    lora = io.load(tmp_path / "x.safetensors", rank=rank, report=report)
    assert any(c.error > 0.01 for c in report)
    for c in report:
        delta = deltas[c.name].flatten(1)
        S = torch.linalg.svdvals(delta)
        best = float(S[rank:].norm() / S.norm())
        assert c.rank == min(rank, c.exact) == lora[c.name].rank
        assert c.error == pytest.approx(best, rel=1e-4, abs=1e-7)
        assert relative(double(lora[c.name]), delta) == pytest.approx(best, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("method", ["loha", "lokr"])
@pytest.mark.parametrize("format", io.FORMATS)
def test_the_converted_file_acts_like_the_original(method: str, format: str, tmp_path: Path) -> None:
    """PEFT runs the LoHa or LoKr itself; diffusers, or PEFT, runs the LoRA that we made of it."""
    from peft import PeftModel

    model = peft_model(method, True, r=2, alpha=3)
    written(model, tmp_path / "x.safetensors")
    if method == "lokr":
        rescale_full(model)
    lora = io.load(tmp_path / "x.safetensors", base="sd1")
    out = io.save(lora, tmp_path / ("out" if format == "peft" else "out.safetensors"), format)
    wanted, plain = models.output("unet", model), models.output("unet", unet())
    if format == "peft":
        found = models.output("unet", PeftModel.from_pretrained(unet(), out))
    else:
        pipe = pipeline()
        pipe.load_lora_weights(str(out), adapter_name="x")
        found = models.output("unet", pipe.unet)
    assert relative(plain, wanted) > 1e-2
    assert relative(found, wanted) <= 1e-4


def rescale_full(model: Any) -> None:
    """PEFT's layers with two full factors without the scale that LyCORIS does not give them."""
    for layer in model.modules():
        if hasattr(layer, "get_delta_weight") and {"lokr_w1", "lokr_w2"} <= set(lycoris_parts(layer)):
            layer.scaling["default"] = 1.0


def save(tmp_path: Path, head: str, **parts: Tensor) -> Path:
    file = tmp_path / "x.safetensors"
    safetensors.torch.save_file({f"{head}.{p}": t.contiguous() for p, t in parts.items()}, file)
    return file


def loha(r1: int = 2, r2: int = 3, out: int = 9, in_: int = 8) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    shapes = {"hada_w1_a": (out, r1), "hada_w1_b": (r1, in_), "hada_w2_a": (out, r2), "hada_w2_b": (r2, in_)}
    return {p: torch.randn(*s, generator=g) for p, s in shapes.items()}


def hadamard(p: dict[str, Tensor]) -> Tensor:
    p = {k: t.double() for k, t in p.items()}
    return (p["hada_w1_a"] @ p["hada_w1_b"]) * (p["hada_w2_a"] @ p["hada_w2_b"])


def test_two_ranks_and_no_alpha(tmp_path: Path) -> None:
    parts = loha()
    lora = io.load(save(tmp_path, LINEAR, **parts))
    assert lora.ranks == {NAME: 6} and lora[NAME].scale == 1
    assert relative(double(lora[NAME]), hadamard(parts)) <= 1e-6


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
def test_half_precision_loses_nothing_more(half: torch.dtype, tmp_path: Path) -> None:
    """A product of two half-precision numbers is exact in float32."""
    parts = {k: t.to(half) for k, t in loha().items()}
    lora = io.load(save(tmp_path, LINEAR, **parts, alpha=torch.tensor(1.0)))
    assert lora.dtype == torch.float32
    assert relative(double(lora[NAME]), hadamard(parts) / 2) <= 1e-14


def test_a_rank_above_the_matrix_is_brought_down_to_it(tmp_path: Path) -> None:
    parts = loha(6, 6, 9, 8)
    lora = io.load(save(tmp_path, LINEAR, **parts))
    assert lora.ranks == {NAME: 8}
    assert relative(double(lora[NAME]), hadamard(parts)) <= 1e-6


def test_a_full_factor_of_low_rank_gives_a_lora_of_low_rank(tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    a, b, c, d = (torch.randn(*n, generator=g, dtype=torch.float64) for n in ((4, 1), (1, 3), (5, 2), (2, 6)))
    w1, w2 = a @ b, c @ d
    lora = io.load(save(tmp_path, LINEAR, lokr_w1=w1, lokr_w2=w2, alpha=torch.tensor(7.0)))
    assert lora.ranks == {NAME: 2} and lora[NAME].scale == 1
    assert relative(double(lora[NAME]), torch.kron(w1, w2)) <= 1e-9


def test_zero_factors(tmp_path: Path) -> None:
    """As training starts: the second half of each product is zero."""
    parts = loha() | {"hada_w2_a": torch.zeros(9, 3)}
    for rank in (None, 2):
        assert not io.load(save(tmp_path, LINEAR, **parts), rank=rank)[NAME].delta().any()
        zero = save(tmp_path, LINEAR, lokr_w1=torch.zeros(2, 2), lokr_w2=torch.randn(3, 3))
        assert not io.load(zero, rank=rank)[NAME].delta().any()


def test_dotted_names_and_fused_modules(tmp_path: Path) -> None:
    """As ai-toolkit writes a LoKr of Flux: taken apart like any fused module."""
    w1, a, b = torch.randn(4, 4), torch.randn(6, 2), torch.randn(2, 2)
    at = "diffusion_model.double_blocks.1.img_attn.qkv"
    file = save(tmp_path, at, lokr_w1=w1, lokr_w2_a=a, lokr_w2_b=b, alpha=torch.tensor(1.0))
    assert io.detect(file) == "diffusers"
    lora = io.load(file)
    names = [f"transformer.transformer_blocks.1.attn.to_{p}" for p in "qkv"]
    assert set(lora.names) == set(names)
    wanted = 0.5 * torch.kron(w1.double(), a.double() @ b.double())
    assert relative(torch.cat([double(lora[n]) for n in names]), wanted) <= 1e-6


def test_a_lora_beside_and_a_magnitude(tmp_path: Path) -> None:
    other = "lora_unet_conv_in"
    tensors = {f"{LINEAR}.{p}": t for p, t in loha().items()} | {f"{LINEAR}.dora_scale": torch.rand(9, 1)}
    tensors |= {
        f"{other}.lora_up.weight": torch.ones(2, 1, 1, 1),
        f"{other}.lora_down.weight": torch.ones(1, 2, 3, 3),
    }
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    lora = io.load(tmp_path / "x.safetensors")
    assert set(lora.names) == {NAME, "unet.conv_in"}
    assert lora.extras[f"{NAME}.lora_magnitude_vector"].shape == (9,)


BAD = {
    "a part is missing": ({"hada_w2_b": None}, "without its hada_w2_b"),
    "ranks differ": ({"hada_w1_b": torch.ones(3, 8)}, "found shape \\(3, 8\\)"),
    "shapes differ": ({"hada_w2_b": torch.ones(3, 7)}, "wanted halves of one shape, \\(9, 8\\)"),
    "integers": ({"hada_w2_b": torch.ones(3, 8, dtype=torch.int8)}, "int8"),
    "another part": ({"hada_w3_b": torch.ones(3, 8)}, "another LyCORIS method"),
    "a LoRA of the same module": (
        {"lora_up.weight": torch.ones(9, 1), "lora_down.weight": torch.ones(1, 8)},
        "a second method for module",
    ),
    "LoKr of a vector": (
        {p: None for p in loha()} | {"lokr_w1": torch.ones(2), "lokr_w2": torch.ones(2, 2)},
        "wanted a matrix",
    ),
    "LoKr of one factor": (
        {p: None for p in loha()} | {"lokr_w1": torch.ones(2, 2)},
        "without its lokr_w2_a",
    ),
    "a Tucker core that does not fit": ({"hada_t1": torch.ones(2, 3, 3, 3)}, "hada_t1"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_parts(name: str, tmp_path: Path) -> None:
    changes, words = BAD[name]
    parts = {k: t for k, t in (loha() | changes).items() if t is not None}
    with pytest.raises(FormatError, match=words):
        io.load(save(tmp_path, LINEAR, **parts))


def test_what_would_not_fit_in_memory_is_refused_before_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = save(tmp_path, LINEAR, lokr_w1=torch.eye(4), lokr_w2=torch.randn(5, 5))
    monkeypatch.setattr(lycoris, "MOST", 2 * 20 * 20)
    assert io.load(file).ranks == {NAME: 20}
    monkeypatch.setattr(lycoris, "MOST", 2 * 20 * 20 - 1)
    with pytest.raises(FormatError, match="exact rank up to 20.*--rank 64"):
        io.load(file)
    assert io.load(file, rank=3).ranks == {NAME: 3}


def test_kernels_that_the_file_does_not_tell(tmp_path: Path) -> None:
    """LyCORIS flattens them: names tell, and the text encoder's width whether projections are convolutions."""
    heads = {
        "lora_unet_conv_in": (4 * 9, (3, 3)),
        "lora_unet_mid_block_attentions_0_proj_in": (8, (1, 1)),
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_k": (768, ()),
    }
    tensors = {f"{h}.{p}": t for h, (n, _) in heads.items() for p, t in loha(1, 1, 8, n).items()}
    safetensors.torch.save_file(tensors, tmp_path / "x.safetensors")
    for base, projection in ((None, (1, 1)), ("sd1", (1, 1)), ("sd2", ()), ("sdxl", ())):
        spec = io.load(tmp_path / "x.safetensors", base=base).spec
        assert spec["unet.conv_in"].kernel == (3, 3)
        assert spec["unet.mid_block.attentions.0.proj_in"].kernel == projection


PARTS = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w1_a", "lokr_w1_b",
         "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2", "alpha", "dora_scale")  # fmt: skip


@given(
    shapes=st.dictionaries(
        st.sampled_from(PARTS), st.lists(st.integers(1, 4), max_size=4), min_size=1, max_size=6
    ),
    fill=st.sampled_from([1.0, 0.0, 1e30]),
    rank=st.sampled_from([None, 1, 3]),
    head=st.sampled_from([LINEAR, "lora_unet_conv_in", "lora_unet_single_blocks_0_linear1"]),
)
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_parts_give_a_traceback(
    shapes: dict[str, list[int]], fill: float, rank: int | None, head: str, tmp_path: Path
) -> None:
    file = save(tmp_path, head, **{p: torch.full(tuple(s), fill) for p, s in shapes.items()})
    try:
        lora = io.load(file, rank=rank)
    except FormatError as error:
        assert "\n" not in str(error)
    else:
        assert all(torch.isfinite(f.B).all() and torch.isfinite(f.A).all() for f in lora.factors.values())
