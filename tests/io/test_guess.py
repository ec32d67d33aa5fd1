"""Which family a LoRA's modules show, and which names its kohya file gets."""

from __future__ import annotations

import pytest
from adapters import LLM, SD, random

from lolgen.errors import FormatError
from lolgen.io import guess
from lolgen.lora import LoRA, ModuleSpec, Spec

ATTENTION = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
BLOCK = "transformer.transformer_blocks.0"


def lora(*modules: tuple[str, int, int], header: str = "") -> LoRA:
    found = random(Spec(tuple(ModuleSpec(*m) for m in modules)), 1)
    if header:
        found.metadata["modelspec.architecture"] = header
    return found


FAMILIES = {
    "sd1 by its text's width": (lora((ATTENTION, 4, 768)), "sd1"),
    "sd2 by its text's width": (lora((ATTENTION, 4, 1024)), "sd2"),
    "sdxl by its text's width": (lora((ATTENTION, 4, 2048)), "sdxl"),
    "sdxl by its second text encoder": (lora(("text_encoder_2.text_model.a", 4, 4)), "sdxl"),
    "a small UNet": (random(SD), None),
    "flux by its single blocks": (lora(("transformer.single_transformer_blocks.0.proj_mlp", 4, 4)), "flux"),
    "sd3 by its second attention": (lora((f"{BLOCK}.attn2.to_q", 4, 4)), "sd3"),
    "what both have": (lora((f"{BLOCK}.attn.to_q", 4, 4)), None),
    "flux by its width": (lora((f"{BLOCK}.attn.to_q", 4, 3072)), "flux"),
    "sd3 by its width": (lora((f"{BLOCK}.attn.to_q", 4, 1536)), "sd3"),
    "flux by its T5": (
        lora((f"{BLOCK}.attn.to_q", 4, 4), ("text_encoder_2.encoder.block.0.layer.0.SelfAttention.q", 4, 4)),
        "flux",
    ),
    "sd3 by its CLIPs": (
        lora((f"{BLOCK}.attn.to_q", 4, 4), ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1", 4, 4)),
        "sd3",
    ),
    "flux by its header": (lora((f"{BLOCK}.attn.to_q", 4, 4), header="flux-1-dev/lora"), "flux"),
    "sd3 by its header": (lora((f"{BLOCK}.attn.to_q", 4, 4), header="stable-diffusion-3-medium/lora"), "sd3"),
    "another transformer": (lora(("transformer.layers.0.attention.to_q", 4, 4)), None),
    "gpt2": (lora(("transformer.h.0.attn.c_attn", 4, 4)), "gpt2"),
    "another language model": (random(LLM), None),
}


@pytest.mark.parametrize("what", FAMILIES)
def test_family(what: str) -> None:
    found, wanted = FAMILIES[what]
    assert guess.family(found) == wanted


@pytest.mark.parametrize(
    ("what", "base", "fits"),
    [
        ("a small UNet", "sd1", True),
        ("a small UNet", "flux", False),
        ("a small UNet", "llama", False),
        ("what both have", "sd3", True),
        ("what both have", "flux", True),
        ("what both have", "sdxl", False),
        ("gpt2", "gpt2", True),
        ("gpt2", "sd1", False),
        ("another language model", "gemma", True),
        ("another language model", None, True),
    ],
)
def test_a_base_that_is_named(what: str, base: str | None, fits: bool) -> None:
    found = FAMILIES[what][0]
    if fits:
        guess.check_family("x", found, base)
    else:
        with pytest.raises(FormatError, match=f"wanted modules of {base}; name another base"):
            guess.check_family("x", found, base)
