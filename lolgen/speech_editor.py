"""Edits of language LoRAs that exist: a source added to what one has learned, or removed from it.

As in `lolgen.editor`: the template is linear in the shares of the sources, so every source is a direction in the space
of latent products, and `Coordinates` reads how much of each a LoRA has, in units of the generator's direction. Removing
a source moves its coordinate through zero by a factor of what is read, to a depth: some of what training left of it
lies off the template, and the base hears the sum. Adding one makes room (`kept` of the LoRA stays) and moves along the
source's direction and along what all sources share. The result has the LoRA's ranks and gauge: an edit of a re-gauged
LoRA is the re-gauged edit.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from lolgen.errors import LolgenError
from lolgen.framing import moved
from lolgen.language.texts import SOURCES
from lolgen.lora import Batch
from lolgen.nn import Block, Coordinates, Decoder, Encoder, Latent
from lolgen.speaker import Speaker

NAMES = tuple(SOURCES)
FILE = "editor.json"


@dataclass(frozen=True)
class Amounts:
    """How far an edit of strength 1 goes, tuned on validation text (`train.speeches_edit_tune`)."""

    kept: float = 1.0
    """Of the LoRA, for every source added."""
    reach: float = 1.0
    """Along the direction of a source added, in units of the generator's."""
    common: float = 0.0
    """Along what all sources share, for every source added."""
    removed: float = 1.0
    """Times what is read of a source removed."""
    deepest: float = 0.0
    """How far below zero the coordinate of a source removed may end: further, and the base itself is forgotten."""


@dataclass
class SpeechEditor:
    """A speaker and the amounts of its edits."""

    speaker: Speaker
    amounts: Amounts

    def __post_init__(self) -> None:
        self.coordinates = Coordinates(self.speaker.template, (Block(0, len(NAMES)),), (None,))
        # An edit is exact to the gauge's condition in float64 only, and the maps are small.
        self._encoder: Encoder = deepcopy(self.speaker.encoder).double()
        self._decoder: Decoder = deepcopy(self.speaker.decoder).double()

    @staticmethod
    def from_pretrained(folder: str | Path) -> SpeechEditor:
        """A folder of `Speaker` with `editor.json`; LolgenError when it is none."""
        folder = Path(folder)
        if not (folder / FILE).is_file():
            raise LolgenError(f"{folder}: found no {FILE}, wanted the folder of an editor of speeches")
        return SpeechEditor(
            Speaker.from_pretrained(folder), Amounts(**json.loads((folder / FILE).read_text("utf-8")))
        )

    def save_amounts(self, folder: str | Path) -> Path:
        """Write `editor.json` into the folder of the speaker."""
        from lolgen.io import atomic

        path = Path(folder) / FILE
        atomic.write_file(path, (json.dumps(asdict(self.amounts), indent=1) + "\n").encode())
        return path

    @torch.no_grad()
    def read(self, batch: Batch) -> Tensor:
        """How much of every source N LoRAs have, (N, sources), in units of the generator's direction: an adapter it
        makes of one source at rank 4 has about .8. GL-invariant. SpecError when they are of another base."""
        latent = self._encoder.encode(batch.to(torch.float64))
        products = latent.U @ latent.V.mT / self.speaker.settings["gain"]
        return self.coordinates.read(products, torch.zeros(len(batch), dtype=torch.long))[1]

    def kept(self, count: Tensor, strength: float = 1.0) -> Tensor:
        """The share of its own delta W that a LoRA keeps where so many sources are added, the shape of `count`."""
        return (1 - strength * (1 - self.amounts.kept**count)).clamp(min=0)

    @torch.no_grad()
    def edit(
        self,
        batch: Batch,
        add: Sequence[Sequence[str]],
        remove: Sequence[Sequence[str]],
        *,
        strength: float = 1.0,
        rank: int | None = None,
    ) -> Batch:
        """N LoRAs, the sources to add to and to remove from each -> the edited ones at their ranks and in their gauges
        (balanced at another `rank`), float64.

        `strength` 0 gives back delta W, 1 is the whole edit, more exaggerates. LolgenError for an unknown source, one
        to be both added and removed, a strength out of 0 to 2 or a rank out of 1 to 64.
        """
        if not 0 <= strength <= 2:
            raise LolgenError(f"strength: found {strength:g}, wanted 0 to 2")
        if rank is not None and not 1 <= rank <= 64:
            raise LolgenError(f"rank: found {rank}, wanted 1 to 64")
        wanted, unwanted = _marks(add), _marks(remove)
        if bool((wanted * unwanted).any()):
            both = NAMES[int((wanted * unwanted).sum(0).argmax())]
            raise LolgenError(f"{both} is to be both added and removed; ask for one")
        batch, own = batch.to(torch.float64), self.amounts
        count = wanted.sum(1)
        # What an addition leaves no room for is gone already.
        has = self.read(batch) * self.kept(count)[:, None]
        # Several at once come to what one after the other does, in parts alike.
        order = torch.arange(len(NAMES))
        turns = (own.kept**order * (order < count[:, None])).sum(1)
        added = (turns / count.clamp(min=1))[:, None] * own.reach * wanted
        removed = torch.minimum(own.removed * has, has + own.deepest).clamp(min=0) * unwanted
        word = torch.zeros(len(batch), dtype=torch.long)
        change = self.coordinates.products(own.common * turns, added - removed, word)
        products = strength * self.speaker.settings["gain"] * change
        step = self._decoder(Latent.of_products(products))
        ranks = None if rank is None else torch.full_like(batch.ranks, rank)
        return moved(batch, step, kept=self.kept(count, strength), ranks=ranks)


def _marks(sources: Sequence[Sequence[str]]) -> Tensor:
    """(N, sources): 1 where named. LolgenError for an unknown name."""
    found = torch.zeros(len(sources), len(NAMES), dtype=torch.float64)
    for row, names in zip(found, sources, strict=True):
        for name in names:
            if name not in SOURCES:
                raise LolgenError(f"unknown source {name!r}; valid sources: {', '.join(NAMES)}")
            row[NAMES.index(name)] = 1
    return found
