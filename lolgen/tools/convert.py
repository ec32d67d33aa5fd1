"""Adapters from one format to another, read back and compared before anything is said of them.

Every pair of formats that can hold a family: SD 1, SD 2, SDXL, SD 3 and Flux in all three, language models in PEFT
folders, which are all that loads them. LoHa and LoKr files become LoRAs. What the target has no place for is an
error, or is left out by name (`drop`): nothing is lost silently.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lolgen import gl, io
from lolgen.errors import FormatError
from lolgen.io import common, diffusers, family, guess, keys, names, parts
from lolgen.io.lycoris import truncation_error
from lolgen.lora import Factors, LoRA, Spec
from lolgen.tools.roundtrip import Error, error

DTYPES: dict[str, torch.dtype] = {
    str(d).removeprefix("torch."): d for d in (torch.float16, torch.bfloat16, torch.float32, torch.float64)
}


@dataclass
class Report:
    """What `convert` did.

    `ranks`: least and largest of the written modules. `error`: of delta W, the file read back against what was
    converted. `truncated`: of what was converted against the source, where a rank was asked for. `lycoris`: modules
    that were LoHa or LoKr; `fused`: modules that the target fuses; `dropped`: keys left out, with the reason;
    `header_left`: header entries that the target says in its own way or not at all; `notes`: what a reader of the
    target is known to make of it.
    """

    source: str
    written: str
    format: str
    to: str
    family: str | None
    modules: int
    ranks: tuple[int, int]
    dtype: str
    error: Error
    truncated: Error | None = None
    lycoris: list[io.Converted] = field(default_factory=list)
    fused: list[io.Fused] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    header_left: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def convert(
    path: str | os.PathLike[str],
    out: str | os.PathLike[str],
    to: str,
    *,
    base: str | None = None,
    dtype: str | None = None,
    rank: int | None = None,
    drop: bool = False,
    progress: bool = False,
) -> Report:
    """Write the adapter at `path` as `to` ("peft", "diffusers" or "kohya") at `out`, read it back, and report.

    `base`: the family (one of `io.FAMILIES`), where names leave it open or the modules do not show it. `dtype`: one
    of DTYPES; None keeps each module's own. `rank`: the largest rank to write, by the best approximation there is.
    `drop`: leave out what the target cannot hold, which is an error otherwise. A pipeline's adapter becomes one PEFT
    folder a component under `out`.

    Raises FormatError for a bad file, a target that cannot hold the family or some keys, or a disk that refuses.
    """
    _check(path, out, to, dtype, rank)
    guess.check_base(base)
    came = io.detect(path)
    converted: list[io.Converted] = []
    source = io.load(path, base=base, rank=rank, report=converted)
    guess.check_family(path, source, base)
    lora, truncated = (source, None) if rank is None else _truncate(source, rank, converted, progress)
    dropped = cannot_hold(path, lora, to, same=came == to)
    if dropped and not drop:
        key, why = next(iter(dropped.items()))
        more = f" and {len(dropped) - 1} more" if len(dropped) > 1 else ""
        raise FormatError(
            path,
            key=key,
            found=f"{why}{more}",
            wanted=f"what a {to} file can hold",
            remedy="choose another format, or leave these out with --drop, which lists them",
        )
    lora = _without(lora, dropped)
    fused: list[io.Fused] = []
    # Truncated modules are new numbers, in float32: rounded on writing, so that the read-back error counts that too.
    wide = DTYPES[dtype] if dtype else None if rank is None else source.dtype
    several = to == "peft" and len({names.component(n) for n in lora.names}) > 1
    if several:
        written = parts.save(lora, out, wide, base=base)
    else:
        projected = {"projected": True} if to == "peft" and base == "sd3" else {}
        written = io.save(lora, out, to, dtype=wide, base=base, report=fused, **projected)
    again = io.load(written, base=base)
    return Report(
        source=os.fspath(path),
        written=os.fspath(written),
        format=came,
        to=to,
        family=base or guess.family(lora) or _detected(lora),
        modules=len(again),
        ranks=(min(again.ranks.values()), max(again.ranks.values())),
        dtype=str(again.dtype).removeprefix("torch."),
        error=error(lora, again, progress=progress),
        truncated=truncated,
        lycoris=converted,
        fused=fused,
        dropped=dropped,
        header_left=sorted(k for k in source.metadata if k not in again.metadata),
        notes=_notes(lora, again, to, several),
    )


def _detected(lora: LoRA) -> str | None:
    """The family that names and shapes allow, several joined by " or "; None where they allow none that is known."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in lora.spec:
        shapes[f"{module.name}.lora_A.weight"] = (lora[module.name].rank, module.in_, *module.kernel)
        shapes[f"{module.name}.lora_B.weight"] = (
            module.out,
            lora[module.name].rank,
            *(1 for _ in module.kernel),
        )
    found = family.detect(shapes, lora.metadata).name
    return None if found == family.UNKNOWN else found


def cannot_hold(path: str | os.PathLike[str], lora: LoRA, to: str, *, same: bool = False) -> dict[str, str]:
    """Key -> why, for the modules and extras that a file of format `to` has no place for.

    `same`: the file came in this format, whose unknown tensors are carried through. FormatError when the format
    holds none of the modules.
    """
    found: dict[str, str] = {}
    together = {names.component(n) for n in lora.names}
    for module in lora.spec:
        part = names.component(module.name)
        raw = part is None and common.is_kohya_key(f"{module.name}.x")
        if to == "kohya":
            if part is None and not raw:
                found[module.name] = "a language model's module, or another of no diffusers component"
            elif module.kind == "embedding":
                found[module.name] = "an embedding"
        elif raw:
            found[module.name] = "a kohya name that no module table explains"
        elif part is None and (to == "diffusers" or len(together) > 1):
            found[module.name] = "a module of no diffusers component"
    if len(found) == len(lora):
        _nothing_held(path, lora, to, found)
    for key in lora.extras:
        owner = _owner(key, lora)
        why = found.get(owner, "") if owner else _place(key, to, same, len(together) == 1)
        if key.endswith(f".{keys.BIAS}") and to == "kohya":
            why = "a bias beside lora_B"
        if why:
            found[key] = why
    return found


def _owner(key: str, lora: LoRA) -> str:
    """The module that an extra is the magnitude or the bias of, or ""."""
    name = key.removesuffix(f".{keys.MAGNITUDE}").removesuffix(f".{keys.BIAS}")
    return name if name != key and name in lora.spec else ""


def _place(key: str, to: str, same: bool, one_model: bool) -> str:
    """Why a tensor that belongs to no module has no place in a file of format `to`, or ""."""
    if to == "peft" and not one_model and names.component(key) is None:
        return "a tensor of none of the components, which get a folder each"
    if same or (to == "peft" and one_model and key.startswith("base_model.")):
        return ""
    if key.endswith(".dora_scale"):
        return "a DoRA magnitude per input, which only kohya files have"
    full = "base_model." in key
    return (
        "a full tensor of the base model (modules_to_save)" if full else "a tensor that is no part of a LoRA"
    )


def _nothing_held(path: str | os.PathLike[str], lora: LoRA, to: str, found: Mapping[str, str]) -> None:
    can = [f for f in io.FORMATS if f != to and len(_modules_held(lora, f)) == len(lora)]
    names_ = {
        "kohya": "kohya names only modules of diffusion models",
        "diffusers": "diffusers files are of pipelines",
    }
    raise FormatError(
        path,
        key=lora.names[0],
        found=f"{found[lora.names[0]]}, as are all {len(lora)}",
        wanted=f"an adapter that a {to} file can hold ({names_.get(to, 'PEFT needs the paths of a model')})",
        remedy=f"convert --to {' or '.join(can)}" if can else "name the modules of its base when loading",
    )


def _modules_held(lora: LoRA, to: str) -> list[str]:
    """The modules that a format can hold, without a word on the others."""
    held = []
    for module in lora.spec:
        part = names.component(module.name)
        raw = part is None and common.is_kohya_key(f"{module.name}.x")
        kohya = (part is not None or raw) and module.kind != "embedding"
        if {"peft": not raw, "diffusers": part is not None, "kohya": kohya}[to]:
            held.append(module.name)
    return held


def _without(lora: LoRA, dropped: Mapping[str, str]) -> LoRA:
    keep = tuple(m for m in lora.spec if m.name not in dropped)
    extras = {k: v for k, v in lora.extras.items() if k not in dropped}
    return LoRA(Spec(keep), {m.name: lora[m.name] for m in keep}, dict(lora.metadata), extras)


def _truncate(
    lora: LoRA, rank: int, converted: list[io.Converted], progress: bool
) -> tuple[LoRA, Error | None]:
    """The LoRA at `rank` at most, and its error; LoHa and LoKr modules come truncated, with theirs."""
    factors: dict[str, Factors] = {}
    known = {c.name: c.error for c in converted}
    errors = dict.fromkeys(lora.names, 0.0)
    total = size = 0.0
    bar = tqdm(lora.factors.items(), "truncating", leave=False, disable=None if progress else True)
    for name, f in bar:
        U, V = f.B.double() * f.scale, f.V.double()
        S = float(torch.linalg.vector_norm(gl.spectrum(U, V)))
        if name in known:
            # The norm before truncation, from what is left of it.
            errors[name], factors[name] = known[name], f
            S = S / (1 - known[name] ** 2) ** 0.5 if known[name] < 1 else S
        elif f.rank > rank:
            errors[name] = truncation_error(U, V, rank)
            U, V = gl.truncate(U, V, rank)
            wide = torch.promote_types(torch.promote_types(f.B.dtype, f.A.dtype), torch.float32)
            factors[name] = Factors(U.to(wide), V.T.contiguous().to(wide))
        else:
            factors[name] = f
        total, size = total + (errors[name] * S) ** 2, size + S**2
    worst = max(errors, key=lambda n: errors[n])
    return lora.replace(factors), Error((total / size) ** 0.5 if size else 0.0, worst, errors[worst])


def _notes(lora: LoRA, again: LoRA, to: str, several: bool) -> list[str]:
    notes = []
    zero = [n for n in lora.names if n not in again.spec]
    if zero:
        some = ", ".join(zero[:3]) + (f" and {len(zero) - 3} more" if len(zero) > 3 else "")
        notes.append(f"zero in a fused module is the same as missing, and is read back so: {some}")
    if several:
        notes.append("one PEFT folder a component: PeftModel.from_pretrained(pipe.unet, OUT/unet) and so on")
    if any(k.endswith(keys.MAGNITUDE) for k in lora.extras):
        notes.append(
            "DoRA: the magnitudes are carried along; delta W is of the factors alone, the rest needs the base's weights"
            + ("; diffusers leaves dora_scale out of kohya files, ComfyUI reads it" if to == "kohya" else "")
        )
    blocks = ("transformer.transformer_blocks.", "transformer.single_transformer_blocks.")
    outside = [n for n in lora.names if n.startswith("transformer.") and not n.startswith(blocks)]
    if to == "kohya" and outside:
        notes.append(
            f"stock diffusers (0.42) applies no kohya module outside the blocks: {', '.join(outside[:3])}"
            + (f" and {len(outside) - 3} more" if len(outside) > 3 else "")
            + "; sd-scripts and ComfyUI do, and diffusers does from a diffusers file"
        )
    if to != "peft" and any(n.endswith(".text_projection") for n in lora.names):
        notes.append("stock diffusers gives text_projection no adapter, in any format")
    return notes


def _check(
    path: str | os.PathLike[str], out: str | os.PathLike[str], to: str, dtype: str | None, rank: int | None
) -> None:
    if to not in io.FORMATS:
        raise FormatError(
            out, found=f"format {to!r}", wanted=", ".join(io.FORMATS), remedy="choose one of these"
        )
    if dtype is not None and dtype not in DTYPES:
        raise FormatError(
            out, found=f"dtype {dtype!r}", wanted=", ".join(DTYPES), remedy="choose one of these"
        )
    if rank is not None and rank < 1:
        raise FormatError(out, found=f"rank {rank}", wanted="1 or more", remedy="choose a rank")
    here, there = Path(path).resolve(), Path(out).resolve()
    target = there / diffusers.FILE if to == "diffusers" and there.suffix != ".safetensors" else there
    if here in (there, target):
        raise FormatError(
            out, found="the adapter itself", wanted="another path", remedy="the source is never written over"
        )
