"""Sources in, LoRAs of a language model out: the same equivariant parts as `lolgen.generator`, another condition.

A condition is how much of each source is asked for. `Template` gives the balanced latent of a condition at any rank,
`Decoder` its factor pairs. The template starts as the regression of the zoo's LoRAs, each at unit |delta W|, and moves
on by the loss of the base on the texts that are asked for (`train.speeches_train`).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolgen import gl
from lolgen.errors import LolgenError
from lolgen.language.texts import SOURCES
from lolgen.lora import Batch, LoRA
from lolgen.nn import Decoder, Encoder, Latent, Template


def conditions(shares: Tensor) -> Tensor:
    """Shares of the sources (N, sources) -> conditions (N, sources + 2): the template's constant, and no strength."""
    one, none = torch.ones(len(shares), 1), torch.zeros(len(shares), 1)
    return torch.cat([shares.float(), one, none], 1)


def shares_of(request: Mapping[str, float]) -> Tensor:
    """(sources,): the request's weights, which sum to 1 after this; LolgenError for an unknown source or no weight."""
    unknown = [s for s in request if s not in SOURCES]
    if unknown:
        raise LolgenError(f"unknown source {unknown[0]!r}; valid sources: {', '.join(SOURCES)}")
    w = torch.tensor([float(request.get(s, 0.0)) for s in SOURCES])
    if bool((w < 0).any()) or not float(w.sum()) > 0 or not bool(w.isfinite().all()):
        raise LolgenError(f"sources: found weights {dict(request)}, wanted positive ones")
    return w / w.sum()


@dataclass
class Speaker:
    """The parts of the speeches generator; `settings`: gain, what delta W is multiplied by (tuned on validation)."""

    encoder: Encoder
    decoder: Decoder
    template: Template
    settings: dict[str, Any]

    @staticmethod
    def from_pretrained(folder: str | Path) -> Speaker:
        """A folder with `encoder`, `decoder`, `template` and `settings.json`; LolgenError when it is none."""
        folder = Path(folder)
        if not (folder / "settings.json").is_file():
            raise LolgenError(f"{folder}: found no settings.json, wanted the folder of a generator")
        return Speaker(
            Encoder.from_pretrained(folder / "encoder"),
            Decoder.from_pretrained(folder / "decoder"),
            Template.from_pretrained(folder / "template", dtype=torch.float32),
            json.loads((folder / "settings.json").read_text("utf-8")),
        )

    def save_pretrained(self, folder: str | Path) -> Path:
        from lolgen.io import atomic

        folder = Path(folder)
        self.encoder.save_pretrained(folder / "encoder")
        self.decoder.save_pretrained(folder / "decoder")
        self.template.save_pretrained(folder / "template")
        atomic.write_file(folder / "settings.json", (json.dumps(self.settings, indent=1) + "\n").encode())
        return folder

    @torch.no_grad()
    def batch(self, shares: Tensor, rank: int, gain: float | None = None) -> Batch:
        """Factor pairs for shares (N, sources), canonical, delta W times `gain`. LolgenError: rank out of 1 to 64."""
        if not 1 <= rank <= 64:
            raise LolgenError(f"rank: found {rank}, wanted 1 to 64")
        g = self.settings["gain"] if gain is None else gain
        latent = self.template(conditions(shares), min(rank, self.template.config.d))
        return gl.canonical_batch(self.decoder(Latent(latent.U * g, latent.V, latent.ranks)))

    def generate(self, requests: Sequence[Mapping[str, float]], rank: int = 4) -> list[LoRA]:
        """A LoRA for every request, source -> weight; the same request and rank give the same LoRA."""
        loras = self.batch(torch.stack([shares_of(r) for r in requests]), rank).unstack()
        small = min(rank, self.template.config.d)
        return loras if rank == small else [gl.resize(x, rank) for x in loras]
