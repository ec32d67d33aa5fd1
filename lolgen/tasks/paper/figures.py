"""The figures of one fit: accuracy, Kendall's tau, losses, calibration, coverage."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from lolgen.lora import Batch
from lolgen.tasks.reader import Layout, Numbers, Reader

BINS = 15


def kendall_tau(x: Tensor, y: Tensor) -> float:
    """Kendall's tau-b of two vectors (n,): concordant less discordant pairs over the geometric mean of untied ones."""
    a, b = (np.sign(v.double().numpy()[:, None] - v.double().numpy()[None]) for v in (x, y))
    size = float(np.sqrt((a * a).sum() * (b * b).sum()))
    return float((a * b).sum()) / size if size else 0.0


def auroc(score: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: the share of pairs of a positive and a negative in which the positive scores higher,
    ties half (Mann-Whitney); NaN when one of them is missing."""
    gap = score[positive][:, None].double() - score[~positive][None].double()
    return float(((gap > 0).double() + 0.5 * (gap == 0).double()).mean()) if gap.numel() else float("nan")


def reliability(confidence: Tensor, right: Tensor, bins: int = BINS) -> list[list[float]]:
    """[count, mean confidence, share right] of every bin of equal width that is not empty."""
    place = (confidence * bins).long().clamp(max=bins - 1)
    found = []
    for b in range(bins):
        inside = place == b
        if bool(inside.any()):
            found.append(
                [float(inside.sum()), float(confidence[inside].mean()), float(right[inside].float().mean())]
            )
    return found


def calibration_error(table: list[list[float]]) -> float:
    """Expected calibration error of a `reliability` table (Guo et al., arXiv 1706.04599)."""
    total = sum(n for n, *_ in table)
    return sum(n * abs(c - r) for n, c, r in table) / total if total else 0.0


def figures(reader: Reader, batch: Batch, y: Tensor) -> dict[str, Any]:
    """`metric` (mean), `each` (by label), `loss`; of classes `ece`, `reliability`, of two classes
    `auroc` (mean); of numbers `mse`, `coverage`."""
    layout = reader.classes
    predicted = reader.predict(batch)
    if isinstance(layout, Numbers):
        return _of_numbers(reader, layout, batch, y, predicted)
    each, losses, confident, right, areas = {}, [], [], [], []
    for k, (name, p) in enumerate(predicted.items()):
        seen = y[:, k] >= 0
        if not bool(seen.any()):
            continue
        best = p[seen].max(1)
        hit = best.indices == y[seen, k]
        each[name] = float(hit.float().mean())
        losses.append(float(-p[seen, y[seen, k]].clamp(min=1e-7).log().mean()))
        if p.shape[1] == 2 and bool((y[seen, k] == 0).any()) and bool((y[seen, k] == 1).any()):
            areas.append(auroc(p[seen, 1], y[seen, k] == 1))
        confident.append(best.values)
        right.append(hit)
    table = reliability(torch.cat(confident), torch.cat(right))
    return {
        "metric": sum(each.values()) / len(each), "each": each, "loss": sum(losses) / len(losses),
        "ece": calibration_error(table), "reliability": table,
        **({"auroc": sum(areas) / len(areas)} if areas else {}),
    }  # fmt: skip


def _of_numbers(
    reader: Reader, layout: Numbers, batch: Batch, y: Tensor, predicted: dict[str, Tensor]
) -> dict[str, Any]:
    mean = torch.stack([p[:, 0] for p in predicted.values()], 1)
    sd = torch.stack([p[:, 1] for p in predicted.values()], 1)
    taus = {n: kendall_tau(mean[:, k], y[:, k]) for k, n in enumerate(layout.counts)}
    standard = ((mean - y) / layout.std).square().mean()
    interval = getattr(reader, "interval", None)
    if interval is not None:
        bounds = torch.stack(list(interval(batch).values()), 1)
        inside = (bounds[..., 0] <= y) & (y <= bounds[..., 1])
    else:
        inside = (mean - y).abs() <= 1.96 * sd
    return {
        "metric": sum(taus.values()) / len(taus), "each": taus, "loss": float(standard), "mse": float(standard),
        "coverage": float(inside.float().mean()),
    }  # fmt: skip


def layout_rows(layout: Layout) -> list[str]:
    """Names of the labels."""
    return list(layout.counts)
