"""What lolgen's reader sees of a LoRA: what its modules answer to a few inputs, and how large it is.

Answers. For module m and input directions P_m (in, p): `U_m (V_m^T P_m)`, invariant under GL(rank), (out + in) r p
flops, delta W never formed. Where the base is at hand, P_m of a module that reads text are the states behind each rare
word, and only the word that the LoRA answers most is kept, so that LoRAs of all words share what is learned. Other
modules are asked along the leading directions that the training LoRAs use. Answers are brought to unit length.

Sizes, in three tiers of symmetry: invariant under GL(rank) the singular values; under O(rank) alone the spectra of
`U^T U` and `V^T V`; under signed permutations alone the statistics of the entries of U and V, on which Adam leaves its
learning rate. What was learned is in delta W; how it was learned is in the factors as training left them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from lolgen import gl
from lolgen.lora import Batch, Group

TIERS = ("GL(rank)", "O(rank)", "signed permutations")
"""The symmetry under which the sizes of each tier are invariant, largest group first."""
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
LIMIT = 4.0
"""Standardised sizes are cut here: a LoRA of another rank must not send a kernel to zero."""


def modules(batch: Batch) -> list[tuple[int, Group, int]]:
    """(position in the spec, its group, place in the group) of every module, in the spec's order."""
    found = [(m, group, j) for group in batch.groups for j, m in enumerate(group.index)]
    return sorted(found, key=lambda entry: entry[0])


@dataclass
class Ears:
    """Where to listen: `P[m]` (in, p) for a module that hears no text, (words, p, in) for one that does."""

    P: list[Tensor]

    @staticmethod
    def of(train: Batch, directions: Tensor | None = None, most: int = 6) -> Ears:
        """`directions` (words, tokens, in): text states; modules of that input width called `attn2.to_k` or `to_v`
        hear them. The others listen along the `most` leading inputs of the training LoRAs, in the mean of
        V U^T U V^T over LoRAs of unit size."""
        P: list[Tensor] = []
        for m, group, j in modules(train):
            spec = train.spec[m]
            text = spec.name.endswith(("attn2.to_k", "attn2.to_v"))
            if directions is not None and text and spec.in_flat == directions.shape[-1]:
                P.append(directions.float())
                continue
            P.append(_leading(group.U[:, j].float(), group.V[:, j].float(), most))
        return Ears(P)

    def answers(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Answers (N, F), the part of the modules that hear text and the part of the others each of unit length (or
        zero); and how loud each word is answered, log of the mean square (N, words * p) less its mean over them."""
        heard, felt = [], []
        for m, group, j in modules(batch):
            U, V, P = group.U[:, j].float(), group.V[:, j].float(), self.P[m]
            if P.ndim == 3:
                heard.append(torch.einsum("nor,nir,wti->nwot", U, V, P))
            else:
                felt.append((U @ (V.mT @ P)).flatten(1))
        parts, loud = [], torch.zeros(len(batch), 0)
        if heard:
            y = torch.cat(heard, 2)  # (N, words, outs, p)
            energy = y.square().sum(2)
            loud = _log(energy).flatten(1)
            loud = loud - loud.mean(1, keepdim=True)
            parts.append(y[torch.arange(len(y)), energy.sum(2).argmax(1)].flatten(1))
        if felt:
            parts.append(torch.cat(felt, 1))
        return torch.cat([torch.nn.functional.normalize(p, dim=1, eps=1e-20) for p in parts], 1), loud


def _leading(U: Tensor, V: Tensor, most: int) -> Tensor:
    """(in, p), the leading eigenvectors of the sum over LoRAs of V (U^T U) V^T / |delta W|^2 = L L^T, each weighted by
    the fourth root of its share of the largest eigenvalue. U (N, out, r), V (N, in, r)."""
    G = U.mT @ U
    size = (G * (V.mT @ V)).sum((1, 2)).clamp(min=1e-30)
    values, vectors = torch.linalg.eigh((G / size[:, None, None]).double())
    root = (vectors * values.clamp(min=0).sqrt()[:, None]).float()
    L = (V @ root).permute(1, 0, 2).flatten(1)  # (in, N r)
    # Whichever side is smaller is decomposed: a module of 12,288 inputs must not cost a cube of them.
    wide = L.shape[0] > L.shape[1]
    values, vectors = torch.linalg.eigh((L.T @ L if wide else L @ L.T).double())
    values, vectors = values.flip(0)[:most].clamp(min=0), vectors.flip(1)[:, :most]
    if wide:
        vectors = L.double() @ vectors / values.sqrt().clamp(min=1e-150)
    return (vectors * (values / values[0].clamp(min=1e-300)) ** 0.25).float()


def sizes(batch: Batch, rank: int, tier: int, least: int = 0) -> Tensor:
    """Logarithms of the sizes of all tiers up to `tier`, (N, S): spectra are cut or padded to `rank`.

    Of a module whose rank is below `least` the values past its rank are NaN, unknown: a reader that never saw such a
    rank would take them for extremely small ones.
    """
    spectrum = gl.spectrum_batch(batch)
    past = torch.arange(rank) >= batch.ranks[..., None]  # (N, M, rank)
    unknown = torch.where(past & (batch.ranks < least)[..., None], torch.nan, 0.0)
    parts = [(_log(_to(spectrum, rank)) + unknown).flatten(1), _log(spectrum.square().sum(2))]
    for m, group, j in modules(batch):
        U, V = group.U[:, j].float(), group.V[:, j].float()
        if tier >= 1:
            left, right = U.mT @ U, V.mT @ V
            for G in (left, right):
                values = torch.linalg.eigvalsh(G).flip(-1).clamp(min=0)
                parts.append(_log(_to(values, rank)) + unknown[:, m])
            parts.append(_log(torch.stack([(G * G).sum((1, 2)) for G in (left, right)], 1)))
        if tier >= 2:
            for X in (U, V):
                # Zero columns are padding of a batch that mixes ranks: quantiles are over the rest.
                entries = X.abs().flatten(1)
                found = torch.where(entries > 0, entries, torch.nan).nanquantile(
                    torch.tensor(QUANTILES), dim=1
                )
                moments = torch.stack([X.square().mean((1, 2)), X.pow(4).mean((1, 2)).sqrt()], 1)
                parts += [_log(found.mT.nan_to_num(0.0)), _log(moments), _log(entries.amax(1, keepdim=True))]
    return torch.cat(parts, 1)


def _to(s: Tensor, rank: int) -> Tensor:
    return torch.nn.functional.pad(s[..., :rank], (0, max(0, rank - s.shape[-1])))


def _log(x: Tensor) -> Tensor:
    return (x.float() + 1e-8).log()


@dataclass
class Traits:
    """Batch -> the two blocks that kernels and nets read, both (N, .) with rows of mean square about 1 in total.

    `rank` and `least`: the largest and the smallest rank trained on. `into` (F, k), `centre` (k,): answers to principal
    components. `mean`, `std` (S,): of the sizes; what is unknown counts as the mean.
    """

    ears: Ears
    rank: int
    least: int
    tier: int
    into: Tensor
    centre: Tensor
    mean: Tensor
    std: Tensor

    @staticmethod
    def fit(train: Batch, tier: int, directions: Tensor | None = None, most: int = 256) -> Traits:
        """The first `most` components, exact, by the Gram trick."""
        ears = Ears.of(train, directions)
        x, loud = ears.answers(train)
        x_mean = x.mean(0)
        centred = x - x_mean
        values, vectors = torch.linalg.eigh((centred @ centred.T).double())
        values, vectors = values.flip(0), vectors.flip(1)
        keep = max(1, min(most, int((values > 1e-7 * values[0].clamp(min=1e-300)).sum())))
        into = centred.T @ (vectors[:, :keep] / values[:keep].clamp(min=1e-30).sqrt()).float()
        into = into / (values.clamp(min=0).sum() / len(x)).sqrt().clamp(min=1e-20).float()
        s = torch.cat([sizes(train, train.rank, tier), loud], 1)
        std = s.std(0)
        least = int(train.ranks.min())
        return Traits(
            ears, train.rank, least, tier, into, x_mean @ into, s.mean(0), torch.where(std > 1e-4, std, 1.0)
        )

    def __call__(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(answers (N, k), sizes (N, S))."""
        x, loud = self.ears.answers(batch)
        a = x @ self.into - self.centre
        s = torch.cat([sizes(batch, self.rank, self.tier, self.least), loud], 1)
        s = ((s - self.mean) / self.std).clamp(-LIMIT, LIMIT).nan_to_num(0.0)
        return a, s / s.shape[1] ** 0.5
