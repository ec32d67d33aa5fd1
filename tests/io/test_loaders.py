"""Stock diffusers and PEFT load what is written, for every family: outputs against weights merged by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import models
import pytest
import torch
from adapters import assert_same

from lolgen import io
from lolgen.io import parts
from lolgen.lora import LoRA
from lolgen.tools.convert import convert

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*CLIPTextModel.*:FutureWarning"),
]


def reference(pipe: Any, lora: LoRA) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """(outputs with the LoRA merged by hand, outputs without it)."""
    plain = {part: models.output(part, m) for part, m in models.components(pipe).items()}
    return {
        part: models.output(part, models.merged(part, m, lora)) for part, m in models.components(pipe).items()
    }, plain


def diffusers_reads(name: str, format: str) -> bool:
    """Whether stock diffusers 0.42 applies an adapter of this module of a Flux in miniature.

    Of kohya files it takes the blocks alone (what it calls `x_embedder` and so on has no `transformer.` before it
    and finds no place), and it cuts `linear1` at the full model's width.
    """
    if name.endswith("text_projection"):
        return False  # in no format
    if format != "kohya" or not name.startswith("transformer."):
        return True
    fused = name.endswith((".to_q", ".to_k", ".to_v", ".proj_mlp"))
    return "transformer_blocks." in name and not ("single_transformer_blocks." in name and fused)


@pytest.mark.parametrize(
    ("family", "format", "ranks"),
    [
        *((family, "diffusers", "mixed") for family in ("sd1", "sdxl", "flux", "sd3")),
        # With one rank alphas are written, with several they are not: diffusers would lose them.
        *((family, "kohya", ranks) for family in ("sd1", "sdxl", "flux") for ranks in ("one", "mixed")),
    ],
)
def test_diffusers_acts_like_the_merged_weights(family: str, format: str, ranks: str, tmp_path: Path) -> None:
    pipe = models.PIPELINES[family]()
    spec = models.Spec(tuple(m for m in models.spec_of(pipe) if diffusers_reads(m.name, format)))
    lora = models.random_ranks(spec) if ranks == "mixed" else models.scaled(models.random(spec, 3), 0.05)
    wanted, plain = reference(pipe, lora)
    file = io.save(lora, tmp_path / "x.safetensors", format)
    pipe.load_lora_weights(str(file), adapter_name="x")
    models.assert_acts_like(pipe, wanted, plain)
    found = io.load(file, modules=spec)
    for name in spec.names:
        assert models.relative(models.double(found[name]), models.double(lora[name])) <= 1e-6, name


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux", "sd3"])
def test_peft_acts_like_the_merged_weights(family: str, tmp_path: Path) -> None:
    from peft import PeftModel

    pipe = models.PIPELINES[family]()
    lora = models.random_ranks(models.spec_of(pipe))
    wanted, plain = reference(pipe, lora)
    folder = parts.save(lora, tmp_path / "out")
    for part, model in models.components(pipe).items():
        found = PeftModel.from_pretrained(model, folder / part)
        assert models.relative(plain[part], wanted[part]) > 1e-2
        assert models.relative(models.output(part, found), wanted[part]) <= 1e-4, part
    assert io.load(folder).ranks == lora.ranks
    assert_same(io.load(folder, modules=lora.spec), lora)


@pytest.mark.parametrize("family", ["sd1", "sdxl", "flux"])
def test_converted_there_and_back_it_still_acts_the_same(family: str, tmp_path: Path) -> None:
    """PEFT folders, to kohya, to diffusers, which stock diffusers then runs."""
    pipe = models.PIPELINES[family]()
    spec = models.Spec(tuple(m for m in models.spec_of(pipe) if diffusers_reads(m.name, "diffusers")))
    lora = models.random_ranks(spec)
    wanted, plain = reference(pipe, lora)
    first = parts.save(lora, tmp_path / "peft")
    second = convert(first, tmp_path / "kohya.safetensors", "kohya", base=family)
    third = convert(second.written, tmp_path / "out", "diffusers", base=family)
    assert max(second.error.worst_relative, third.error.worst_relative) <= 1e-6
    pipe.load_lora_weights(str(tmp_path / "out"), adapter_name="x")
    models.assert_acts_like(pipe, wanted, plain)
