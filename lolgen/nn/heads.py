"""Predictor heads: the invariant vector -> logits for every attribute."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from lolgen.errors import AttributeValueError
from lolgen.lora import Spec
from lolgen.nn.pretrained import Pretrained


@dataclass(frozen=True)
class HeadsConfig:
    attributes: Mapping[str, tuple[str, ...]]
    """Attribute -> its values, two or more, in the order of the logits."""
    features: int = 256
    """F, the length of the invariant vector."""
    hidden: int = 256
    dropout: float = 0.1

    def __post_init__(self) -> None:
        object.__setattr__(self, "attributes", {k: tuple(v) for k, v in self.attributes.items()})
        for name, values in self.attributes.items():
            if len(values) < 2 or len(set(values)) < len(values):
                raise AttributeValueError(
                    f"attribute {name!r}: found values {list(values)}, wanted two or more, none twice"
                )


class Heads(Pretrained):
    """Invariant vector (N, F) -> {attribute: logits (N, values)}: norm, dropout, a linear part and an MLP.

    `temperature` (one per attribute, 1 until `calibrate`) divides the logits in `probabilities` alone.
    """

    Config = HeadsConfig
    config: HeadsConfig

    temperature: Tensor

    def __init__(self, spec: Spec, config: HeadsConfig) -> None:
        super().__init__(spec, config)
        self.counts = [len(v) for v in config.attributes.values()]
        total = sum(self.counts)
        self.norm = nn.LayerNorm(config.features)
        self.linear = nn.Sequential(nn.Dropout(config.dropout), nn.Linear(config.features, total))
        self.mlp = nn.Sequential(
            nn.Dropout(config.dropout),
            nn.Linear(config.features, config.hidden),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(config.hidden, total),
        )
        self.register_buffer("temperature", torch.ones(len(self.counts)))

    @property
    def attributes(self) -> Mapping[str, tuple[str, ...]]:
        return self.config.attributes

    def forward(self, features: Tensor) -> dict[str, Tensor]:
        x = self.norm(features)
        logits = (self.linear(x) + self.mlp(x)).split(self.counts, dim=-1)
        return dict(zip(self.attributes, logits, strict=True))

    def probabilities(self, features: Tensor) -> dict[str, Tensor]:
        """{attribute: calibrated probabilities (N, values)}."""
        logits = self(features)
        return {k: (v / t).softmax(-1) for (k, v), t in zip(logits.items(), self.temperature, strict=True)}

    def log_likelihood(self, features: Tensor, wanted: Mapping[str, str]) -> Tensor:
        """(N,) log probability of the wanted values, of some attributes or all; gradients flow: a guide.

        AttributeValueError for an attribute or value that the heads do not know.
        """
        logits = self(features)
        total = features.new_zeros(len(features))
        for name, value in wanted.items():
            if name not in self.attributes:
                raise AttributeValueError(
                    f"no attribute {name!r}: the heads know {', '.join(self.attributes)}"
                )
            values = self.attributes[name]
            if value not in values:
                raise AttributeValueError(
                    f"attribute {name!r} has no value {value!r}: it is one of {', '.join(values)}"
                )
            t = self.temperature[list(self.attributes).index(name)]
            total = total + (logits[name] / t).log_softmax(-1)[:, values.index(value)]
        return total

    def loss(self, features: Tensor, labels: Mapping[str, Tensor]) -> Tensor:
        """Mean cross entropy over the attributes; labels (N,) long, negative where not known."""
        losses = [
            cross_entropy(z[labels[k] >= 0], labels[k][labels[k] >= 0])
            for k, z in self(features).items()
            if k in labels and (labels[k] >= 0).any()
        ]
        return torch.stack(losses).mean() if losses else features.sum() * 0

    @torch.no_grad()
    def calibrate(self, features: Tensor, labels: Mapping[str, Tensor]) -> None:
        """Fit each attribute's temperature on held-out data (arXiv 1706.04599), labels as in `loss`.

        Cross entropy is convex in 1 / temperature: a ternary search finds its minimum between 1/20 and 20.
        """
        for i, (name, z) in enumerate(self(features).items()):
            known = labels[name] >= 0
            if not known.any():
                continue
            z, y = z[known].double(), labels[name][known]
            low, high = 0.05, 20.0
            for _ in range(80):
                a, b = low + (high - low) / 3, high - (high - low) / 3
                if cross_entropy(z * a, y) < cross_entropy(z * b, y):
                    high = b
                else:
                    low = a
            self.temperature[i] = 2 / (low + high)
