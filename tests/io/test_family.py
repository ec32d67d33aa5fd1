"""Which base an adapter is for: every family, every spelling of its keys, and honesty where shapes do not tell."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable

import pytest
from adapters import random
from safetensors import safe_open

from lolgen.io.bases import LANGUAGE
from lolgen.io.family import detect
from lolgen.io.names import sd1_modules
from lolgen.io.raw import modules_of
from lolgen.lora import ModuleSpec, Spec
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.zoo.zoo import Zoo

Shapes = dict[str, tuple[int, ...]]
Sizes = dict[str, tuple[int, int]]


def peft(sizes: Sizes, r: int = 4) -> Shapes:
    return _pairs(sizes, "base_model.model.{}.lora_A.weight", "base_model.model.{}.lora_B.weight", r)


def diffusers(sizes: Sizes, r: int = 4) -> Shapes:
    return _pairs(sizes, "{}.lora_A.weight", "{}.lora_B.weight", r)


def kohya(sizes: Sizes, r: int = 4, prefix: str = "lora_unet_") -> Shapes:
    flat = {prefix + n.removeprefix("unet.").replace(".", "_"): s for n, s in sizes.items()}
    return _pairs(flat, "{}.lora_down.weight", "{}.lora_up.weight", r) | {f"{n}.alpha": () for n in flat}


def _pairs(sizes: Sizes, down: str, up: str, r: int) -> Shapes:
    found: Shapes = {}
    for name, (out, in_) in sizes.items():
        found[down.format(name)], found[up.format(name)] = (r, in_), (out, r)
    return found


def loha(sizes: Sizes, r: int = 4) -> Shapes:
    found: Shapes = {}
    for name, (out, in_) in sizes.items():
        for i in "12":
            found[f"{name}.hada_w{i}_a"], found[f"{name}.hada_w{i}_b"] = (out, r), (r, in_)
        found[f"{name}.alpha"] = ()
    return found


def lokr(sizes: Sizes, factor: int = 8) -> Shapes:
    found: Shapes = {}
    for name, (out, in_) in sizes.items():
        found[f"{name}.lokr_w1"] = (factor, factor)
        found[f"{name}.lokr_w2_a"], found[f"{name}.lokr_w2_b"] = (out // factor, 4), (4, in_ // factor)
    return found


def full(sizes: Sizes) -> Shapes:
    return {f"{n}.weight": s for n, s in sizes.items()}


def unet(
    width: int, block: str = "unet.down_blocks.1.attentions.0", depth: int = 1, inner: int = 640
) -> Sizes:
    return {
        f"{block}.transformer_blocks.{i}.{a}.{p}": (inner, inner if a == "attn1" else width)
        for i in range(depth)
        for a in ("attn1", "attn2")
        for p in ("to_k", "to_v")
    }


def llm(hidden: int, query: int, kv: int, mlp: int, layers: int, at: str = "model.layers") -> Sizes:
    found = {}
    for i in range(layers):
        found[f"{at}.{i}.self_attn.q_proj"] = query, hidden
        found[f"{at}.{i}.self_attn.k_proj"] = found[f"{at}.{i}.self_attn.v_proj"] = kv, hidden
        found[f"{at}.{i}.self_attn.o_proj"] = hidden, query
        found[f"{at}.{i}.mlp.up_proj"] = found[f"{at}.{i}.mlp.gate_proj"] = mlp, hidden
        found[f"{at}.{i}.mlp.down_proj"] = hidden, mlp
    return found


def mmdit(width: int, double: int, single: int) -> Sizes:
    found = {}
    for i in range(double):
        for p in ("to_q", "add_k_proj"):
            found[f"transformer.transformer_blocks.{i}.attn.{p}"] = width, width
    for i in range(single):
        found[f"transformer.single_transformer_blocks.{i}.attn.to_q"] = width, width
    return found


def original_flux(double: int, single: int) -> Sizes:
    found = {f"double_blocks.{i}.img_attn.qkv": (9216, 3072) for i in range(double)}
    return found | {f"single_blocks.{i}.linear1": (21504, 3072) for i in range(single)}


SDXL_ORIGINAL = unet(2048, "input_blocks.4.1") | unet(2048, "middle_block.1", 10, 1280)
GPT2 = {f"transformer.h.{i}.attn.c_attn": (2304, 768) for i in range(12)}
SD3_ORIGINAL = {f"joint_blocks.{i}.x_block.attn.qkv": (4608, 1536) for i in range(24)}


ONE: dict[str, tuple[str, Shapes]] = {
    "sd1 diffusers": ("sd1", diffusers(unet(768))),
    "sd1 kohya": ("sd1", kohya(unet(768))),
    "sd1 peft": ("sd1", peft({n.removeprefix("unet."): s for n, s in unet(768).items()})),
    "sd1 loha": ("sd1", loha({f"lora_unet_{n[5:].replace('.', '_')}": s for n, s in unet(768).items()})),
    "sd1 lokr": ("sd1", lokr({f"lycoris_{n[5:].replace('.', '_')}": s for n, s in unet(768).items()})),
    "sd1 full": ("sd1", full(unet(768, "model.diffusion_model.input_blocks.4.1"))),
    "sd2 kohya": ("sd2", kohya(unet(1024))),
    "sdxl kohya": ("sdxl", kohya(SDXL_ORIGINAL)),
    "sdxl diffusers": ("sdxl", diffusers(unet(2048, depth=2))),
    "sdxl attn1 only": (
        "sdxl",
        kohya({n: s for n, s in SDXL_ORIGINAL.items() if "attn1" in n}),
    ),
    "sdxl peft": ("sdxl", peft({n.removeprefix("unet."): s for n, s in unet(2048).items()})),
    "sd3 diffusers": ("sd3", diffusers(mmdit(1536, 24, 0))),
    "sd3 large": ("sd3", diffusers(mmdit(2432, 38, 0))),
    "sd3 kohya": ("sd3", kohya(SD3_ORIGINAL)),
    "flux diffusers": ("flux", diffusers(mmdit(3072, 19, 38))),
    "flux kohya": ("flux", kohya(original_flux(19, 38))),
    "flux comfy": ("flux", diffusers({f"diffusion_model.{n}": s for n, s in original_flux(19, 38).items()})),
    "hunyuan": ("hunyuan-video", diffusers(mmdit(3072, 20, 40))),
    "qwen image": ("qwen-image", diffusers(mmdit(3072, 60, 0))),
    "gpt2": ("gpt2", peft(GPT2)),
    "qwen": ("qwen", peft(llm(3584, 3584, 512, 18944, 28))),
    "gemma": ("gemma", peft(llm(2304, 2048, 1024, 9216, 26))),
    "llama": ("llama", peft(llm(8192, 8192, 1024, 28672, 80))),
    "llama full": ("llama", full(llm(2048, 2048, 512, 8192, 16))),
    "mistral": ("mistral", peft(llm(5120, 4096, 1024, 32768, 40))),
    "multimodal": ("gemma", peft(llm(2560, 2048, 1024, 10240, 34, "model.language_model.layers"))),
}


@pytest.mark.parametrize("name, shapes", ONE.values(), ids=ONE)
def test_shapes_alone_decide(name: str, shapes: Shapes) -> None:
    found = detect(shapes)
    assert (found.name, found.certain, found.candidates) == (name, True, (name,))
    assert found.evidence and all("\n" not in s for s in found.evidence)
    shown = " ".join(found.evidence)
    assert any(k.rpartition(".lora")[0] in shown or k in shown for k in shapes)


def test_a_published_table_is_found_row_by_row() -> None:
    """Every row is among the families of its own shapes, and no family appears that no row of these sizes has."""
    for row in LANGUAGE:
        sizes = llm(row.hidden, row.query, row.kv, row.mlp, row.layers)
        if row.experts:
            continue
        found = detect(peft(sizes))
        twins = {
            r.family for r in LANGUAGE
            if (r.hidden, r.query, r.kv, r.mlp) == (row.hidden, row.query, row.kv, row.mlp)
        }  # fmt: skip
        assert row.family in found.candidates and set(found.candidates) <= twins, row
        assert found.certain == (len(twins) == 1), row


def test_same_shapes_stay_open_until_something_tells() -> None:
    shapes = peft(llm(4096, 4096, 1024, 14336, 32))
    found = detect(shapes)
    assert found.name == "llama or mistral" and not found.certain
    assert found.label == "Llama or Mistral"
    assert "Llama 3 8B, Mistral 7B" in " ".join(found.evidence) and "same shapes" in " ".join(found.evidence)
    vocab = {
        "base_model.model.lm_head.lora_A.weight": (4, 4096),
        "base_model.model.lm_head.lora_B.weight": (128256, 4),
    }
    assert detect(shapes | vocab).name == "llama" and detect(shapes | vocab).certain
    claimed = detect(shapes, {"base_model_name_or_path": "mistralai/Mistral-7B-v0.1"})
    assert claimed.name == "mistral" and not claimed.certain
    assert any(s.startswith("the file claims base_model_name_or_path") for s in claimed.evidence)
    config = {"adapter_config": json.dumps({"base_model_name_or_path": "meta-llama/Meta-Llama-3-8B"})}
    assert detect(shapes, config).name == "llama"


@pytest.mark.parametrize(
    "claim",
    [
        {"ss_base_model_version": "sd_v1"},
        {"modelspec.architecture": "stable-diffusion-v1/lora"},
        {"lora_adapter_metadata": json.dumps({"unet.base_model_name_or_path": "x/stable-diffusion-v1-5"})},
    ],
)
def test_a_claim_never_overrules_shapes(claim: dict[str, str]) -> None:
    found = detect(kohya(SDXL_ORIGINAL), claim)
    assert found.name == "sdxl" and found.certain
    assert "contradict" in found.evidence[-1]
    agreeing = detect(kohya(unet(768)), claim)
    assert agreeing.name == "sd1" and "contradict" not in agreeing.evidence[-1]


@pytest.mark.parametrize("text", ["{", "[1]", "[" * 100_000, '{"base_model_name_or_path": 7}', "null"])
def test_a_claim_may_be_anything(text: str) -> None:
    assert detect(kohya(unet(768)), {"adapter_config": text, "lora_adapter_metadata": text}).name == "sd1"


def test_a_strangers_key_is_shown_on_one_line() -> None:
    key = "unet.down_blocks.1.x\n\x1b[31m" + "y" * 500 + ".attn2.to_k.lora_A.weight"
    for found in (detect({key: (4, 768)}), detect({"\n\x1b[31m" * 200: (3,)})):
        assert all(s.isprintable() and len(s) < 300 for s in found.evidence)


def test_a_part_of_the_model_leaves_what_it_leaves() -> None:
    te = {f"text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj": (768, 768) for i in range(12)}
    assert detect(diffusers(te)).candidates == ("sd1", "sdxl", "sd3", "flux")
    assert detect(kohya({n[13:]: s for n, s in te.items()}, prefix="lora_te_")).name == "sd1"
    assert "sd1" not in detect(kohya({n[13:]: s for n, s in te.items()}, prefix="lora_te1_")).candidates
    attn1 = {n: s for n, s in unet(768).items() if "attn1" in n}
    assert detect(diffusers(attn1)).candidates == ("sd1", "sd2", "sdxl")
    outer = {n.replace("down_blocks.1", "down_blocks.0"): (320, 320) for n in attn1}
    assert detect(diffusers(outer)).candidates == ("sd1", "sd2")
    assert detect(diffusers(mmdit(3072, 4, 0))).candidates == ("flux", "hunyuan-video", "qwen-image")
    flux = {"double_blocks.3.img_attn.qkv": (9216, 3072), "double_blocks.3.img_mlp.0": (12288, 3072)}
    assert detect(kohya(flux)).name == "flux"


@pytest.mark.parametrize(
    "shapes",
    [
        {},
        {"weight": (3,)},
        {"a.lora_A.weight": (4, 3), "a.lora_B.weight": (5, 4)},
        diffusers(unet(777)),
        diffusers(unet(768) | unet(1024, "unet.up_blocks.1.attentions.0")),
        peft(llm(4096, 4096, 1024, 999, 32)),
        peft(llm(4096, 4096, 1024, 14336, 300)),
        diffusers(mmdit(3000, 19, 38)),
        {"transformer.transformer_blocks.0.attn1.to_q.lora_A.weight": (4, 1920)},
    ],
    ids=["none", "no path", "no base", "unet width", "two widths", "mlp", "layers", "mmdit width", "video"],
)
def test_unknown_stays_unknown(shapes: Shapes) -> None:
    found = detect(shapes)
    assert found.name == "unknown" and not found.certain and not found.candidates
    claimed = detect(shapes, {"ss_base_model_version": "sdxl_base_v1-0"})
    assert claimed.name == "unknown" and any("claims" in s for s in claimed.evidence)


def test_the_embedded_base() -> None:
    zoo = Zoo.open(zoos_dir() / "faces")
    lora = random(zoo.spec)
    shapes = {f"{n}.lora_A.weight": tuple(f.A.shape) for n, f in lora.factors.items()}
    assert detect(shapes).name == "tiny-sd" and detect(shapes).certain
    with safe_open(checkpoints_dir() / "tiny-sd" / "unet" / "diffusion_pytorch_model.safetensors", "pt") as f:
        model = {f"unet.{k}": tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118
    assert detect(model).name == "tiny-sd"


def test_sd1_from_its_own_module_table() -> None:
    sizes = {n: (768 if "attn2.to_k" in n else 320, 768) for n in sd1_modules()}
    assert detect(diffusers(sizes)).name == "sd1"


def _methods(shapes: Shapes) -> set[str]:
    return {m.method for m in modules_of(shapes).values()}


@pytest.mark.parametrize(
    "make, method",
    [(peft, "lora"), (diffusers, "lora"), (kohya, "lora"), (loha, "loha"), (lokr, "lokr"), (full, "full")],
)
def test_every_spelling_gives_the_sizes(make: Callable[[Sizes], Shapes], method: str) -> None:
    sizes = {"unet.down_blocks.1.attentions.0.proj_in": (640, 320), "unet.conv": (64, 1280)}
    found = modules_of(make(sizes)).values()
    assert [(m.size, m.method) for m in found] == [(s, method) for s in sizes.values()]


def test_what_is_no_lora_is_named() -> None:
    keys: Iterable[tuple[str, str]] = [
        ("a.oft_blocks", "oft"), ("base_model.model.a.oft_R.weight", "oft"), ("a.boft_R", "boft"),
        ("a.b1.weight", "glora"), ("base_model.model.a.ia3_l", "ia3"), ("a.on_input", "ia3"), ("a.diff", "diff"),
        ("a.diff_b", "diff"), ("a.w_norm", "norm"), ("base_model.model.a.lora_E", "adalora"),
        ("base_model.model.a.vera_lambda_b", "vera"), ("base_model.vera_A", "vera"),
        ("base_model.model.a.fourierft_spectrum", "fourierft"), ("prompt_embeddings", "prompt"),
        ("a.hada_t1", "loha"), ("a.lokr_t2", "lokr"), ("a.weight", "full"), ("nothing", "unknown"),
    ]  # fmt: skip
    for key, method in keys:
        assert _methods({key: (3, 3)}) == {method}, key


def test_tucker_cores() -> None:
    hada = {"a.hada_w1_a": (4, 64), "a.hada_w1_b": (4, 32), "a.hada_t1": (4, 4, 3, 3)}
    assert modules_of(hada)["a"].size == (64, 32)
    kron = {"a.lokr_w1": (8, 8), "a.lokr_w2_a": (4, 40), "a.lokr_w2_b": (4, 20), "a.lokr_t2": (4, 4, 3, 3)}
    assert modules_of(kron)["a"].size == (320, 160)


def test_a_spec_of_convolutions() -> None:
    spec = Spec((ModuleSpec("unet.conv_in", 320, 4, (3, 3), "conv"),))
    found = detect({f"{m.name}.lora_A.weight": (4, m.in_, *m.kernel) for m in spec})
    assert found.name == "unknown"
