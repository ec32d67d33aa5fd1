"""What every tensor of an adapter file is, from its key and shape alone: LoRA, LoHa, LoKr, and what is none.

Where `lolgen.io.load` reads LoRAs and refuses the rest, this names the rest too. Nothing here opens a file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

from lolgen.io import keys

Shape = tuple[int, ...]

METHODS: dict[str, str] = {
    "lora": "LoRA",
    "loha": "LoHa (Hadamard products of two pairs)",
    "lokr": "LoKr (Kronecker product)",
    "oft": "OFT (orthogonal)",
    "boft": "BOFT (orthogonal, butterfly)",
    "glora": "GLoRA",
    "ia3": "(IA)^3 (a scale per channel)",
    "diff": "full differences of weights",
    "norm": "differences of norms",
    "adalora": "AdaLoRA",
    "vera": "VeRA (frozen random matrices)",
    "vblora": "VB-LoRA (vector bank)",
    "fourierft": "FourierFT",
    "c3a": "C3A (circular convolution)",
    "hra": "HRA (Householder reflections)",
    "bone": "Bone",
    "miss": "MiSS",
    "shira": "SHiRA (sparse)",
    "road": "RoAd (rotations)",
    "randlora": "RandLoRA (frozen random bases)",
    "tokens": "trainable tokens",
    "prompt": "prompt or prefix tuning",
    "full": "full weights",
}
"""Methods by the name used here, and what to call them."""

_SUFFIXES = re.compile(
    r"(?P<path>.*?)\.?(?:"
    r"(?P<loha>hada_(?:w[12]_[ab]|t[12]))"
    r"|(?P<lokr>lokr_(?:w[12](?:_[ab])?|t2))"
    r"|(?P<boft>boft_[RS])"
    r"|(?P<oft>oft_(?:blocks|diag|[RSr])(?:\.weight)?)"
    r"|(?P<glora>[ab][12]\.weight)"
    r"|(?P<ia3>ia3_l|on_input)"
    r"|(?P<diff>diff(?:_b)?|set_weight)"
    r"|(?P<norm>[wb]_norm)"
    r"|(?P<adalora>lora_[ABE])"
    r"|(?P<vera>vera_(?:lambda_[bd]|[AB]))"
    r"|(?P<vblora>vblora_(?:logits_[AB]|vector_bank|.*))"
    r"|(?P<fourierft>fourierft_spectrum)"
    r"|(?P<c3a>c3a_kernel)"
    r"|(?P<hra>hra_u)"
    r"|(?P<bone>bone_block)"
    r"|(?P<miss>miss_block)"
    r"|(?P<shira>shira_(?:weight|indices))"
    r"|(?P<road>road_(?:theta|alpha))"
    r"|(?P<randlora>randlora_(?:lambda|gamma|[AB]))"
    r"|(?P<tokens>trainable_tokens_delta)"
    r"|(?P<prompt>prompt_embeddings|prompt_encoder\..*)"
    r")(?:\.default)?$"
)
_WEIGHT = re.compile(r"(?P<path>.+)\.(?:weight|bias)$")


@dataclass
class RawModule:
    """The tensors of one module: `parts` maps "A", "B", "alpha", "hada_w1_a", ... to a key, `shapes` to a shape."""

    path: str
    method: str
    parts: dict[str, str] = field(default_factory=dict)
    shapes: dict[str, Shape] = field(default_factory=dict)
    embedding: bool = False

    @property
    def size(self) -> tuple[int | None, int | None]:
        """(out, in) of delta W, kernels left out of `in`; None for what the tensors do not tell."""
        get = self.shapes.get
        if self.method in ("lora", "adalora"):
            A, B = (
                get("A") or get("lora_A"),
                get("B") or get("lora_B"),
            )
            return _at(B, 0), _at(A, 1)
        if self.method == "loha":
            out, in_ = _at(get("hada_w1_a"), 0), _at(get("hada_w1_b"), 1)
            if "hada_t1" in self.shapes:  # a Tucker core: w1_a is (rank, out)
                out = _at(get("hada_w1_a"), 1)
            return out, in_
        if self.method == "lokr":
            first = get("lokr_w1") or _product(get("lokr_w1_a"), get("lokr_w1_b"))
            second = get("lokr_w2") or _product(get("lokr_w2_a"), get("lokr_w2_b"))
            if first and second and len(first) > 1 and len(second) > 1:
                if "lokr_t2" in self.shapes:  # w2_a is (rank, out) beside a Tucker core
                    a, b = get("lokr_w2_a"), get("lokr_w2_b")
                    second = (_at(a, 1) or 0, _at(b, 1) or 0)
                return first[0] * second[0], first[1] * second[1]
            return None, None
        if self.method == "full" or self.method == "diff":
            weight = get("weight") or get("diff")
            return (_at(weight, 0), _at(weight, 1)) if weight and len(weight) > 1 else (None, None)
        return None, None

    @property
    def rank(self) -> int | None:
        """The rank that the tensors' shapes say; None where the method has none."""
        get = self.shapes.get
        if self.method in ("lora", "adalora"):
            return _at(get("A") or get("lora_A"), 0)
        if self.method == "loha":
            return _at(get("hada_w1_b"), 0)
        if self.method == "lokr":
            return _at(get("lokr_w2_b"), 0) or _at(get("lokr_w1_b"), 0)
        return None

    @property
    def numbers_as_lora(self) -> int | None:
        """Elements of the LoRA that a LoHa or LoKr module is exactly (rank r1 r2); None for other methods."""
        out, in_ = self.size
        get = self.shapes.get
        if out is None or in_ is None or self.method not in ("loha", "lokr"):
            return None
        ranks = 1
        for i in "12":
            core = get(f"hada_t{i}") or get(f"lokr_t{i}")
            if self.method == "loha":
                ranks *= _at(core, 0) or _at(get(f"hada_w{i}_b"), 0) or 1
            else:
                whole = get(f"lokr_w{i}")
                ranks *= min(whole[0], prod(whole[1:])) if whole else _at(get(f"lokr_w{i}_b"), 0) or 1
        kernels = [s[2:] for s in self.shapes.values() if len(s) > 2]
        return ranks * (out + in_ * max(map(prod, kernels), default=1))

    @property
    def numbers(self) -> int:
        """Elements of all its tensors."""
        return sum(prod(s) for s in self.shapes.values())


def modules_of(shapes: Mapping[str, Shape]) -> dict[str, RawModule]:
    """Path as in the file -> its tensors. A module whose tensors are of two methods is listed under the first
    that is not full weights; keys that nothing explains are modules of method "unknown", one each."""
    found: dict[str, RawModule] = {}
    for key, shape in shapes.items():
        path, method, part, embedding = _parse(key)
        module = found.get(path)
        if module is None:
            module = found[path] = RawModule(path, method)
        elif module.method in ("", "full", "norm") or (
            module.method == "lora" and method not in ("", "full")
        ):
            module.method = method or module.method
        module.parts[part], module.shapes[part] = key, tuple(shape)
        module.embedding |= embedding
    for module in found.values():
        module.method = module.method or "unknown"
    return found


def _parse(key: str) -> tuple[str, str, str, bool]:
    """(path, method, part, embedding); method "" for a part that every method has, as an alpha."""
    parsed = keys.parse(key)
    if parsed is not None:
        shared = parsed.part in ("alpha", "magnitude")
        return parsed.path, "" if shared else "lora", parsed.part, parsed.embedding
    match = _SUFFIXES.match(key)
    if match:
        method = match.lastgroup or "unknown"
        return match["path"], method, match[method], False
    if key.endswith(".scalar"):
        return key.removesuffix(".scalar"), "", "scalar", False
    weight = _WEIGHT.match(key)
    if weight:
        return weight["path"], "full", key.rpartition(".")[2], False
    return key, "unknown", "tensor", False


def _at(shape: Shape | None, i: int) -> int | None:
    return shape[i] if shape is not None and len(shape) > i else None


def _product(a: Shape | None, b: Shape | None) -> Shape | None:
    if a is None or b is None or len(a) < 2 or len(b) < 2:
        return None
    return a[0], *b[1:]
