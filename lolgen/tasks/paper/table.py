"""From results to rows: what `reports/paper.json` holds."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean, stdev
from typing import Any

import torch

from lolgen.tasks.paper.tasks import TASKS

Result = dict[str, Any]
MAIN = (
    "clip_score", "clip_score_mse", "attributes", "styles", "dataset_size", "recipe", "recipe_rank",
    "cross_model_same_base", "cross_model_second_base", "speech_sources", "speech_loss", "speech_loss_mse",
    "speech_accuracy", "speech_accuracy_mse", "speech_recipe", "poisoned", "poisoned_trigger", "poisoned_payload",
    "poisoned_rank",
)  # fmt: skip
"""Rows that stand for a task; the others are parts of them, ranks, and sample sizes."""
NUMBERS = ("mse", "loss")
METRICS = {"accuracy": "accuracy", "tau": "Kendall tau", "auroc": "area under the ROC curve"}
"""`Task.metric` -> what a row calls it."""


def rows_of(results: Mapping[str, Result]) -> dict[str, Any]:
    """ROW -> {"metric", "higher_is_better", "models": {MODEL: {"mean", "std"}}, "calibration"}; std over seeds, n - 1,
    0 for a model without randomness. `calibration` is that of ours: `ece`, or `coverage` of the 95 % interval."""
    rows: dict[str, Any] = {}
    for label, result in results.items():
        name, size, model = label.split("/")
        task = TASKS[name]
        fits = result["fits"]
        for test in fits[0]["tests"]:
            each = [f["tests"][test] for f in fits]
            row = test if size == "all" else f"{test}@{size}"
            metric = METRICS[task.metric]
            _add(
                rows,
                row,
                metric,
                True,
                model,
                [e["auroc" if task.metric == "auroc" else "metric"] for e in each],
            )
            if "mse" in each[0]:
                mse = f"{test}_mse" if "@" not in test else test.replace("@", "_mse@")
                _add(rows, mse, "mean squared error, standardised", False, model, [e["mse"] for e in each])
            elif "@rank" in test:
                _add(
                    rows,
                    test.replace("@", "_loss@"),
                    "cross-entropy",
                    False,
                    model,
                    [e["loss"] for e in each],
                )
            if task.parts and size == "all" and test == next(iter(fits[0]["tests"])):
                for part in each[0]["each"]:
                    found = [e["each"][part] for e in each]
                    _add(rows, f"{test}_{part}", metric, True, model, found)
            if model == "ours":
                kind = "ece" if "ece" in each[0] else "coverage"
                value = {kind: round(mean(e[kind] for e in each), 4)}
                if kind == "ece":
                    value["ece_if_perfect"] = round(mean(perfect(e["reliability"]) for e in each), 4)
                rows[row]["calibration"] = value
                if "mse" in each[0]:
                    rows[mse]["calibration"] = value
    return rows


def perfect(table: list[list[float]], draws: int = 400) -> float:
    """The calibration error that a reader with these confidences would show if it were perfectly calibrated: bins of
    few LoRAs miss their mean by chance. Mean over `draws` of binomial counts."""
    g = torch.Generator().manual_seed(0)
    counts = torch.tensor([row[0] for row in table])
    p = torch.tensor([row[1] for row in table]).clamp(0, 1)
    right = torch.binomial(counts.expand(draws, -1), p.expand(draws, -1), generator=g) / counts
    return float(((right - p).abs() * counts).sum(1).mean() / counts.sum())


def _add(rows: dict[str, Any], row: str, metric: str, higher: bool, model: str, values: list[float]) -> None:
    entry = rows.setdefault(row, {"metric": metric, "higher_is_better": higher, "models": {}})
    std = stdev(values) if len(values) > 1 else 0.0
    entry["models"][model] = {"mean": round(mean(values), 6), "std": round(std, 6)}


def best_baseline(entry: Mapping[str, Any]) -> tuple[str, float, float] | None:
    """(name, mean, std) of the best model that is not ours; None when there is none."""
    others = {n: m for n, m in entry["models"].items() if n != "ours"}
    if not others:
        return None
    sign = 1 if entry["higher_is_better"] else -1
    name = max(others, key=lambda n: sign * others[n]["mean"])
    return name, others[name]["mean"], others[name]["std"]


def verdict(entry: Mapping[str, Any]) -> dict[str, Any] | None:
    """How ours stands against the best baseline: `lead` (positive: ours is better), and whether it is outside one
    standard deviation, the larger of the two."""
    best = best_baseline(entry)
    if best is None or "ours" not in entry["models"]:
        return None
    ours = entry["models"]["ours"]
    lead = (ours["mean"] - best[1]) * (1 if entry["higher_is_better"] else -1)
    return {
        "best": best[0],
        "value": best[1],
        "lead": round(lead, 6),
        "outside": lead > max(ours["std"], best[2]),
    }
