"""Attributes in, LoRAs out: an O(rank)-equivariant flow on balanced latents, then an equivariant decoder.

`Encoder` and `Decoder` are left maps per module; between them a LoRA is a small balanced pair per module, on which
only rotations of the rank are left. `Template` gives the mean latent of a condition; `VelocityField` carries that
mean plus Gaussian noise to latents as the zoo has them, seeing the template beside the moving latent: both turn
together, so the flow is equivariant and starts close to where it has to end.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolgen import flow, gl, pictures
from lolgen.conditions import complete, conditions, sample_parts
from lolgen.errors import LolgenError
from lolgen.lora import Batch, LoRA
from lolgen.nn import Decoder, Encoder, Latent, Template, VelocityField

RANK = 4
"""The rank that the flow was trained at; lower ranks are its best truncation, higher ones hold it in more columns."""


def beside(net: Callable[..., Tensor], mean: Tensor, c: Tensor, ranks: Tensor) -> flow.solver.Velocity:
    """The velocity of x (N, M, D, r) that a field on rows [x; template] gives."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return net(torch.cat([x, mean], 2), t, c, ranks)[:, :, : x.shape[2]]

    return velocity


@dataclass
class Generator:
    """The parts of one zoo's generator; `settings`: marginals, strength, noise, residual, gain, steps."""

    encoder: Encoder
    decoder: Decoder
    template: Template
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
            Template.from_pretrained(folder / "template", dtype=torch.float32),
            VelocityField.from_pretrained(folder / "field"),
            json.loads((folder / "settings.json").read_text("utf-8")),
        )

    def save_pretrained(self, folder: str | Path) -> Path:
        import json

        from lolgen.io import atomic

        folder = Path(folder)
        self.encoder.save_pretrained(folder / "encoder")
        self.decoder.save_pretrained(folder / "decoder")
        self.template.save_pretrained(folder / "template")
        self.field.save_pretrained(folder / "field")
        atomic.write_file(folder / "settings.json", (json.dumps(self.settings, indent=1) + "\n").encode())
        return folder

    def start(self, c: Tensor) -> Tensor:
        """The template of conditions c (N, C) as the field sees latents, (N, M, D, RANK): normalised, balanced."""
        latent = self.template(c, RANK)
        return latent.joined() / self.template_scale()

    def template_scale(self) -> Tensor:
        """(M, D, 1): the size of each row of the training set's latents, which the field sees as 1."""
        D = 2 * self.template.config.d
        return (self.field.energy[:, :D] / RANK).sqrt()[..., None]

    def latents(
        self,
        c: Tensor,
        generator: torch.Generator,
        *,
        steps: int | None = None,
        residual: float | None = None,
    ) -> Latent:
        """One latent of rank 4 per row of conditions c (N, C).

        `residual` scales what the flow adds to the template: 1 is a LoRA as the zoo has them, with all the
        accidents of its training; less is a cleaner one.
        """
        s = self.settings
        d, M = self.template.config.d, len(self.field.spec)
        ranks = torch.full((len(c), M), RANK)
        mean = self.start(c)
        noise = flow.gaussian(len(c), M, 2 * d, RANK, generator=generator)
        velocity = beside(self.field, mean, c, ranks)
        x = flow.solve(velocity, mean + s["noise"] * noise, steps=steps or s["steps"], method="midpoint")
        x = mean + (s["residual"] if residual is None else residual) * (x - mean)
        return Latent.split(x * self.template_scale(), d, ranks)

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
        marginals = [torch.tensor(p) for p in self.settings["marginals"]]
        full, loras = [], []
        for request, seed in zip(requests, seeds, strict=True):
            g = torch.Generator().manual_seed(int(seed))
            attributes = complete(pictures.check_attributes(request), marginals, g)
            loras.append(self.person(attributes, sample_parts(g), g, rank=rank, subject=subject, **options))
            full.append(attributes)
        return loras, full

    @torch.no_grad()
    def person(
        self,
        attributes: Mapping[str, str],
        parts: Sequence[int],
        generator: torch.Generator,
        *,
        rank: int = RANK,
        subject: str = pictures.SUBJECTS[0],
        gain: float | None = None,
        **options: Any,
    ) -> LoRA:
        """A LoRA of somebody with all these attributes and drawings (in the order of `conditions.PARTS`)."""
        if subject not in pictures.SUBJECTS:
            raise LolgenError(f"unknown subject {subject!r}; valid subjects: {', '.join(pictures.SUBJECTS)}")
        if not 1 <= rank <= 64:
            raise LolgenError(f"rank: found {rank}, wanted 1 to 64")
        c = conditions(
            torch.tensor([pictures.labels(attributes)]),
            torch.tensor([list(parts)]),
            torch.tensor([pictures.SUBJECTS.index(subject)]),
            torch.tensor([self.settings["strength"]]),
        )
        batch = gl.canonical_batch(self.decode(self.latents(c, generator, **options), gain))
        lora = (gl.truncate_batch(batch, rank) if rank < RANK else batch).unstack()[0]
        return gl.resize(lora, rank) if rank > RANK else lora
