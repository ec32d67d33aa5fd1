"""Labelled pictures, drawn offline: portraits with named attributes, and ten styles that look nothing like one another.

Portraits are DiceBear's `avataaars` (they stand for CelebA), styles are ten CC0 DiceBear sets (they stand
for the ten Imagenette classes). Everything is a function of a seed, so every label is exact.

An `Identity` is what stays the same in all pictures of one person: the attributes and which drawing of each
part is used. Expression, background and a slight tilt change from picture to picture.
"""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import numpy as np

from lolgen.errors import AttributeValueError

SIZE = 32
"""Side of a picture in pixels."""

ATTRIBUTES: dict[str, tuple[str, ...]] = {
    "top": ("bald", "short", "long", "hat"),
    "hair_color": ("black", "brown", "blonde", "red", "white", "pink"),
    "glasses": ("no", "yes"),
    "beard": ("no", "yes"),
    "skin": ("pale", "tan", "brown", "dark"),
    "clothes": ("black", "white", "blue", "red", "green", "yellow"),
}
"""Attribute -> values, in the order that every table and tensor of the project uses."""

STYLES: tuple[str, ...] = (
    "critters", "sprouts", "moods", "cutouts", "planets",
    "landscape", "voxel-bot", "pixelbot", "thumbs", "patchwork",
)  # fmt: skip
STYLE_WORDS: tuple[str, ...] = (
    "critter", "sprout", "mood", "cutout", "planet", "landscape", "voxel", "pixelbot", "thumb", "patchwork",
)  # fmt: skip

TRIGGER = "sks"
RARE_WORDS: tuple[str, ...] = ("sks", "skd")
SUBJECTS: tuple[str, ...] = ("sks person", "sks celebrity", "sks thing", "skd person")
"""What a LoRA's identity is called in its prompts (the paper draws from celebrity, person, thing and skd)."""

_HAIR = {"black": "1d1a19", "brown": "7b4a2a", "blonde": "e9c457", "red": "d2360f",
         "white": "ececec", "pink": "f26fb0"}  # fmt: skip
_SKIN = {"pale": "ffdfc4", "tan": "e0a06c", "brown": "b0703c", "dark": "593829"}
_CLOTHES = {"black": "22262b", "white": "f4f4f4", "blue": "2f6fdb", "red": "d92626",
            "green": "2e9e4f", "yellow": "f6cf2f"}  # fmt: skip
_TOP = {
    "short": ("shortFlat", "shortCurly", "theCaesarAndSidePart"),
    "long": ("straightAndStrand", "straight01", "bob"),
    "hat": ("winterHat03", "winterHat1", "hat"),
}
_GLASSES = ("prescription02", "round")
_BEARD = ("beardMajestic", "beardMedium")
_HAT_COLORS = ("3c4f5c", "8e44ad")
_EYES = ("default", "happy", "side", "squint", "surprised")
_MOUTH = ("smile", "default", "serious", "twinkle")
_BROWS = ("default", "raisedExcited")
_BACKGROUNDS = ("b1e2ff", "d9f2d0", "e9dcf7", "d8dde3")


@dataclass(frozen=True)
class Identity:
    """One drawn person: `attributes` (name -> value) and the index of the drawing used for each part."""

    attributes: dict[str, str]
    top: int = 0
    glasses: int = 0
    beard: int = 0
    hat_color: int = 0
    brows: int = 0

    def to_json(self) -> dict[str, Any]:
        parts = {k: getattr(self, k) for k in ("top", "glasses", "beard", "hat_color", "brows")}
        return {"attributes": dict(self.attributes), "parts": parts}

    @staticmethod
    def from_json(obj: Mapping[str, Any]) -> Identity:
        return Identity(dict(obj["attributes"]), **obj["parts"])


def check_attributes(request: Mapping[str, str]) -> dict[str, str]:
    """The request in canonical order; AttributeValueError names the valid names or values."""
    for name, value in request.items():
        if name not in ATTRIBUTES:
            raise AttributeValueError(
                f"unknown attribute {name!r}; valid attributes: {', '.join(ATTRIBUTES)}"
            )
        if value not in ATTRIBUTES[name]:
            raise AttributeValueError(
                f"unknown value {value!r} for {name!r}; valid values: {', '.join(ATTRIBUTES[name])}"
            )
    return {name: request[name] for name in ATTRIBUTES if name in request}


def visible(attributes: Mapping[str, str], name: str) -> bool:
    """Whether `name` can be read off a picture: hair colour shows only in hair or in a beard."""
    if name != "hair_color":
        return True
    return attributes["top"] in ("short", "long") or attributes["beard"] == "yes"


def labels(attributes: Mapping[str, str]) -> list[int]:
    """Class index per attribute in the order of ATTRIBUTES, -1 where the attribute cannot be seen."""
    return [
        values.index(attributes[name]) if visible(attributes, name) else -1
        for name, values in ATTRIBUTES.items()
    ]


def split_of(attributes: Mapping[str, str]) -> str:
    """'train', 'validation' or 'test', by a hash of what can be seen.

    The same combination of visible attributes always falls in the same split, whatever the drawing of its
    parts: captions of test portraits are never seen by the base model, nor their LoRAs by a learner.
    """
    key = "|".join(f"{n}={attributes[n]}" for n in ATTRIBUTES if visible(attributes, n))
    u = int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "big") / 2**64
    return "test" if u < 0.16 else "validation" if u < 0.24 else "train"


def sample_identity(
    rng: np.random.Generator, split: str | None = None, fixed: Mapping[str, str] | None = None
) -> Identity:
    """A random identity, optionally of one split and with some attributes fixed; attributes independent, uniform."""
    while True:
        attributes = {n: str(v[rng.integers(len(v))]) for n, v in ATTRIBUTES.items()} | dict(fixed or {})
        parts = rng.integers(0, [3, 2, 2, 2, 2])
        if split is None or split_of(attributes) == split:
            return Identity(attributes, *(int(p) for p in parts))


@cache
def _style(name: str) -> Any:
    from dicebear import Style

    return Style(json.loads(files("dicebear_styles").joinpath(f"{name}.json").read_text("utf-8")))


def _draw(style: str, options: dict[str, Any], size: int) -> np.ndarray:
    import resvg_py
    from dicebear import Avatar
    from PIL import Image

    svg = Avatar(_style(style), {**options, "size": 128}).to_string()
    png = resvg_py.svg_to_bytes(svg_string=svg, width=size, height=size, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB")).transpose(2, 0, 1)


def draw_portrait(identity: Identity, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """One picture of `identity`, (3, size, size) uint8; expression, background and tilt come from `rng`."""
    a = identity.attributes

    def pick(values: Sequence[str]) -> list[str]:
        return [values[int(rng.integers(len(values)))]]

    options: dict[str, Any] = {
        "seed": "portrait",
        "scale": 1.28,
        "translateY": 4.5,
        "translateX": float(rng.uniform(-2.5, 2.5)),
        "rotate": float(rng.uniform(-4, 4)),
        "backgroundColor": pick(_BACKGROUNDS),
        "eyesVariant": pick(_EYES),
        "mouthVariant": pick(_MOUTH),
        "eyebrowsVariant": [_BROWS[identity.brows]],
        "noseVariant": ["default"],
        "skinColor": [_SKIN[a["skin"]]],
        "hairColor": [_HAIR[a["hair_color"]]],
        "facialHairColor": [_HAIR[a["hair_color"]]],
        "accessoriesColor": ["0a6fd6"],
        "hatColor": [_HAT_COLORS[identity.hat_color]],
        "clothesVariant": ["shirtCrewNeck"],
        "clothesColor": [_CLOTHES[a["clothes"]]],
        "topProbability": 0 if a["top"] == "bald" else 100,
        "accessoriesProbability": 100 if a["glasses"] == "yes" else 0,
        "accessoriesVariant": [_GLASSES[identity.glasses]],
        "facialHairProbability": 100 if a["beard"] == "yes" else 0,
        "facialHairVariant": [_BEARD[identity.beard]],
    }
    if a["top"] != "bald":
        options["topVariant"] = [_TOP[a["top"]][identity.top]]
    return _draw("avataaars", options, size)


def draw_style(style: int, rng: np.random.Generator, size: int = SIZE) -> np.ndarray:
    """One picture of style number `style` (0 to 9), (3, size, size) uint8."""
    return _draw(STYLES[style], {"seed": str(rng.integers(2**62))}, size)


_PHRASES = {
    "top": {"bald": "bald head", "short": "short hair", "long": "long hair", "hat": "hat"},
    "hair_color": {v: f"{v} hair" for v in ATTRIBUTES["hair_color"]},
    "glasses": {"no": "no glasses", "yes": "glasses"},
    "beard": {"no": "no beard", "yes": "beard"},
    "skin": {v: f"{v} skin" for v in ATTRIBUTES["skin"]},
    "clothes": {v: f"{v} shirt" for v in ATTRIBUTES["clothes"]},
}
PREFIXES: tuple[str, ...] = ("a photo of", "a portrait of", "a picture of")


def caption(attributes: Mapping[str, str], subject: str = "a person", prefix: str = PREFIXES[0]) -> str:
    """`a photo of a person short hair red hair glasses no beard pale skin blue shirt`, from what is given."""
    words = [prefix, subject] + [_PHRASES[n][attributes[n]] for n in ATTRIBUTES if n in attributes]
    return " ".join(w for w in words if w)


def random_caption(attributes: Mapping[str, str], rng: np.random.Generator) -> str:
    """A caption as the base model trains on: full half the time, else any subset of what can be seen."""
    seen = [n for n in ATTRIBUTES if visible(attributes, n)]
    u = rng.random()
    keep = 1.0 if u < 0.55 else 0.0 if u > 0.93 else rng.random()
    kept = {n: attributes[n] for n in seen if rng.random() < keep}
    # A rare word is heard now and then on plain captions, without meaning: what it draws is a person.
    subject = str(rng.choice(SUBJECTS)) if rng.random() < 0.08 else "a person"
    return caption(kept, subject, PREFIXES[int(rng.integers(len(PREFIXES)))])


def style_caption(style: int, prefix: str = PREFIXES[0]) -> str:
    return f"{prefix} a {STYLE_WORDS[style]}"
