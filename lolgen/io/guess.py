"""Which names a kohya file of a LoRA uses, from what the LoRA's own modules show."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lolgen.errors import FormatError
from lolgen.io import names
from lolgen.io.families import FAMILIES, LANGUAGE, LAYOUTS, language, text, unet
from lolgen.io.safetensors_file import Path_
from lolgen.lora import LoRA

_DEEP = re.compile(r"unet\..*\.transformer_blocks\.[1-9]\d*\.")
_LDM = tuple(f"lora_unet_{top}" for top in ("input_blocks", "middle_block", "output_blocks"))
_HEADER = {"flux": re.compile(r"\bflux"), "sd3": re.compile(r"\b(?:sd3|stable-diffusion-3)")}
_WIDTHS = {"flux": (3072,), "sd3": (1536, 2432)}  # of the published transformers


def check_base(base: str | None) -> None:
    """FormatError for a family that lolgen does not know."""
    if base is not None and base not in FAMILIES:
        raise FormatError(
            "base", found=repr(base), wanted=", ".join(FAMILIES), remedy="name the family of the base model"
        )


def check_family(file: Path_, lora: LoRA, base: str | None) -> None:
    """FormatError when `base` is a family whose modules these are not, as far as names tell."""
    if base is None:
        return
    for name in lora.names:
        part = names.component(name)
        of_text = part is None and not name.startswith(names.KOHYA_PREFIXES)
        denoiser = {"sd3": "transformer", "flux": "transformer"}.get(base, "unet")
        if of_text != (base in LANGUAGE) or (part in ("unet", "transformer") and part != denoiser):
            raise FormatError(
                file,
                key=name,
                found=f"a module of {part or 'a language model'}",
                wanted=f"modules of {base}",
                remedy="name another base, or none",
            )


def family(lora: LoRA) -> str | None:
    """The family that the modules show beyond doubt, or None."""
    parts = {names.component(n) for n in lora.names}
    if "transformer" in parts:
        found = [f for f in LAYOUTS if _fits(f, lora)]
        sure = [f for f in found if _is(f, lora)] if len(found) > 1 else found
        return sure[0] if len(sure) == 1 else None
    if sdxl(lora):
        return "sdxl" if "unet" in parts or "text_encoder_2" in parts else None
    for version, width in (("sd1", 768), ("sd2", 1024)):
        if any(m.in_ == width for m in lora.spec if m.name.endswith((".attn2.to_k", ".attn2.to_v"))):
            return version
    return "gpt2" if any(language.is_gpt2(n) for n in lora.names) else None


def sdxl(lora: LoRA) -> bool:
    """Whether the UNet's modules are SDXL's: by a second text encoder, the added embedding, transformers of more
    than one block, the width of what they attend to, or the file's header."""
    if any(n.startswith(("text_encoder_2.", "lora_te2_", "unet.add_embedding.", *_LDM)) for n in lora.names):
        return not any(names.component(n) in ("transformer", "text_encoder_3") for n in lora.names)
    if any(_DEEP.match(n) for n in lora.names):
        return True
    if any(m.in_ == 2048 for m in lora.spec if m.name.endswith((".attn2.to_k", ".attn2.to_v"))):
        return True
    header = lora.metadata
    return header.get("ss_base_model_version", "").startswith("sdxl") or header.get(
        "modelspec.architecture", ""
    ).startswith("stable-diffusion-xl")


def kohya_style(file: Path_, lora: LoRA, base: str | None = None) -> tuple[str, str]:
    """(one of `names.STYLES`, the prefix of the first text encoder) for a kohya file of this LoRA.

    FormatError when a transformer's family cannot be told, or `base` is not the family of the modules.
    """
    check_base(base)
    parts = {names.component(n) for n in lora.names}
    if "transformer" in parts:
        return _transformer(file, lora, base), "lora_te1_"
    if base in LAYOUTS and "unet" in parts:
        first = next(n for n in lora.names if n.startswith("unet."))
        raise FormatError(
            file,
            key=first,
            found="a module of a UNet",
            wanted=f"modules of {base}",
            remedy="name another base",
        )
    if base in LAYOUTS or any(n.startswith("text_encoder_3.") for n in lora.names):
        return "diffusers", "lora_te1_"
    large = sdxl(lora) if base is None else base == "sdxl"
    # Readers take a file's names for all of one kind: where the original ones cannot say all, none are used.
    paths = [n[len("unet.") :] for n in lora.names if n.startswith("unet.")]
    original = large and all(unet.to_ldm(p) is not None for p in paths)
    return ("sdxl" if original else "diffusers"), ("lora_te1_" if large else "lora_te_")


def is_sd3(lora: LoRA) -> bool:
    """Whether the modules are SD3's: of its transformer and not Flux's."""
    fits = [f for f in LAYOUTS if _fits(f, lora)]
    return fits == ["sd3"] or (len(fits) > 1 and _is("sd3", lora) and not _is("flux", lora))


def _fits(family: str, lora: LoRA) -> bool:
    """Whether every module of the transformer is one of a family's, and there is one."""
    paths = [n[len("transformer.") :] for n in lora.names if n.startswith("transformer.")]
    return bool(paths) and all(LAYOUTS[family].original(p) for p in paths)


def _transformer(file: Path_, lora: LoRA, base: str | None) -> str:
    modules = [m for m in lora.spec if m.name.startswith("transformer.")]
    if base is not None and base not in LAYOUTS:
        raise FormatError(
            file,
            key=modules[0].name,
            found="a module of a transformer",
            wanted=f"modules of {base}",
            remedy=f"name one of {', '.join(LAYOUTS)} as the base",
        )
    if base is not None:
        return base
    found = [f for f in LAYOUTS if _fits(f, lora)]
    if not found:
        bare = next(
            m for m in modules if not any(x.original(m.name[len("transformer.") :]) for x in LAYOUTS.values())
        )
        raise FormatError(
            file,
            key=bare.name,
            found=f"{bare.kind} module that kohya has no name for",
            wanted=f"modules of {' or '.join(LAYOUTS)}",
            remedy="save as diffusers or peft instead",
        )
    if len(found) > 1:
        found = [f for f in found if _is(f, lora)] or found
    if len(found) > 1:
        raise FormatError(
            file,
            key=modules[0].name,
            found=f"modules that {' and '.join(found)} share",
            wanted="one family, whose original names kohya uses",
            remedy="name the base: --base flux, or --base sd3",
        )
    return found[0]


def _is(family: str, lora: LoRA) -> bool:
    """Evidence beyond names for one of the transformers: its width, a text encoder of its own, the header."""
    inside = [m for m in lora.spec if m.name.startswith("transformer.transformer_blocks.")]
    if any(m.in_ in _WIDTHS[family] for m in inside if m.name.endswith(("to_q", "to_k", "to_v", "_proj"))):
        return True
    second = [n.partition(".")[2] for n in lora.names if n.startswith("text_encoder_2.")]
    t5 = any(text.t5_path(path) for path in second)
    third = any(n.startswith("text_encoder_3.") for n in lora.names)
    if third or second:
        return (family == "sd3") == (third or not t5)
    header = f"{lora.metadata.get('ss_base_model_version')} {lora.metadata.get('modelspec.architecture')}"
    return _HEADER[family].search(header) is not None


def t5_component(keys: Iterable[str], base: str | None) -> str:
    """The component that `lora_te3_` names in a file: Flux has T5 as its second text encoder, SD3 as its third."""
    if base is not None:
        return "text_encoder_2" if base == "flux" else "text_encoder_3"
    flux = ("lora_unet_double_blocks_", "lora_unet_single_blocks_", "lora_unet_single_transformer_blocks_")
    return "text_encoder_2" if any(k.startswith(flux) for k in keys) else "text_encoder_3"
