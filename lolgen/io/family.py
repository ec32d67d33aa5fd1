"""Which family of base models an adapter is for, from its tensors' keys and shapes, with the evidence.

Shapes are facts, metadata is what the file claims: a claim chooses between families that the shapes allow, and
never overrules them. Published sizes are in `lolgen.io.bases`.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from lolgen.io import claims
from lolgen.io.bases import EMBEDDED, LABELS, LANGUAGE, MMDIT, Language
from lolgen.io.raw import RawModule, Shape, modules_of

UNKNOWN = "unknown"


@dataclass(frozen=True)
class Family:
    """`name`: a key of `LABELS` ("sdxl", "llama", ...), several joined by " or " where the shapes leave them
    open, or "unknown". `certain`: whether the shapes alone decide. `evidence`: sentences for people, with the
    keys and shapes they rest on. `candidates`: the names that are possible, likeliest first."""

    name: str
    certain: bool
    evidence: tuple[str, ...]
    candidates: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        """For people: "Stable Diffusion XL", "Llama or Mistral"."""
        return " or ".join(LABELS.get(n, n) for n in self.name.split(" or "))


@dataclass
class _Finding:
    """What one look at the shapes says: the families it allows (none: it fits none that is known)."""

    families: tuple[str, ...]
    certain: bool
    evidence: list[str] = field(default_factory=list)


def detect(shapes: Mapping[str, Shape], metadata: Mapping[str, str] | None = None) -> Family:
    """The family of the base that tensors of these keys and shapes are for; keys of PEFT, diffusers, kohya
    (also SDXL's and Flux's original names), LyCORIS or of a full model.

    `metadata`: header strings and fields of `adapter_config.json`, or that file whole under "adapter_config".
    """
    return of_modules(modules_of(shapes), metadata)


def of_modules(modules: Mapping[str, RawModule], metadata: Mapping[str, str] | None = None) -> Family:
    """`detect` for modules already told apart by `lolgen.io.raw.modules_of`."""
    flat = [(*_flat(path), m) for path, m in modules.items()]
    claimed = claims.of(metadata or {})
    finding = next(filter(None, (look(flat) for look in _LOOKS)), None)
    if finding is None:
        seen = [f"no key is of a base known here, e.g. {_shown(path)}" for path in list(modules)[:1]]
        return Family(UNKNOWN, False, (*seen, *(s for s, _ in claimed)))
    return _weigh(finding, claimed)


def _weigh(finding: _Finding, claimed: Sequence[claims.Claim]) -> Family:
    families, evidence = finding.families, list(finding.evidence)
    certain = finding.certain and len(families) == 1
    for sentence, named in claimed:
        evidence.append(sentence)
        allowed = tuple(f for f in families if f in named)
        if allowed:
            families = allowed
        elif named and families:
            evidence[-1] += ", which the shapes contradict"
    name = " or ".join(families) if families else UNKNOWN
    return Family(name, certain, tuple(evidence), families)


# Paths. `flat` is (component, path with underscores for dots, module): one pattern serves every format.

Flat = Sequence[tuple[str, str, RawModule]]
_PREFIXES: tuple[tuple[str, str], ...] = (
    ("lora_unet_", "model"), ("lycoris_", "model"), ("lora_transformer_", "model"),
    ("model_diffusion_model_", "model"), ("diffusion_model_", "model"), ("unet_", "model"),
    ("transformer_2_", "model"), ("transformer_", "model"),
    ("lora_te1_", "te1"), ("lora_te2_", "te2"), ("lora_te3_", "te3"), ("lora_te_", "te"),
    ("text_encoder_2_", "te2"), ("text_encoder_3_", "te3"), ("text_encoder_", "te"),
    ("cond_stage_model_transformer_", "te"), ("conditioner_embedders_0_transformer_", "te1"),
    ("conditioner_embedders_1_model_", "te2"),
)  # fmt: skip


def _flat(path: str) -> tuple[str, str]:
    flat = path.removeprefix("base_model.model.").replace(".", "_")
    for prefix, component in _PREFIXES:
        if flat.startswith(prefix):
            return component, flat[len(prefix) :]
    return "", flat


def _cite(module: RawModule, what: str = "") -> str:
    key = module.parts[max(module.shapes, key=lambda part: len(module.shapes[part]))]  # no alpha
    short = _shown(key)
    out, in_ = module.size
    return f"{short} ({what or f'out {out}, in {in_}'})"


def _shown(key: str) -> str:
    """A stranger's key on one line, not too long, with nothing that a terminal would obey."""
    plain = "".join(c if c.isprintable() else "?" for c in key[:121])
    return plain if len(plain) <= 120 else f"{plain[:117]}..."


# UNets.

_CROSS = re.compile(r"(?:_|^)attn2_to_[kv]$")
_UNET = re.compile(r"(?:down_blocks|mid_block|up_blocks|input_blocks|middle_block|output_blocks)_")
_DEPTH = re.compile(r"_transformer_blocks_(\d+)_")
_WIDTHS = {768: "sd1", 1024: "sd2", 2048: "sdxl"}


def _unet(flat: Flat) -> _Finding | None:
    inside = [(p, m) for c, p, m in flat if c in ("", "model") and _UNET.match(p)]
    if not inside:
        return None
    tiny = next((m for p, m in inside if _CROSS.search(p) and m.size[1] in EMBEDDED), None)
    if tiny is not None:
        width = tiny.size[1] or 0
        return _Finding((EMBEDDED[width],), True, [f"cross-attention reads {width}: {_cite(tiny)}"])
    widths: dict[int, RawModule] = {}
    for p, m in inside:
        if _CROSS.search(p) and m.size[1]:
            widths.setdefault(m.size[1], m)
    found = [w for w in widths if w in _WIDTHS]
    if widths:
        evidence = [f"cross-attention reads {w}: {_cite(m)}" for w, m in widths.items()]
        family = _WIDTHS.get(found[0]) if len(widths) == 1 and found else None
        if family is None:
            evidence.append("wanted 768 (SD 1.x), 1024 (SD 2.x) or 2048 (SDXL) throughout")
            return _Finding((), False, evidence)
        return _Finding((family,), True, [*evidence, *_depth(inside, family), *_second_encoder(flat)])
    return _unet_without_cross(inside, flat)


def _depth(inside: Iterable[tuple[str, RawModule]], family: str) -> list[str]:
    if family != "sdxl":
        return []
    deepest = max(inside, key=lambda item: _number(_DEPTH, item[0]))
    depth = _number(_DEPTH, deepest[0])
    return [f"transformer_blocks up to {depth}: {_cite(deepest[1])}"] if depth > 0 else []


def _second_encoder(flat: Flat) -> list[str]:
    second = next((m for c, _, m in flat if c == "te2"), None)
    return [] if second is None else [f"a second text encoder: {_cite(second)}"]


def _unet_without_cross(inside: Sequence[tuple[str, RawModule]], flat: Flat) -> _Finding:
    """No cross-attention key or value is adapted: what depth and widths leave open."""
    deepest = max(inside, key=lambda item: _number(_DEPTH, item[0]))
    if _number(_DEPTH, deepest[0]) > 0 or any(c == "te2" for c, _, _ in flat):
        evidence = [f"more than one transformer block in a stage: {_cite(deepest[1])}"]
        return _Finding(("sdxl",), True, _second_encoder(flat) or evidence)
    # SDXL has no attention at its widest resolution, where SD 1.x and 2.x have it with 320 channels.
    first = next(
        (m for p, m in inside if re.match(r"(?:down_blocks_0|up_blocks_3)_attentions_", p) and 320 in m.size),
        None,
    )
    encoder = _text_encoder(flat)
    allowed = ("sd1", "sd2") if first is not None else ("sd1", "sd2", "sdxl")
    evidence = ["a UNet of which no cross-attention key or value is adapted"]
    if first is not None:
        evidence.append(f"attention with 320 channels in the outermost block: {_cite(first)}")
    elif not any({320, 640, 1280} & set(m.size) for _, m in inside):
        return _Finding(
            (), False, [*evidence, f"of widths that no base known here has: {_cite(inside[0][1])}"]
        )
    if encoder is not None and encoder.families:
        both = tuple(f for f in allowed if f in encoder.families)
        return _Finding(both or allowed, len(both) == 1, evidence + encoder.evidence)
    return _Finding(allowed, False, evidence)


# Diffusion transformers with joint attention.

_DOUBLE = re.compile(r"^(?:transformer_blocks|double_blocks|joint_blocks)_(\d+)_")
_SINGLE = re.compile(r"^(?:single_transformer_blocks|single_blocks)_(\d+)_")
_WIDE = re.compile(
    r"attn_(?:to_[qkv]|add_[qkv]_proj|qkv|proj)$|attn_(?:qkv|proj)$|_linear[12]$|_to_out_0$|_proj_(?:mlp|out)$"
)


def _mmdit(flat: Flat) -> _Finding | None:
    inside = [(p, m) for c, p, m in flat if c in ("", "model") and (_DOUBLE.match(p) or _SINGLE.match(p))]
    if not inside:
        return None
    joint = [p for p, _ in inside if re.search(r"add_[qkv]_proj|context|_txt_|single_|joint_|double_", p)]
    width, example = _commonest((m.size[1], m) for p, m in inside if _WIDE.search(p))
    double = max(_number(_DOUBLE, p) for p, _ in inside)
    single = max(_number(_SINGLE, p) for p, _ in inside)
    if width is None or example is None or not joint:
        return _Finding((), False, [f"a diffusion transformer of unknown kind: {_cite(inside[0][1])}"])
    evidence = [f"joint transformer blocks of width {width}: {_cite(example)}"]
    if double >= 0:
        evidence.append(f"double blocks up to {double}")
    if single >= 0:
        evidence.append(f"single blocks up to {single}")
    rows = [r for r in MMDIT if r.width == width and double < r.double and single < r.single]
    rows = [r for r in rows if r.marks and any(re.search(r.marks, p) for p, _ in inside)] or rows
    exact = [r for r in rows if r.double == double + 1 or (single >= 0 and r.single == single + 1)]
    families = tuple(dict.fromkeys(r.family for r in exact or rows))
    return _Finding(families, len(families) == 1, evidence)


# Text encoders alone.

_ENCODERS: dict[int, tuple[str, tuple[str, ...]]] = {
    768: ("CLIP-L", ("sd1", "sdxl", "sd3", "flux")),
    1024: ("OpenCLIP-H", ("sd2",)),
    1280: ("OpenCLIP-bigG", ("sdxl", "sd3")),
    4096: ("T5-XXL", ("sd3", "flux")),
    96: ("tiny-sd's", ("tiny-sd",)),
}


def _text_encoder(flat: Flat) -> _Finding | None:
    inside = [
        (c, p, m) for c, p, m in flat
        if c.startswith("te") or (c == "" and p.startswith(("text_model_encoder_", "encoder_layers_")))
    ]  # fmt: skip
    families: set[str] | None = None
    evidence = []
    seen = set()
    for c, p, m in inside:
        width = m.size[1]
        if width is None or not re.search(
            r"_(?:q|k|v)_proj$|_mlp_fc1$|SelfAttention_[qkv]$|_DenseReluDense_wi_\d$", p
        ):
            continue
        if (c, width) in seen:
            continue
        seen.add((c, width))
        what, allowed = _ENCODERS.get(width, ("unknown", ()))
        if c == "te" and width == 768 and "lora_te_" in next(iter(m.parts.values())):
            allowed = ("sd1",)  # kohya numbers the encoders of bases that have several
        if c == "te1" and width == 768:
            allowed = ("sdxl", "sd3", "flux")
        evidence.append(f"a text encoder of width {width} ({what}): {_cite(m)}")
        families = set(allowed) if families is None else families & set(allowed)
    if families is None:
        return None
    order = [f for f in LABELS if f in families]
    return _Finding(tuple(order), len(order) == 1, evidence)


# Language models.

_LAYER = re.compile(
    r"(?:^|_)layers_(\d+)_(?:block_sparse_moe_|mlp_experts_|language_model_)?.*?"
    r"(self_attn_[qkvo]_proj|mlp_(?:gate|up|down)_proj|experts_\d+_w[123])$"
)
_EMBED = re.compile(r"(?:^|_)(?:embed_tokens|lm_head)$")


def _language(flat: Flat) -> _Finding | None:
    sizes: dict[str, Counter[int]] = defaultdict(Counter)
    examples: dict[tuple[str, int], RawModule] = {}
    layers = set()
    names = set()
    for c, p, m in flat:
        if c.startswith("te") or "encoder_layers" in p:
            continue
        names.add(p)
        for what, size in _roles(p, m):
            if size is not None:
                sizes[what][size] += 1
                examples.setdefault((what, size), m)
        found = _LAYER.search(p)
        if found:
            layers.add(int(found[1]))
    if not layers:
        return None
    seen = {what: count.most_common(1)[0][0] for what, count in sizes.items()}
    evidence = [f"{_ROLES[w]} {n}: {_cite(examples[w, n])}" for w, n in seen.items()]
    evidence.append(f"layers up to {max(layers)}")
    if any("block_sparse_moe" in n for n in names):
        seen["experts"] = 1
        evidence.append("a sparse mixture of experts, block_sparse_moe")
    normed = any(n.endswith(("_q_norm", "_k_norm")) for n in names)
    rows = [r for r in LANGUAGE if _fits(r, seen, max(layers), normed)]
    if not rows and "vocab" in seen:  # a fine-tune may have changed its vocabulary, hardly its layers
        del seen["vocab"]
        rows = [r for r in LANGUAGE if _fits(r, seen, max(layers), normed)]
    # An adapter mostly covers every layer: where some row ends just there, the longer models are unlikely.
    whole = layers == set(range(max(layers) + 1))
    exact = [r for r in rows if whole and r.layers == max(layers) + 1]
    families = tuple(dict.fromkeys(r.family for r in exact or rows))
    by_shape = {r.family for r in rows}
    models = sorted({r.model for r in exact or rows})
    if models:
        evidence.append(
            f"sizes published for {', '.join(models)}" + (" (same shapes)" if len(families) > 1 else "")
        )
    else:
        evidence.append("no published size known here fits")
    enough = "hidden" in seen and bool({"kv", "mlp", "vocab"} & seen.keys())
    return _Finding(families, enough and len(by_shape) == 1, evidence)


_ROLES = {
    "hidden": "hidden size", "query": "query size", "kv": "key and value size", "mlp": "MLP size",
    "vocab": "vocabulary",
}  # fmt: skip


def _roles(path: str, m: RawModule) -> Iterable[tuple[str, int | None]]:
    """(role, size) pairs that a module's shape gives."""
    out, in_ = m.size
    if _EMBED.search(path):
        # An embedding's weight and lm_head's are both (vocab, hidden); of a LoRA's embedding `in` is the vocab.
        vocab = max(out or 0, in_ or 0)
        return [("vocab", vocab if vocab > 20_000 else None)]
    found = _LAYER.search(path)
    if not found:
        return []
    what = found[2]
    if what == "self_attn_q_proj":
        return [("hidden", in_), ("query", out)]
    if what in ("self_attn_k_proj", "self_attn_v_proj"):
        return [("hidden", in_), ("kv", out)]
    if what == "self_attn_o_proj":
        return [("hidden", out), ("query", in_)]
    if what in ("mlp_gate_proj", "mlp_up_proj") or what.endswith(("w1", "w3")):
        return [("hidden", in_), ("mlp", out)]
    return [("hidden", out), ("mlp", in_)]


def _fits(row: Language, seen: Mapping[str, int], last: int, normed: bool) -> bool:
    sizes = {"hidden": row.hidden, "query": row.query, "kv": row.kv, "mlp": row.mlp}
    if any(seen[k] != v for k, v in sizes.items() if k in seen) or last >= row.layers:
        return False
    if ("experts" in seen) and not row.experts or (normed and not row.normed):
        return False
    return "vocab" not in seen or abs(seen["vocab"] - row.vocab) <= 512  # some fine-tunes add tokens


_GPT2 = re.compile(r"(?:^|_)h_(\d+)_(attn_c_attn|attn_c_proj|mlp_c_fc|mlp_c_proj)$")


def _gpt2(flat: Flat) -> _Finding | None:
    inside = [(p, m) for _, p, m in flat if _GPT2.search(p)]
    if not inside:
        return None
    path, m = next(((p, m) for p, m in inside if p.endswith("c_attn")), inside[0])
    # Conv1D keeps its weight as (in, out); of a LoRA it is the usual way round.
    small = min((s for s in m.size if s is not None), default=None)
    known = small in (768, 1024, 1280, 1600)
    evidence = [f"blocks h.N with c_attn and c_fc of width {small}: {_cite(m)}"]
    return _Finding(("gpt2",) if known else (), known and path.endswith("c_attn"), evidence)


_LOOKS: tuple[Callable[[Flat], _Finding | None], ...] = (_unet, _mmdit, _gpt2, _text_encoder, _language)


def _number(pattern: re.Pattern[str], path: str) -> int:
    found = pattern.search(path)
    return int(found[1]) if found else -1


def _commonest(sizes: Iterable[tuple[int | None, RawModule]]) -> tuple[int | None, RawModule | None]:
    known = [(s, m) for s, m in sizes if s is not None]
    if not known:
        return None, None
    best = Counter(s for s, _ in known).most_common(1)[0][0]
    return best, next(m for s, m in known if s == best)
