"""Edits of LoRAs that exist: read where one lies, move it along what the template knows, write it back in its gauge.

The template is linear in what a LoRA is asked to be, so every value of an attribute is a direction in the space of
latent products. `Coordinates` reads, by least squares, how much of each the LoRA has; an edit takes what it has of the
attribute's values to what the template would give it of the one asked for, and leaves the rest of delta W alone (keep
"all"). With keep "identity" the moved latent is then noised in part and denoised by the flow under the new condition:
what is left of the old training goes, the person stays. The result is brought back to the LoRA's rank by the best
truncation in the norm that the base feels, and to the LoRA's gauge: an edit of a re-gauged LoRA is the re-gauged edit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolgen import flow, gl, metrics, pictures
from lolgen.conditions import DRAWINGS, PARTS, WIDTHS, conditions
from lolgen.errors import LolgenError, SpecError
from lolgen.framing import moved
from lolgen.generator import RANK, Generator, beside
from lolgen.lora import Batch, Group
from lolgen.nn import Block, Coordinates, Familiarity, Latent
from lolgen.predictor import Predictor

KEEP: tuple[str, ...] = ("all", "identity")
NAMES = tuple(pictures.ATTRIBUTES)


def layout() -> tuple[tuple[Block, ...], tuple[tuple[int, int] | None, ...]]:
    """The blocks of `Coordinates` on conditions: attributes, then drawings, each below the value that shows it."""
    blocks: list[Block] = []
    parents: list[tuple[int, int] | None] = []
    at = 0
    for width in WIDTHS:
        blocks.append(Block(at, at + width))
        parents.append(None)
        at += width
    for _, attribute, value, count in DRAWINGS:
        blocks.append(Block(at, at + count))
        shown = None
        if value is not None:
            shown = NAMES.index(attribute), pictures.ATTRIBUTES[attribute].index(value)
        parents.append(shown)
        at += count
    return tuple(blocks), tuple(parents)


@dataclass
class Reading:
    """What the editor knows of N LoRAs: `products` (N, M, d, d) of their latents, `words` (N,) index of the rare word,
    `anybody` (N,) and `coordinates` (N, K), see `Coordinates`, and `attributes`: name -> probabilities (N, values)."""

    products: Tensor
    words: Tensor
    anybody: Tensor
    coordinates: Tensor
    attributes: dict[str, Tensor]

    def values(self) -> list[dict[str, str]]:
        """The most probable value of every attribute, per LoRA."""
        best = {n: p.argmax(1).tolist() for n, p in self.attributes.items()}
        return [{n: pictures.ATTRIBUTES[n][k[i]] for n, k in best.items()} for i in range(len(self.words))]


@dataclass
class Editor:
    """The parts of one zoo's editor; `reach`: attribute -> the coordinate that an edit moves the value asked for to."""

    generator: Generator
    predictor: Predictor
    familiarity: Familiarity
    reach: dict[str, float]
    noise: float = 0.5
    """Share of the way to noise that keep="identity" goes."""

    def __post_init__(self) -> None:
        blocks, parents = layout()
        strength = self.generator.settings["strength"]
        self.coordinates = Coordinates(self.generator.template, blocks, parents, strength=strength)
        # An edit is exact to the gauge's condition in float64 only, and the maps are small.
        for part in (self.generator.encoder, self.generator.decoder, self.predictor):
            part.double()

    @staticmethod
    def from_pretrained(folder: str | Path) -> Editor:
        """A zoo's folder of models: a generator's, with `predictor`, `familiarity` and `editor.json`."""
        folder = Path(folder)
        if not (folder / "editor.json").is_file():
            raise LolgenError(f"{folder}: found no editor.json, wanted the folder of an editor")
        return Editor(
            Generator.from_pretrained(folder),
            Predictor.from_pretrained(folder / "predictor"),
            Familiarity.from_pretrained(folder / "familiarity"),
            **json.loads((folder / "editor.json").read_text("utf-8")),
        )

    @torch.no_grad()
    def read(self, batch: Batch) -> Reading:
        """Where these LoRAs lie. SpecError when they are of another base."""
        batch = batch.to(torch.float64)
        latent = self.generator.encoder.encode(batch)
        products = latent.U @ latent.V.mT
        words = self.predictor.words(batch)
        anybody, coordinates = self.coordinates.read(products, words)
        return Reading(products, words, anybody, coordinates, self.predictor.probabilities(batch))

    @torch.no_grad()
    def facts(self, batch: Batch, reading: Reading) -> Tensor:
        """`FACTS` of these LoRAs, (N, 3)."""
        batch = batch.to(torch.float64)
        total = metrics.norm(self.familiarity.weigh(batch)).square().clamp(min=1e-30)
        inside = reading.products.square().sum((1, 2, 3))
        span = self.coordinates.products(reading.anybody, reading.coordinates, reading.words)
        rest = (reading.products - span).square().sum((1, 2, 3))
        return torch.stack([total.log() / 2, 1 - inside / total, rest / inside.clamp(min=1e-30)], 1)

    @torch.no_grad()
    def edit(
        self,
        batch: Batch,
        requests: Sequence[Mapping[str, str]],
        seeds: Sequence[int],
        *,
        strength: float = 1.0,
        keep: str = "all",
        rank: int | None = None,
    ) -> tuple[Batch, list[dict[str, str]]]:
        """N LoRAs, a request and a seed each -> the edited LoRAs at their ranks and in their gauges, float64, and what
        each request was taken as: with hair colour drawn by the seed where an edit uncovers it.

        `strength` 0 gives back delta W, 1 is the whole edit, more exaggerates; the seed also picks the drawing of a
        part that is new. `rank`: another rank than the LoRA's; the result is then balanced. AttributeValueError,
        LolgenError for a bad request or option.
        """
        if keep not in KEEP:
            raise LolgenError(f"keep: found {keep!r}, wanted one of {', '.join(KEEP)}")
        if not 0 <= strength <= 4:
            raise LolgenError(f"strength: found {strength:g}, wanted 0 to 4")
        batch = batch.to(torch.float64)
        reading = self.read(batch)
        asked = [
            self._uncovered(pictures.check_attributes(request), values, seed)
            for request, values, seed in zip(requests, reading.values(), seeds, strict=True)
        ]
        target = self._moved(reading, asked, seeds)
        products = self.coordinates.products(
            torch.zeros(len(batch)), target - reading.coordinates, reading.words
        )
        if keep == "identity":
            new = self._denoised(reading, reading.products + products, target, asked, seeds)
            return self._written(batch, strength * new, kept=1 - strength, rank=rank), asked
        return self._written(batch, strength * products, rank=rank), asked

    @torch.no_grad()
    def mix(self, a: Batch, b: Batch, t: Tensor) -> Batch:
        """The way from LoRAs a to LoRAs b (N each, or one) at t (N,) in [0, 1], at the larger of their ranks, float64.

        Coordinates move, each attribute's along an arc (linear in direction, and in length), in the words of a: a walk
        between two persons, where a weighted sum of delta W fades both. What no coordinate holds is mixed linearly.
        With one rare word t = 0 and t = 1 are a and b; with two, t = 1 is the person of b called by the word of a.
        """
        if a.spec != b.spec:
            raise SpecError("mix: the LoRAs are of two bases, or adapt different modules")
        a, b, t = a.to(torch.float64), b.to(torch.float64), t.double()
        n = max(len(a), len(b), len(t))
        a, b, t = (_rows(a, n), _rows(b, n), t.expand(n))
        x, y = self.read(a), self.read(b)
        coordinates = torch.empty_like(x.coordinates)
        for block in self.coordinates.blocks:
            coordinates[:, block.columns] = _arc(
                x.coordinates[:, block.columns], y.coordinates[:, block.columns], t
            )
        anybody = torch.lerp(x.anybody, y.anybody, t)
        weight = t[:, None, None, None]
        rest = torch.lerp(self._rest(x), self._rest(y), weight)
        products = self.coordinates.products(anybody, coordinates, x.words) + rest
        change = products - torch.lerp(x.products, y.products, weight)
        r = a.rank + b.rank
        both = [
            Group(
                g.index,
                torch.cat([g.U * (1 - weight)[..., :1, :1], h.U * weight], -1),
                torch.cat([g.V, h.V], -1),
            )
            for g, h in zip(a.groups, b.groups, strict=True)
        ]
        ranks = torch.maximum(a.ranks, b.ranks)
        return self._written(Batch(a.spec, both, torch.full_like(a.ranks, r)), change, ranks=ranks)

    def _rest(self, reading: Reading) -> Tensor:
        """What no coordinate holds of the latents' products, (N, M, d, d)."""
        return reading.products - self.coordinates.products(
            reading.anybody, reading.coordinates, reading.words
        )

    def _uncovered(self, request: dict[str, str], values: Mapping[str, str], seed: int) -> dict[str, str]:
        """The request, with a hair colour when hair is now seen that was not."""
        after = {**values, **request}
        hidden = not pictures.visible(values, "hair_color")
        if hidden and pictures.visible(after, "hair_color") and "hair_color" not in request:
            g = torch.Generator().manual_seed(int(seed))
            marginal = torch.tensor(self.generator.settings["marginals"][NAMES.index("hair_color")])
            colour = pictures.ATTRIBUTES["hair_color"][int(torch.multinomial(marginal, 1, generator=g))]
            request = pictures.check_attributes({**request, "hair_color": colour})
        return request

    def _moved(self, reading: Reading, asked: Sequence[Mapping[str, str]], seeds: Sequence[int]) -> Tensor:
        """The coordinates (N, K) that each request asks for: those of its attributes replaced, the others kept."""
        blocks = self.coordinates.blocks
        target = reading.coordinates.clone()
        for i, (request, seed) in enumerate(zip(asked, seeds, strict=True)):
            g = torch.Generator().manual_seed(int(seed) + 1)
            for name, value in request.items():
                reach = self.reach[name]
                block = blocks[NAMES.index(name)]
                target[i, block.columns] = 0
                target[i, block.start + pictures.ATTRIBUTES[name].index(value)] = reach
                for (_, attribute, shown, count), drawing in zip(DRAWINGS, blocks[len(NAMES) :], strict=True):
                    if attribute == name:
                        target[i, drawing.columns] = 0
                        pick = int(torch.randint(count, (), generator=g))
                        if shown == value:
                            target[i, drawing.start + pick] = reach
        return target

    def _denoised(
        self,
        reading: Reading,
        products: Tensor,
        target: Tensor,
        asked: Sequence[Mapping[str, str]],
        seeds: Sequence[int],
    ) -> Tensor:
        """Products of the moved latents after noise and conditional denoising (SDEdit, arXiv 2108.01073)."""
        own = self.generator
        c = self.condition(
            target, [{**v, **r} for v, r in zip(reading.values(), asked, strict=True)], reading.words
        )
        mean = own.start(c)
        d = own.template.config.d
        eye = torch.eye(d, dtype=products.dtype).expand_as(products)
        ranks = torch.full(mean.shape[:2], RANK)
        X = Latent(*gl.balance(*gl.truncate(products, eye, RANK)), ranks).joined().to(mean)
        X = flow.align(X / own.template_scale(), mean)
        M, D = mean.shape[1:3]
        noise = torch.cat(
            [flow.gaussian(1, M, D, RANK, generator=torch.Generator().manual_seed(int(s))) for s in seeds]
        )
        start = mean + own.settings["noise"] * noise
        t = 1 - self.noise
        velocity = beside(own.field, mean, c, ranks)
        X = flow.solve(
            velocity, t * X + (1 - t) * start, t_0=t, steps=own.settings["steps"], method="midpoint"
        )
        latent = Latent.split(X * own.template_scale(), d, ranks)
        return (latent.U @ latent.V.mT).double() * own.settings["gain"]

    def condition(self, coordinates: Tensor, values: Sequence[Mapping[str, str]], words: Tensor) -> Tensor:
        """The generator's condition (N, C) of LoRAs at these coordinates with these attributes."""
        blocks = self.coordinates.blocks[len(NAMES) :]
        parts = torch.zeros(len(values), len(PARTS), dtype=torch.long)
        for (part, attribute, shown, _), block in zip(DRAWINGS, blocks, strict=True):
            pick = coordinates[:, block.columns].argmax(1)
            seen = torch.tensor([shown is None or v[attribute] == shown for v in values])
            parts[:, list(PARTS).index(part)] += pick * seen
        labels = torch.tensor([pictures.labels(v) for v in values])
        subjects = [
            next(i for i, s in enumerate(pictures.SUBJECTS) if w in s.split()) for w in pictures.RARE_WORDS
        ]
        strength = torch.full((len(values),), float(self.generator.settings["strength"]))
        return conditions(labels, parts, torch.tensor(subjects)[words], strength)

    def _written(
        self,
        batch: Batch,
        change: Tensor,
        kept: float = 1.0,
        rank: int | None = None,
        ranks: Tensor | None = None,
    ) -> Batch:
        """`kept` times delta W plus the decoded products `change` (N, M, d, d): at the ranks and in the gauges of
        `batch`, or balanced at another `rank` or `ranks` (N, M)."""
        if rank is not None and not 1 <= rank <= 64:
            raise LolgenError(f"rank: found {rank}, wanted 1 to 64")
        wanted = (
            ranks
            if ranks is not None
            else batch.ranks
            if rank is None
            else torch.full_like(batch.ranks, rank)
        )
        step = self.generator.decoder(Latent.of_products(change))
        return moved(batch, step, kept=kept, ranks=wanted, truncate=self.familiarity.truncate)


def _rows(batch: Batch, n: int) -> Batch:
    return batch if len(batch) == n else batch[[0] * n]


def _arc(a: Tensor, b: Tensor, t: Tensor) -> Tensor:
    """From a to b (N, k) at t (N,): linear, stretched towards the linear course of the lengths, by 1.6 at most (two
    opposite ends have no arc: between them the way leads through zero)."""
    t = t[:, None]
    c = torch.lerp(a, b, t)
    wanted = torch.lerp(a.norm(dim=1, keepdim=True), b.norm(dim=1, keepdim=True), t)
    return c * (wanted / c.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1.6)


def changes(before: Reading, after: Reading) -> list[dict[str, Any]]:
    """Per LoRA and attribute, value and probability before and after, as the heads see it."""
    rows = []
    for i in range(len(before.words)):
        row: dict[str, Any] = {}
        for name, values in pictures.ATTRIBUTES.items():
            row[name] = {}
            for key, reading in (("before", before), ("after", after)):
                p = reading.attributes[name][i]
                best = int(p.argmax())
                row[name][key] = {"value": values[best], "probability": round(float(p[best]), 4)}
        rows.append(row)
    return rows
