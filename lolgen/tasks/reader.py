"""What a model that reads labels off LoRAs is, and how all of them are scored and calibrated.

A model is a function `fit(train, y, validation, y_val, classes, seed) -> Reader`. Labels are either classes
(`Classes`: y (N, attributes) long, -1 where an attribute cannot be seen) or numbers (`Numbers`: y (N, targets) float,
NaN where unknown); both are a `Layout`, which is all that a model knows of its task. What has no label counts in no
loss and no figure.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lolgen.errors import ShapeError
from lolgen.lora import Batch

Config = dict[str, float]
"""What was chosen on validation, by name."""
T = TypeVar("T")


@dataclass(frozen=True)
class Classes:
    """Attribute -> number of classes, and where each attribute's scores lie among the C columns."""

    counts: dict[str, int]

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> int:
        """C, the columns of a tensor of scores."""
        return sum(self.counts.values())

    @cached_property
    def slices(self) -> list[slice]:
        found, start = [], 0
        for count in self.counts.values():
            found.append(slice(start, start + count))
            start += count
        return found

    def check(self, batch: Batch, y: Tensor) -> Tensor:
        """`y` as long; ShapeError when it is not (N, attributes) with values from -1 to classes - 1."""
        if y.shape != (len(batch), len(self)):
            raise ShapeError(f"labels: found {tuple(y.shape)}, wanted {(len(batch), len(self))}")
        y = y.long()
        high = torch.tensor(list(self.counts.values()))
        if y.numel() and bool(((y < -1) | (y >= high)).any()):
            raise ShapeError(f"labels: wanted -1 (not visible) or a class below {high.tolist()}")
        return y

    def targets(self, y: Tensor) -> Tensor:
        """(N, C) of 0 and 1, one-hot per attribute; all zeros where the label is -1."""
        out = torch.zeros(len(y), self.total)
        for k, part in enumerate(self.slices):
            seen = y[:, k] >= 0
            out[seen.nonzero()[:, 0], part.start + y[seen, k]] = 1
        return out

    def seen(self, y: Tensor) -> Tensor:
        """(N, C) bool: the columns of attributes that have a label."""
        widths = torch.tensor(list(self.counts.values()))
        return (y >= 0).repeat_interleave(widths, dim=1)

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        """Cross-entropy per visible label, averaged over attributes; attributes without one count as zero."""
        total = scores.new_zeros(())
        for k, part in enumerate(self.slices):
            seen = (y[:, k] >= 0).sum().clamp(min=1)
            total = total + cross_entropy(scores[:, part], y[:, k], ignore_index=-1, reduction="sum") / seen
        return total / max(1, len(self))

    def read(self, scores: Tensor) -> Tensor:
        """Best class per attribute, (N, attributes) long."""
        return torch.stack([scores[:, part].argmax(1) for part in self.slices], dim=1)

    def log_probabilities(self, scores: Tensor, temperature: Tensor) -> Tensor:
        """(N, C): log softmax of scores / temperature (attributes,), each attribute on its own."""
        parts = [(scores[:, p] / t).log_softmax(1) for p, t in zip(self.slices, temperature, strict=True)]
        return torch.cat(parts, dim=1)

    def nll(self, scores: Tensor, y: Tensor, inverse: Tensor) -> Tensor:
        """Mean -log p of the visible labels at each inverse temperature (T,): (attributes, T), NaN without labels.

        Of n labels a share of 1 / (n + 2) is spread over all classes (Platt 1999): on a split that is read without
        a mistake the best temperature would otherwise be 0, and the first mistake after it infinitely bad.
        """
        found = []
        for k, part in enumerate(self.slices):
            seen = y[:, k] >= 0
            spread = 1 / (float(seen.sum()) + 2)
            log_p = (scores[seen, part][:, None] * inverse[:, None]).log_softmax(-1)  # (n, T, classes)
            label = y[seen, k][:, None, None].expand(-1, len(inverse), 1)
            picked = (1 - spread) * log_p.gather(-1, label)[..., 0] + spread * log_p.mean(-1)
            found.append(-picked.mean(0))
        return torch.stack(found)

    def calibrate(self, scores: Tensor, y: Tensor) -> Tensor:
        """The temperature of each attribute (attributes,) with the least -log p on held-out labels (Guo et al. 2017);
        1 for an attribute without labels."""
        nll = self.nll(scores, y, _INVERSE).nan_to_num(torch.inf)
        found = 1 / _INVERSE[nll.argmin(1)]
        return torch.where((y >= 0).any(0), found, torch.ones_like(found))

    def score(self, scores: Tensor, y: Tensor) -> float:
        """What models are chosen by, smaller is better: calibrated -log p, averaged over attributes with labels.

        Finer than accuracy, which moves in steps of one LoRA, and blind to the scale of the scores.
        """
        best = self.nll(scores, y, _INVERSE).amin(1)
        best = best[~best.isnan()]
        return float(best.mean()) if len(best) else 0.0


@dataclass(frozen=True)
class Numbers:
    """Targets that are numbers, one column of scores each; models see them standardised.

    `counts`: name -> 1. `mean`, `std` (targets,): of the training labels.
    """

    counts: dict[str, int]
    mean: Tensor
    std: Tensor

    @staticmethod
    def of(names: Sequence[str], y: Tensor) -> Numbers:
        """The layout of training labels y (N, targets), NaN where unknown; a constant target has std 1."""
        mean = y.nanmean(0)
        std = (y - mean).square().nanmean(0).sqrt()
        return Numbers(dict.fromkeys(names, 1), mean, torch.where(std > 0, std, torch.ones_like(std)))

    def __len__(self) -> int:
        return len(self.counts)

    @property
    def total(self) -> int:
        """C, the columns of a tensor of scores."""
        return len(self.counts)

    @property
    def slices(self) -> list[slice]:
        return [slice(k, k + 1) for k in range(len(self))]

    def check(self, batch: Batch, y: Tensor) -> Tensor:
        """`y` standardised, float32; ShapeError when it is not (N, targets)."""
        if y.shape != (len(batch), len(self)):
            raise ShapeError(f"labels: found {tuple(y.shape)}, wanted {(len(batch), len(self))}")
        return ((y - self.mean) / self.std).float()

    def targets(self, y: Tensor) -> Tensor:
        """(N, C), zero where unknown."""
        return y.nan_to_num(0.0)

    def seen(self, y: Tensor) -> Tensor:
        """(N, C) bool."""
        return ~y.isnan()

    def loss(self, scores: Tensor, y: Tensor) -> Tensor:
        """Mean squared error over the known labels."""
        known = ~y.isnan()
        error = torch.where(known, scores - y.nan_to_num(0.0), torch.zeros_like(scores))
        return error.square().sum() / known.sum().clamp(min=1)

    def calibrate(self, scores: Tensor, y: Tensor) -> Tensor:
        """(targets,): root mean square of the error on held-out labels, the sd of the prediction; 1 without labels."""
        found = (scores - y).square().nanmean(0).sqrt()
        return found.nan_to_num(1.0)

    def score(self, scores: Tensor, y: Tensor) -> float:
        """What models are chosen by, smaller is better: mean squared error of standardised labels."""
        return float(self.loss(scores, y))


Layout = Classes | Numbers


def layout_of(classes: Mapping[str, int] | Layout) -> Layout:
    """The layout itself, or that of name -> number of classes."""
    return classes if isinstance(classes, Classes | Numbers) else Classes(dict(classes))


_INVERSE = torch.logspace(-2, 3, 76)
"""Inverse temperatures tried; neighbours differ by 17 %, which costs no measurable -log p."""


@dataclass(frozen=True)
class Budget:
    """The same for every model: `configurations` tried on validation, and the share of the epochs that a net gets."""

    configurations: int = 4
    epochs: float = 1.0


FULL, QUICK = Budget(), Budget(configurations=1, epochs=0.2)


@dataclass
class Reader:
    """A fitted model. `scores(batch)` (N, C) are its raw scores; `config` is what it chose on validation.

    `temperature` (attributes,): what `Layout.calibrate` found on validation.
    """

    classes: Layout
    scores: Callable[[Batch], Tensor]
    temperature: Tensor
    config: Config = field(default_factory=dict)

    @torch.no_grad()
    def predict(self, batch: Batch) -> dict[str, Tensor]:
        """Attribute -> probabilities (N, classes), calibrated on the validation split; of a number mean and standard
        deviation (N, 2) in its own units. Worked out in float32."""
        batch = batch if batch.dtype == torch.float32 else batch.to(torch.float32)
        if isinstance(self.classes, Numbers):
            mean = self.scores(batch) * self.classes.std + self.classes.mean
            sd = (self.temperature * self.classes.std).expand_as(mean)
            return {n: torch.stack([mean[:, k], sd[:, k]], 1) for k, n in enumerate(self.classes.counts)}
        log_p = self.classes.log_probabilities(self.scores(batch), self.temperature)
        return {
            name: log_p[:, part].exp()
            for name, part in zip(self.classes.counts, self.classes.slices, strict=True)
        }


class Fit(Protocol):
    """Train on (train, y), choose on (validation, y_val): `config` if it is given, else the best of the budget's.

    Batches are float32, on the CPU. The same arguments give the same reader, and no random generator is touched.
    """

    def __call__(
        self,
        train: Batch,
        y: Tensor,
        validation: Batch,
        y_val: Tensor,
        classes: Mapping[str, int] | Layout,
        seed: int = 0,
        *,
        config: Config | None = None,
        budget: Budget = FULL,
    ) -> Reader: ...


def choose(
    configurations: list[Config],
    fit_one: Callable[[Config], tuple[T, float]],
    config: Config | None,
    budget: Budget,
) -> tuple[T, Config]:
    """The model of the given configuration, or of the one with the least `Classes.score` on validation."""
    tried = configurations[: budget.configurations] if config is None else [config]
    best: tuple[T, Config] | None = None
    least = float("inf")
    for candidate in tried:
        model, score = fit_one(candidate)
        if best is None or score < least:
            best, least = (model, candidate), score
    assert best is not None
    return best
