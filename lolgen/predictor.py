"""The attribute predictor: what the LoRA answers to its own trigger, read by a ridge and a few small networks.

For every module and a set of input directions x (the text states behind each rare word) the response `U (V^T x)` is
invariant under GL(rank), costs (out + in) r, and leaves out what the base never feels. The word with the larger
response is the one that the LoRA was trained on; reading only that response lets LoRAs of all words share what is
learned.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from lolgen.lora import Batch, LoRA, Spec
from lolgen.nn.pretrained import Pretrained


@dataclass(frozen=True)
class PredictorConfig:
    attributes: Mapping[str, tuple[str, ...]]
    words: int = 2
    """Rare words that a LoRA may have been trained on."""
    tokens: int = 6
    """Input directions per word."""
    inputs: int = 96
    """Input features of the modules (those of the text states)."""
    components: int = 128
    """Principal components of the responses that the networks see."""
    members: int = 4
    hidden: int = 256
    dropout: float = 0.3

    def __post_init__(self) -> None:
        object.__setattr__(self, "attributes", {k: tuple(v) for k, v in self.attributes.items()})


class Predictor(Pretrained):
    """Batch -> probabilities of every attribute: half ridge, half networks, each calibrated on validation."""

    Config = PredictorConfig
    config: PredictorConfig

    def __init__(self, spec: Spec, config: PredictorConfig) -> None:
        super().__init__(spec, config)
        c = config
        self.counts = [len(v) for v in c.attributes.values()]
        total = sum(self.counts)
        features = c.tokens * sum(m.out for m in spec)
        self.directions = nn.Buffer(torch.zeros(c.words, c.tokens, c.inputs))
        self.centre = nn.Buffer(torch.zeros(features))
        self.components = nn.Buffer(torch.zeros(features, c.components))
        self.ridge = nn.Linear(features, total)
        self.members = nn.ModuleList(_Member(c, total) for _ in range(c.members))
        self.temperature = nn.Buffer(torch.ones(2, len(self.counts)))

    def words(self, batch: Batch) -> Tensor:
        """(N,) index of the rare word that each LoRA answers to: the one with the larger response."""
        return self._answers(batch).square().sum(2).argmax(1)

    def responses(self, batch: Batch) -> Tensor:
        """Unit responses to the LoRA's own word, (N, tokens * sum of out); GL-invariant."""
        y = self._answers(batch)
        word = y.square().sum(2).argmax(1)
        return normalize(y[torch.arange(len(y)), word].to(self.centre.dtype), dim=1)

    def _answers(self, batch: Batch) -> Tensor:
        """Responses to every word, (N, words, tokens * sum of out)."""
        self.require(batch.spec)
        found = []
        for group in batch.groups:
            low = torch.einsum("nmir,wti->nmrwt", group.V, self.directions.to(group.V.dtype))
            found.append(torch.einsum("nmor,nmrwt->nwmot", group.U, low).flatten(2))
        return torch.cat(found, 2)  # (N, words, F)

    def logits(self, responses: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Raw scores (N, C) of the ridge, and of each member."""
        x = (responses - self.centre) @ self.components
        return self.ridge(responses), [member(x) for member in self.members]

    @torch.no_grad()
    def probabilities(self, batch: Batch) -> dict[str, Tensor]:
        """{attribute: (N, values)}, calibrated."""
        ridge, members = self.logits(self.responses(batch))
        out = {}
        parts = [ridge.split(self.counts, 1), *[m.split(self.counts, 1) for m in members]]
        for k, name in enumerate(self.config.attributes):
            soft = [(p[k] / self.temperature[int(j > 0), k]).softmax(1) for j, p in enumerate(parts)]
            out[name] = 0.5 * soft[0] + 0.5 * torch.stack(soft[1:]).mean(0)
        return out

    def read(self, loras: Sequence[LoRA]) -> list[dict[str, list[float]]]:
        """Probabilities of every attribute for every LoRA, in order."""
        if not loras:
            return []
        rows = {n: p.tolist() for n, p in self.probabilities(Batch.stack(loras)).items()}
        return [{n: rows[n][i] for n in rows} for i in range(len(loras))]

    @classmethod
    def train_on(
        cls, train: Batch, y: Tensor, held: Batch, y_held: Tensor, directions: Tensor, config: PredictorConfig,
        *, seed: int = 0, epochs: int = 60, noise: float = 0.6,
    ) -> Predictor:  # fmt: skip
        """Fit on labels y (N, attributes), -1 where not visible; the ridge's penalty and the temperatures are chosen
        on the held-out LoRAs. `directions` (words, tokens, in): the inputs to listen at."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = cls(train.spec, config)
            model.directions.copy_(directions)
            X, X_held = model.responses(train), model.responses(held)
            model._fit_ridge(X, y, X_held, y_held)
            model._fit_members(X, y, epochs, noise)
        model.eval()
        with torch.no_grad():
            ridge, members = model.logits(X_held)
            for j, scores in enumerate((ridge, torch.stack(members).mean(0))):
                model.temperature[j] = _temperatures(scores.split(model.counts, 1), y_held)
        return model

    @torch.no_grad()
    def _fit_ridge(self, X: Tensor, y: Tensor, X_held: Tensor, y_held: Tensor) -> None:
        blocks = []
        for k, n in enumerate(self.counts):
            seen = (y[:, k : k + 1] >= 0).float()
            # What cannot be seen is no evidence: its target is the mean of those that can.
            hot = nn.functional.one_hot(y[:, k].clamp(min=0), n) * seen
            blocks.append(hot + (1 - seen) * hot.sum(0) / seen.sum().clamp(min=1))
        target = torch.cat(blocks, 1).double()
        mean, K = target.mean(0), (X @ X.T).double()
        best = (float("inf"), X.new_zeros(0))
        for penalty in torch.logspace(-2, 1, 10):
            dual = torch.linalg.solve(K + penalty * torch.eye(len(K), dtype=K.dtype), target - mean)
            weight = (X.T.double() @ dual).float()
            scores = (X_held @ weight + mean.float()).split(self.counts, 1)
            t = _temperatures(scores, y_held)
            loss = sum(
                float(cross_entropy(s / t[k], y_held[:, k], ignore_index=-1))
                for k, s in enumerate(scores)
                if (y_held[:, k] >= 0).any()
            )
            if loss < best[0]:
                best = loss, weight
        self.ridge.weight.copy_(best[1].T)
        self.ridge.bias.copy_(mean.float())

    def _fit_members(self, X: Tensor, y: Tensor, epochs: int, noise: float) -> None:
        c = self.config
        with torch.no_grad():
            self.centre.copy_(X.mean(0))
            _, s, Vh = torch.linalg.svd(X - self.centre, full_matrices=False)
            k = min(c.components, len(s))
            # Half whitened: plain components drown the rare ones, fully white ones drown in noise.
            scale = (s[:k] / len(X) ** 0.5).clamp(min=1e-6).sqrt()
            self.components[:, :k] = Vh[:k].T / scale
            size = ((X - self.centre) @ self.components).std().clamp(min=1e-9)
            self.components.div_(size)
            x = (X - self.centre) @ self.components
        batch = min(128, len(x))
        steps = epochs * max(1, len(x) // batch)
        for member in self.members:
            optimizer = torch.optim.AdamW(member.parameters(), lr=2e-3, weight_decay=1e-2)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
            member.train()
            for _ in range(steps):
                i = torch.randint(len(x), (batch,))
                scores = member(x[i] + noise * torch.randn(batch, x.shape[1])).split(self.counts, 1)
                losses = [
                    cross_entropy(scores[k], y[i, k], ignore_index=-1, label_smoothing=0.05)
                    for k in range(len(scores))
                    if (y[i, k] >= 0).any()
                ]
                optimizer.zero_grad()
                torch.stack(losses).sum().backward()
                optimizer.step()
                schedule.step()
            member.eval()


class _Member(nn.Module):
    def __init__(self, config: PredictorConfig, total: int) -> None:
        super().__init__()
        k, h = config.components, config.hidden
        self.linear = nn.Linear(k, total)
        self.net = nn.Sequential(
            nn.Dropout(config.dropout / 2),
            nn.Linear(k, h),
            nn.GELU(),
            nn.Dropout(config.dropout),
            nn.Linear(h, total),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.net(x)


def _temperatures(scores: Sequence[Tensor], y: Tensor) -> Tensor:
    """The temperature per attribute with the least cross entropy (Guo et al., arXiv 1706.04599); 1 without labels."""
    grid = torch.logspace(-2.5, 1, 60)
    out = torch.ones(len(scores))
    for k, s in enumerate(scores):
        seen = y[:, k] >= 0
        if seen.any():
            losses = torch.stack([cross_entropy(s[seen] / t, y[seen, k]) for t in grid])
            out[k] = grid[losses.argmin()]
    return out
