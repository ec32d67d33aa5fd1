"""The figures of `lolgen eval paper`, each a PNG as bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from lolgen.tasks.paper.ranks import RANKS
from lolgen.tasks.paper.table import MAIN

OURS, OTHER = "#c8102e", "#8a94a6"
TITLES = {
    "clip_score": "CLIP score, Kendall tau", "clip_score_mse": "CLIP score, MSE (lower is better)",
    "attributes": "portrait attributes", "styles": "style membership", "dataset_size": "dataset size",
    "recipe": "recipe: lr, steps, prompt", "recipe_rank": "recipe: rank",
    "cross_model_same_base": "new identities, same base", "cross_model_second_base": "new identities, second base",
    "speech_sources": "language: 19 sources", "speech_loss": "language: loss, Kendall tau",
    "speech_loss_mse": "language: loss, MSE", "speech_accuracy": "language: accuracy, Kendall tau",
    "speech_accuracy_mse": "language: accuracy, MSE", "speech_recipe": "language: lr, epochs, batch",
    "poisoned": "poisoned, AUROC", "poisoned_trigger": "poisoned, new trigger", "poisoned_payload":
    "poisoned, new payload", "poisoned_rank": "poisoned, new rank",
}  # fmt: skip
LINES = {
    "ours": OURS, "glnet": "#1f77b4", "glnet_transformer": "#17becf", "kernel": "#2ca02c", "gp": "#9467bd",
    "dense": "#ff7f0e", "w2t": "#8c564b", "o_align": "#e377c2", "svd": "#7f7f7f",
}  # fmt: skip
"""Models of the curves and their colours: all fifteen would hide one another."""


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _png(figure: Any) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    _pyplot().close(figure)
    return buffer.getvalue()


def bars(rows: Mapping[str, Any]) -> bytes:
    """One panel a main row, bars with the standard deviation over seeds, ours in red."""
    plt = _pyplot()
    shown = [r for r in MAIN if r in rows]
    columns = 3
    height = -(-len(shown) // columns)
    figure, axes = plt.subplots(
        height, columns, figsize=(12, 3.1 * height), layout="constrained", squeeze=False
    )
    for axis, row in zip(axes.flat, shown, strict=False):
        models = rows[row]["models"]
        names = list(models)[::-1]
        values = [models[n]["mean"] for n in names]
        axis.barh(
            names, values, xerr=[models[n]["std"] for n in names], capsize=2,
            color=[OURS if n == "ours" else OTHER for n in names],
        )  # fmt: skip
        axis.set_title(TITLES.get(row, row), fontsize=10)
        axis.tick_params(labelsize=7)
        axis.set_xlim(left=min(0.0, *values))
        axis.spines[["top", "right"]].set_visible(False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    return _png(figure)


def _curve(axis: Any, xs: list[float], entries: list[Mapping[str, Any]]) -> None:
    for name, color in LINES.items():
        if not all(name in e["models"] for e in entries):
            continue
        found = [e["models"][name] for e in entries]
        axis.errorbar(
            xs, [m["mean"] for m in found], [m["std"] for m in found], label=name, capsize=2,
            color=color, marker="o", markersize=3,
            linewidth=2.4 if name == "ours" else 1.1, zorder=5 if name == "ours" else 2,
        )  # fmt: skip
    axis.set_xscale("log")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def ranks(rows: Mapping[str, Any]) -> bytes | None:
    """Metric and loss of what was fitted at rank 4, over the rank that is read; None without such rows."""
    wanted = [
        ("attributes@rank", "attributes: accuracy"), ("attributes_loss@rank", "attributes: cross-entropy"),
        ("clip_score@rank", "CLIP score: Kendall tau"), ("clip_score_mse@rank", "CLIP score: MSE"),
    ]  # fmt: skip
    shown = [(p, t) for p, t in wanted if all(f"{p}{r}" in rows for r in RANKS)]
    if not shown:
        return None
    plt = _pyplot()
    figure, axes = plt.subplots(
        1, len(shown), figsize=(3.6 * len(shown), 3.4), layout="constrained", squeeze=False
    )
    for axis, (prefix, title) in zip(axes.flat, shown, strict=True):
        _curve(axis, [float(r) for r in RANKS], [rows[f"{prefix}{r}"] for r in RANKS])
        axis.set_xscale("log", base=2)
        axis.set_xticks(RANKS, [str(r) for r in RANKS])
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("rank of the LoRAs read (fitted at 4)", fontsize=8)
        if "loss" in prefix:
            axis.set_yscale("log")
    figure.legend(*axes.flat[0].get_legend_handles_labels(), fontsize=8, loc="outside right center")
    return _png(figure)


def samples(rows: Mapping[str, Any], everything: int) -> bytes | None:
    """Style membership over the number of training LoRAs; `everything` is that of the whole train split."""
    sizes = sorted(int(r.split("@")[1]) for r in rows if r.startswith("styles@"))
    if not sizes:
        return None
    figure, axis = _pyplot().subplots(figsize=(6.4, 4), layout="constrained")
    _curve(
        axis, [*map(float, sizes), float(everything)], [*(rows[f"styles@{n}"] for n in sizes), rows["styles"]]
    )
    axis.set_xlabel("training LoRAs")
    axis.set_ylabel("style membership, accuracy over ten bits")
    axis.legend(fontsize=8)
    return _png(figure)


def calibration(results: Mapping[str, Any]) -> bytes:
    """Reliability of ours and of GL-net on every task of classes (first seed)."""
    plt = _pyplot()
    shown = [k.split("/")[0] for k in results if k.endswith("/all/ours")]
    shown = [n for n in shown if "reliability" in _first(results[f"{n}/all/ours"])]
    columns = min(4, max(1, len(shown)))
    lines = max(1, -(-len(shown) // columns))
    figure, axes = plt.subplots(
        lines, columns, figsize=(3 * columns, 3.2 * lines), layout="constrained", squeeze=False
    )
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    for axis, name in zip(axes.flat, shown, strict=False):
        axis.plot([0, 1], [0, 1], color="#ccc", linewidth=1)
        for model, color in (("glnet", OTHER), ("ours", OURS)):
            if f"{name}/all/{model}" not in results:
                continue
            found = _first(results[f"{name}/all/{model}"])
            table = [b for b in found["reliability"] if b[0] >= 10]
            axis.plot(
                [b[1] for b in table], [b[2] for b in table], marker="o", markersize=4, color=color,
                label=f"{model}, ECE {found['ece']:.3f}",
            )  # fmt: skip
        axis.set_title(name, fontsize=10)
        axis.set_xlabel("confidence", fontsize=8)
        axis.legend(fontsize=7, loc="upper left")
        axis.spines[["top", "right"]].set_visible(False)
    axes.flat[0].set_ylabel("share right", fontsize=8)
    return _png(figure)


def _first(result: Mapping[str, Any]) -> dict[str, Any]:
    tests: dict[str, dict[str, Any]] = result["fits"][0]["tests"]
    return next(iter(tests.values()))
