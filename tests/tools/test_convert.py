"""`lolgen convert`: every family through every pair of formats, and what it says of each."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from lolgen import io
from lolgen.cli import main
from lolgen.commands import convert as command
from lolgen.errors import FormatError
from lolgen.io import names, parts
from lolgen.io.families import LAYOUTS
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec
from lolgen.testing import random_lora
from lolgen.tools.convert import DTYPES, Report, convert
from lolgen.tools.roundtrip import error

W = 8
Q = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"
NAME = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"


def unet_spec(table: tuple[str, ...], every: int) -> Spec:
    """Some modules of a table, small, 3x3 where they are convolutions."""
    found = []
    for name in sorted(table, key=names.natural)[::every]:
        conv = name.rpartition(".")[2] in ("conv", "conv1", "conv2", "conv_in", "conv_out")
        found.append(ModuleSpec(name, 6, 5, (3, 3) if conv else (), "conv" if conv else "linear"))
    return Spec(tuple(found))


def transformer_spec(family: str, blocks: int = 2) -> Spec:
    """Every module of a Flux or SD3 in miniature, and some of its text encoders."""
    layout, found = LAYOUTS[family], {}
    for row in layout.blocks:
        originals = [f"{row.original}.{i}.{path}" for i in range(blocks) for path, _ in row.rules]
        for original in originals:
            for part in layout.parts(original):
                out = {"norm": 6, "norm1": 6, "norm1_context": 6, "proj_mlp": 4, "ff": 4}
                size = next((n for key, n in out.items() if key in part.split(".")), 1)
                found[part] = size * W
    found |= {layout.parts(path)[0]: 2 * W for path, _ in layout.outside}
    modules = [ModuleSpec(f"transformer.{n}", out, W) for n, out in found.items()]
    modules += [ModuleSpec(n, 6, 4) for n in names.clip_modules(2)]
    if family == "flux":
        modules.append(ModuleSpec("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", 6, 4))
    return Spec(tuple(sorted(modules, key=lambda m: names.natural(m.name))))


def language_spec(family: str) -> Spec:
    if family == "gpt2":
        at, inner = "transformer.h.{}.", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")
    else:
        at, inner = "model.layers.{}.", tuple(f"self_attn.{p}_proj" for p in "qkvo") + ("mlp.up_proj",)
    linear = [ModuleSpec(at.format(i) + p, 6, 5) for i in range(2) for p in inner]
    embedding = ModuleSpec(
        "transformer.wte" if family == "gpt2" else "model.embed_tokens", 5, 30, (), "embedding"
    )
    return Spec(tuple(sorted([*linear, embedding], key=lambda m: names.natural(m.name))))


SPECS = {
    "sd1": unet_spec(names.sd1_modules(), 9),
    "sd2": unet_spec((*names.unet_modules(), *names.clip_modules(23)), 9),
    "sdxl": unet_spec(names.sdxl_modules(), 29),
    "sd3": transformer_spec("sd3"),
    "flux": transformer_spec("flux"),
    **{f: language_spec(f) for f in ("llama", "qwen", "mistral", "gemma", "gpt2")},
}
PAIRS = [
    (family, *pair)
    for family in SPECS
    for pair in itertools.product(
        io.FORMATS if family in ("sd1", "sd2", "sdxl", "sd3", "flux") else ("peft",), repeat=2
    )
]


def lora_of(family: str, seed: int = 0) -> LoRA:
    """Mixed ranks from 1 to 4 (no more than a module has), and a scale."""
    spec = SPECS[family]
    g = torch.Generator().manual_seed(seed)
    ranks = [int(torch.randint(1, 5, (), generator=g)) for _ in spec]
    return random_lora(spec, ranks, scale=-0.37, generator=g)


def put(lora: LoRA, folder: Path, name: str, format: str, base: str) -> Path:
    at = folder / (name if format == "peft" else f"{name}.safetensors")
    several = len({names.component(n) for n in lora.names}) > 1
    return (
        parts.save(lora, at, base=base)
        if format == "peft" and several
        else io.save(lora, at, format, base=base)
    )


@pytest.mark.parametrize(("family", "first", "second"), PAIRS)
def test_every_family_through_every_pair_of_formats(
    family: str, first: str, second: str, tmp_path: Path
) -> None:
    lora = lora_of(family)
    one = put(lora, tmp_path, "one", first, family)
    report = convert(
        one, tmp_path / ("two" + ("" if second == "peft" else ".safetensors")), second, base=family
    )
    assert (report.format, report.to, report.family) == (first, second, family)
    assert report.modules == len(lora) and not report.dropped
    assert report.error.relative <= 1e-6 and report.error.worst_relative <= 1e-6
    # Against what we started from, by name: not the converter's own word.
    again = io.load(report.written, base=family)
    assert set(again.names) == set(lora.names)
    for name in lora.names:
        wanted = lora[name].scale * lora[name].B.double() @ lora[name].A.double()
        found = again[name].scale * again[name].B.double() @ again[name].A.double()
        assert float((found - wanted).norm() / wanted.norm()) <= 1e-6, name
        assert again.spec[name] == lora.spec[name]
        assert again[name].rank == lora[name].rank
    fused = [f for f in report.fused if len(f.parts) > 1]
    assert bool(fused) == (second == "kohya" and family in ("flux", "sd3"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_precision(dtype: str, tmp_path: Path) -> None:
    file = put(lora_of("sdxl"), tmp_path, "one", "diffusers", "sdxl")
    report = convert(file, tmp_path / "two.safetensors", "kohya", dtype=dtype)
    assert report.dtype == dtype
    eps = torch.finfo(DTYPES[dtype]).eps
    assert report.error.worst_relative <= 2 * max(eps, 1e-7)
    if dtype.endswith("16"):
        assert report.error.relative > eps / 50


def test_the_error_that_is_printed_is_that_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The twin: a writer that spoils one module is found out."""
    from lolgen.tools import convert as module

    def spoiled(lora: LoRA, *args: Any, **kwargs: Any) -> Path:
        f = lora[NAME]
        return real(lora.replace(lora.factors | {NAME: Factors(f.B * 1.001, f.A, f.scale)}), *args, **kwargs)

    real = io.save
    monkeypatch.setattr(module.io, "save", spoiled)
    lora = random_lora(Spec((ModuleSpec(NAME, 4, 4), ModuleSpec("unet.conv_out", 4, 4))), 2)
    file = real(lora, tmp_path / "one.safetensors", "diffusers")
    report = convert(file, tmp_path / "two.safetensors", "kohya")
    assert report.error.worst == NAME
    assert report.error.worst_relative == pytest.approx(1e-3, rel=1e-3)


@pytest.mark.parametrize("to", ["kohya", "diffusers"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_language_models_have_no_other_format(family: str, to: str, tmp_path: Path, capsys: Any) -> None:
    folder = put(lora_of(family), tmp_path, "one", "peft", family)
    assert main(["convert", str(folder), "--to", to, "-o", str(tmp_path / "x.safetensors"), "--drop"]) == 2
    text = capsys.readouterr().err
    assert text.startswith("lolgen: ") and text.count("\n") == 1 and "convert --to peft" in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one"]


def write(file: Path, tensors: dict[str, torch.Tensor], header: dict[str, str] | None = None) -> Path:
    save_file(tensors, file, header)
    return file


def pair(at: str, out: int = 4, in_: int = 3) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(len(at))
    down, up = torch.randn(2, in_, generator=g), torch.randn(out, 2, generator=g)
    return {f"{at}.lora_down.weight": down, f"{at}.lora_up.weight": up}


DROPS: dict[str, tuple[dict[str, torch.Tensor], str, str]] = {
    "a name that no table explains": (
        pair("lora_unet_own_layer"),
        "lora_unet_own_layer",
        "no module table explains",
    ),
    "a tensor of another kind": (
        {"lora_unet_conv_in.diff_b": torch.ones(3)},
        "lora_unet_conv_in.diff_b",
        "no part of a LoRA",
    ),
    "a magnitude per input": (
        {f"{Q}.dora_scale": torch.ones(1, 3)},
        f"{Q}.dora_scale",
        "only kohya files have",
    ),
}


@pytest.mark.parametrize("to", ["peft", "diffusers"])
@pytest.mark.parametrize("what", DROPS)
def test_nothing_is_dropped_unasked(what: str, to: str, tmp_path: Path) -> None:
    more, key, why = DROPS[what]
    file = write(tmp_path / "x.safetensors", pair(Q) | more)
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    with pytest.raises(FormatError, match=f"{key}.*{why}.*--drop"):
        convert(file, out, to)
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]
    report = convert(file, out, to, drop=True)
    assert list(report.dropped) == [key] and why in report.dropped[key]
    assert report.modules == 1 and report.error.relative <= 1e-6
    # The same format has a place for it.
    same = convert(file, tmp_path / "same.safetensors", "kohya")
    assert not same.dropped and any(k.startswith(key) for k in load_file(same.written))


def test_biases_embeddings_and_full_tensors(tmp_path: Path) -> None:
    lora = random_lora(Spec((ModuleSpec("unet.embed", 4, 9, (), "embedding"), ModuleSpec(NAME, 4, 3))), 2)
    lora.extras = {
        f"{NAME}.lora_B.bias": torch.ones(4),
        f"{NAME}.lora_magnitude_vector": torch.ones(4),
        "base_model.model.conv_in.weight": torch.ones(2),
    }
    folder = io.save(lora, tmp_path / "in", "peft")
    report = convert(folder, tmp_path / "k.safetensors", "kohya", drop=True)
    assert set(report.dropped) == {"unet.embed", f"{NAME}.lora_B.bias", "base_model.model.conv_in.weight"}
    assert f"{Q}.dora_scale" in load_file(report.written)
    assert any("DoRA" in note for note in report.notes)
    report = convert(folder, tmp_path / "d.safetensors", "diffusers", drop=True)
    assert set(report.dropped) == {"base_model.model.conv_in.weight"}
    report = convert(folder, tmp_path / "p", "peft")
    assert not report.dropped and set(io.load(tmp_path / "p").extras) == set(lora.extras)


def test_a_zero_part_of_a_fused_module_is_said(tmp_path: Path) -> None:
    lora = lora_of("flux")
    name = "transformer.transformer_blocks.0.attn.to_k"
    lora[name].B.zero_()
    report = convert(put(lora, tmp_path, "one", "diffusers", "flux"), tmp_path / "two.safetensors", "kohya")
    assert report.modules == len(lora) - 1 and report.error.worst_relative <= 1e-6
    assert any(name in note and note.startswith("zero in a fused module") for note in report.notes)


def test_a_tensor_of_no_component(tmp_path: Path) -> None:
    lora = lora_of("sd1")
    lora.extras["x"] = torch.ones(2)
    file = io.save(lora, tmp_path / "one.safetensors", "diffusers")
    with pytest.raises(FormatError, match="key 'x'.*none of the components"):
        convert(file, tmp_path / "two", "peft")
    assert convert(file, tmp_path / "two", "peft", drop=True).dropped.keys() == {"x"}


def test_full_tensors_of_several_components_stay_apart(tmp_path: Path) -> None:
    key = "base_model.model.head.weight"
    for i, part in enumerate(("unet", "text_encoder")):
        one = random_lora(Spec((ModuleSpec(f"{part}.text_model.a" if i else NAME, 4, 3),)), 2)
        one.extras[key] = torch.full((2,), float(i))
        io.save(one, tmp_path / "in" / part, "peft", companion=False)
    report = convert(tmp_path / "in", tmp_path / "out", "peft")
    assert not report.dropped
    for i, part in enumerate(("unet", "text_encoder")):
        assert load_file(tmp_path / "out" / part / "adapter_model.safetensors")[key].tolist() == [i, i]


@pytest.mark.parametrize("rank", [1, 2, 50])
def test_truncation(rank: int, tmp_path: Path) -> None:
    lora = lora_of("sd1")
    file = put(lora, tmp_path, "one", "diffusers", "sd1")
    report = convert(file, tmp_path / "two.safetensors", "kohya", rank=rank)
    again = io.load(report.written)
    assert report.truncated is not None and report.error.relative <= 1e-6
    gone = kept = 0.0
    for name in lora.names:
        S = torch.linalg.svdvals(lora[name].scale * lora[name].B.double() @ lora[name].A.double())
        assert again[name].rank == min(rank, lora[name].rank)
        gone, kept = gone + float(S[rank:].square().sum()), kept + float(S.square().sum())
    assert report.truncated.relative == pytest.approx((gone / kept) ** 0.5, rel=1e-4, abs=1e-9)
    assert error(lora, again).relative == pytest.approx((gone / kept) ** 0.5, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("rank", [None, 2])
def test_a_loha_file(rank: int | None, tmp_path: Path) -> None:
    g = torch.Generator().manual_seed(0)
    shapes = {"hada_w1_a": (9, 2), "hada_w1_b": (2, 8), "hada_w2_a": (9, 2), "hada_w2_b": (2, 8)}
    tensors = {f"{Q}.{p}": torch.randn(*s, generator=g) for p, s in shapes.items()}
    file = write(tmp_path / "x.safetensors", tensors | pair("lora_unet_conv_out"))
    report = convert(file, tmp_path / "out", "peft", rank=rank)
    (found,) = report.lycoris
    assert (found.name, found.method, found.exact, found.rank) == (NAME, "LoHa", 4, rank or 4)
    exact = io.load(file)
    again = io.load(tmp_path / "out")
    assert report.error.relative <= 1e-6
    if rank is None:
        assert found.error == 0 and report.truncated is None
    else:
        assert report.truncated is not None and report.truncated.worst == NAME and found.error > 0.01
        assert error(exact, again).relative == pytest.approx(report.truncated.relative, rel=1e-4)


def test_the_command_for_people(tmp_path: Path, capsys: Any) -> None:
    file = put(lora_of("flux"), tmp_path, "one", "diffusers", "flux")
    assert (
        main(
            ["convert", str(file), "--to", "kohya", "-o", str(tmp_path / "two.safetensors"), "--base", "flux"]
        )
        == 0
    )
    text = capsys.readouterr().out
    assert f"two.safetensors: kohya, {len(SPECS['flux'])} modules of flux, ranks 1 to 4, float32" in text
    assert "delta W read back: relative error" in text and "worst" in text
    assert "fused: 6 modules" in text
    assert "note: stock diffusers (0.42) applies no kohya module outside the blocks" in text
    assert "header entries left behind: lora_adapter_metadata" in text


def test_the_command_lists_what_it_leaves_out(tmp_path: Path, capsys: Any) -> None:
    file = write(tmp_path / "x.safetensors", pair(Q) | pair("lora_unet_own_layer"))
    args = ["convert", str(file), "--to", "diffusers", "-o", str(tmp_path / "out")]
    assert main(args) == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1 and "lora_unet_own_layer" in text and "--drop" in text
    assert main([*args, "--drop"]) == 0
    assert (
        "left out: lora_unet_own_layer (a kohya name that no module table explains)"
        in capsys.readouterr().out
    )


def test_the_command_for_machines(tmp_path: Path, capsys: Any) -> None:
    file = write(tmp_path / "x.safetensors", pair(Q), {"ss_note": "kept"})
    assert main(["convert", str(file), "--to", "diffusers", "-o", str(tmp_path / "out"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["to"] == "diffusers" and found["modules"] == 1 and found["error"]["relative"] <= 1e-6
    assert found["written"] == str(tmp_path / "out" / "pytorch_lora_weights.safetensors")
    assert set(found) == set(Report.__dataclass_fields__)
    assert io.load(found["written"]).metadata["ss_note"] == "kept"


ERRORS: dict[str, tuple[list[str], str]] = {
    "no file": (["no.safetensors", "--to", "peft", "-o", "out"], "no such file"),
    "the same file": (["x.safetensors", "--to", "kohya", "-o", "x.safetensors"], "never written over"),
    "another family": (
        ["x.safetensors", "--to", "kohya", "-o", "y.safetensors", "--base", "flux"],
        "modules of flux",
    ),
    "a language model": (
        ["x.safetensors", "--to", "peft", "-o", "out", "--base", "llama"],
        "modules of llama",
    ),
    "rank 0": (["x.safetensors", "--to", "peft", "-o", "out", "--rank", "0"], "found rank 0"),
    "no folder": (["x.safetensors", "--to", "peft", "-o", "out.safetensors"], "choose a folder"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors_are_one_line(what: str, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "x.safetensors", pair(Q))
    args, words = ERRORS[what]
    assert main(["convert", *args]) == 2
    text = capsys.readouterr().err
    assert text.startswith("lolgen: ") and text.count("\n") == 1 and words in text
    assert [p.name for p in tmp_path.iterdir()] == ["x.safetensors"]


def test_what_is_in_the_folder_already_stays(tmp_path: Path) -> None:
    """A pipeline's own folder, say: its files are left. A PEFT folder of one model is not taken for a pile."""
    file = put(lora_of("sd1"), tmp_path, "one", "diffusers", "sd1")
    (tmp_path / "out" / "unet").mkdir(parents=True)
    (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").write_text("weights")
    (tmp_path / "out" / "README.md").write_text("mine")
    convert(file, tmp_path / "out", "peft")
    assert (tmp_path / "out" / "README.md").read_text() == "mine"
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["README.md", "text_encoder", "unet"]
    assert (tmp_path / "out" / "unet" / "diffusion_pytorch_model.safetensors").read_text() == "weights"
    assert set(io.load(tmp_path / "out").names) == set(SPECS["sd1"].names)
    (tmp_path / "out" / "adapter_config.json").write_text("{}")
    with pytest.raises(FormatError, match="a PEFT folder of one model"):
        convert(file, tmp_path / "out", "peft")


def test_the_command_offers_what_the_library_knows() -> None:
    assert (
        command.FAMILIES == io.FAMILIES and tuple(DTYPES) == command.DTYPES and command.FORMATS == io.FORMATS
    )
