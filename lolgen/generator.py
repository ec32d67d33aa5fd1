"""Attributes in, LoRAs out: an O(rank)-equivariant flow on balanced latents, then an equivariant decoder.

`Encoder` and `Decoder` are left maps per module; between them a LoRA is a small balanced pair per module, on which
only rotations of the rank are left. `VelocityField` carries Gaussian noise to such pairs under a condition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolgen import flow, gl, pictures
from lolgen.conditions import complete, conditions
from lolgen.errors import LolgenError
from lolgen.lora import Batch, LoRA
from lolgen.nn import Decoder, Encoder, Latent, VelocityField

RANK = 4
"""The rank that the flow was trained at; lower ranks are its best truncation, higher ones hold it in more columns."""


@dataclass
class Generator:
    """Encoder, decoder and field of one zoo, and `settings`: marginals, strength, guidance, gain, steps."""

    encoder: Encoder
    decoder: Decoder
    field: VelocityField
    settings: dict[str, Any]

    @staticmethod
    def from_pretrained(folder: str | Path) -> Generator:
        """A folder with `encoder`, `decoder`, `field` and `settings.json`."""
        import json

        folder = Path(folder)
        if not (folder / "settings.json").is_file():
            raise LolgenError(f"{folder}: found no settings.json, wanted the folder of a generator")
        return Generator(
            Encoder.from_pretrained(folder / "encoder"),
            Decoder.from_pretrained(folder / "decoder"),
            VelocityField.from_pretrained(folder / "field"),
            json.loads((folder / "settings.json").read_text("utf-8")),
        )

    def save_pretrained(self, folder: str | Path) -> Path:
        import json

        from lolgen.io import atomic

        folder = Path(folder)
        self.encoder.save_pretrained(folder / "encoder")
        self.decoder.save_pretrained(folder / "decoder")
        self.field.save_pretrained(folder / "field")
        atomic.write_file(folder / "settings.json", (json.dumps(self.settings, indent=1) + "\n").encode())
        return folder

    def latents(
        self,
        c: Tensor,
        generator: torch.Generator,
        *,
        guidance: float | None = None,
        steps: int | None = None,
        temperature: float | None = None,
    ) -> Latent:
        """One latent of rank 4 per row of conditions c (N, C)."""
        s = self.settings
        config, M = self.field.config, len(self.field.spec)
        ranks = torch.full((len(c), M), RANK)
        x = flow.gaussian(len(c), M, config.D, RANK, generator=generator)
        x = x * (s["temperature"] if temperature is None else temperature)
        null = torch.zeros_like(c)
        start = sum(len(v) for v in pictures.ATTRIBUTES.values())
        null[:, start:] = c[:, start:]  # the subject and the strength are no wish to be guided towards
        w = s["guidance"] if guidance is None else guidance
        velocity = flow.guided(self.field, c, w, null=null, ranks=ranks)
        x = flow.solve(velocity, x, steps=steps or s["steps"], method="midpoint")
        return Latent.split(self.field.denormalise(x, ranks), config.d_u, ranks)

    def decode(self, latent: Latent, gain: float | None = None) -> Batch:
        """Factor pairs of the spec's own sizes, delta W times `gain` (tuned on validation)."""
        g = self.settings["gain"] if gain is None else gain
        return self.decoder(Latent(latent.U * g, latent.V, latent.ranks))

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Mapping[str, str]],
        seeds: Sequence[int],
        *,
        rank: int = RANK,
        subject: str = pictures.SUBJECTS[0],
        **options: Any,
    ) -> tuple[list[LoRA], list[dict[str, str]]]:
        """A LoRA for every request with its seed, and the full attributes of each (what was left open is drawn).

        The same request, seed and rank give the same LoRA, whatever else is in the call.
        """
        if subject not in pictures.SUBJECTS:
            raise LolgenError(f"unknown subject {subject!r}; valid subjects: {', '.join(pictures.SUBJECTS)}")
        if not 1 <= rank <= 64:
            raise LolgenError(f"rank: found {rank}, wanted 1 to 64")
        marginals = [torch.tensor(p) for p in self.settings["marginals"]]
        full, loras = [], []
        for request, seed in zip(requests, seeds, strict=True):
            g = torch.Generator().manual_seed(int(seed))
            attributes = complete(pictures.check_attributes(request), marginals, g)
            labels = torch.tensor([pictures.labels(attributes)])
            c = conditions(
                labels,
                torch.tensor([pictures.SUBJECTS.index(subject)]),
                torch.tensor([self.settings["strength"]]),
            )
            gain = options.get("gain")
            rest = {k: v for k, v in options.items() if k != "gain"}
            batch = gl.canonical_batch(self.decode(self.latents(c, g, **rest), gain))
            lora = (gl.truncate_batch(batch, rank) if rank < RANK else batch).unstack()[0]
            loras.append(gl.resize(lora, rank) if rank > RANK else lora)
            full.append(attributes)
        return loras, full
