"""What a file made here says of itself."""

from __future__ import annotations

from collections.abc import Mapping

from lolgen import pictures
from lolgen.lora import LoRA


def words(request: Mapping[str, str]) -> str:
    return " ".join(f"{n}={v}" for n, v in request.items()) or "anything"


def seen(attributes: Mapping[str, str]) -> dict[str, str]:
    """The attributes that a picture shows."""
    return {n: v for n, v in attributes.items() if pictures.visible(attributes, n)}


def sign(lora: LoRA, **facts: object) -> None:
    """Say in the file's metadata how it was made."""
    lora.metadata.update({f"lolgen.{k}": str(v) for k, v in facts.items()})
