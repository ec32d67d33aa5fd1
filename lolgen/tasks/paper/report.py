"""`lolgen eval paper`: run the table and write paper.json, paper.md and its figures."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lolgen.io.atomic import write_file
from lolgen.paths import zoos_dir
from lolgen.tasks.models import MODELS
from lolgen.tasks.paper import plots
from lolgen.tasks.paper.ranks import RANKS
from lolgen.tasks.paper.runner import PAPER, QUICK, SEEDS, run
from lolgen.tasks.paper.table import MAIN, rows_of, verdict
from lolgen.tasks.paper.tasks import TASKS

THEIRS = """\
The paper's own test figures (SD1.4 and other zoos; MLP, O-Align, spectra, dense, GL-net), for orientation:
CLIP score tau .226, .654, .667, .677, **.695**; five attributes .724, .872, .773, .891, **.913**; ten classes .496,
.878, .656, .889, **.904**; dataset size .209, .352, **.731**, .316, .468."""


LANGUAGE = ("speech", "poisoned")
"""How rows of the language side begin."""
POISONED = """\
Rows of `poisoned` are areas under the ROC curve, always against clean LoRAs with the same recipe: triggers and payloads
of training, a new trigger, a new payload, a new rank. These poisons are loud (the loss on plain text rises by .2 nats):
singular values alone tell them."""


def evaluate(
    zoos: str | Path | None = None,
    out: str | Path = "reports",
    *,
    models: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    quick: bool = False,
    workers: int = 2,
    base: Path | None = None,
) -> str:
    """Run what is missing, write the report, and give its Markdown."""  # fmt: skip
    zoos, out = Path(zoos or zoos_dir()), Path(out)
    results = run(zoos, out, models=models, tasks=tasks, seeds=seeds, quick=quick, workers=workers, base=base)
    rows = rows_of(results)
    report = {"command": f"lolgen eval paper{' --quick' if quick else ''}", "rows": rows}
    figures = {"paper_bars.png": plots.bars(rows), "paper_calibration.png": plots.calibration(results)}
    curve = plots.ranks(rows)
    figures |= {"paper_ranks.png": curve} if curve else {}
    count = max((r["train"] for k, r in results.items() if k.startswith("styles/all/")), default=0)
    curve = plots.samples(rows, count)
    figures |= {"paper_samples.png": curve} if curve else {}
    for name, data in figures.items():
        write_file(out / name, data)
    write_file(out / "paper.json", (json.dumps(report, indent=1) + "\n").encode())
    text = markdown(rows, results, list(figures), str(report["command"]))
    write_file(out / "paper.md", text.encode())
    return text


def evaluate_attributes(
    zoos: str | Path | None = None,
    out: str | Path = "reports",
    *,
    models: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    quick: bool = False,
    workers: int = 2,
    base: Path | None = None,
) -> str:
    """`lolgen eval predict`: the attributes alone, with a row for each; predict.json and predict.md. What `evaluate`
    has run already is not run again."""  # fmt: skip
    out = Path(out)
    results = run(
        Path(zoos or zoos_dir()), out, models=models, tasks=["attributes"], seeds=seeds, quick=quick,
        workers=workers, base=base,
    )  # fmt: skip
    names = ["attributes", *next(iter(results.values()))["fits"][0]["tests"]["attributes"]["each"]]
    every = rows_of(results)
    rows = {n: every[n if n == "attributes" else f"attributes_{n}"] for n in names}
    command = f"lolgen eval predict{' --quick' if quick else ''}"
    models_shown = [m for m in MODELS if m in rows["attributes"]["models"]]
    lines = [
        "# Reading attributes off LoRAs",
        "",
        f"`{command}`: accuracy over what is visible of the test identities of the faces zoo, `attributes` the mean. "
        "No combination of visible attributes is in two splits. All tasks: [paper.md](paper.md).",
        "",
        *_table(rows, names, models_shown),
    ]
    write_file(out / "predict.json", (json.dumps({"rows": rows}, indent=1) + "\n").encode())
    write_file(out / "predict.md", ("\n".join(lines) + "\n").encode())
    return "\n".join(lines)


def markdown(rows: Mapping[str, Any], results: Mapping[str, Any], figures: list[str], command: str) -> str:
    """The page, its tables with models down and rows across."""
    names = [m for m in MODELS if any(m in e["models"] for e in rows.values())]
    seeds = max(len(r["fits"]) for r in results.values())
    tried = (QUICK if "--quick" in command else PAPER).configurations
    lines = [
        "# Every prediction task of the paper",
        "",
        f"Written by `{command}` from the shipped zoos: `paper.json`, this page and the figures. Every model is tuned "
        f"alike: {tried} configuration{'s' if tried > 1 else ''}, chosen on the validation split with the first seed; "
        "mean and "
        f"standard deviation over {seeds} seed{'s' if seeds > 1 else ''}, one fit where nothing is random. Splits are "
        "disjoint by identity (faces) and by subset (styles).",
        "",
        *_sizes(results),
        "",
        *_table(rows, [r for r in MAIN if r in rows and not r.startswith(LANGUAGE)], names),
        "",
        *_verdicts(rows),
        "",
        THEIRS,
        "",
    ]
    shown = [r for r in MAIN if r in rows and r.startswith(LANGUAGE)]
    if shown:
        lines += ["## The language side", "", POISONED, "", *_table(rows, shown, names), ""]
    lines += _section(figures, "paper_bars.png", "Main rows", command)
    lines += _section(figures, "paper_ranks.png", "Ranks never seen in training", command)
    for prefix in ("attributes@rank", "attributes_loss@rank", "clip_score@rank", "clip_score_mse@rank"):
        shown = [f"{prefix}{r}" for r in RANKS if f"{prefix}{r}" in rows]
        lines += [*_table(rows, shown, names), ""] if shown else []
    lines += _section(figures, "paper_samples.png", "Sample efficiency", command)
    shown = sorted((r for r in rows if r.startswith("styles@")), key=lambda r: int(r.split("@")[1]))
    lines += [*_table(rows, [*shown, "styles"], names), ""] if shown else []
    lines += _section(figures, "paper_calibration.png", "Calibration", command)
    lines += [*_calibration(rows), ""]
    parts = [
        r
        for r in rows
        if r.startswith(("attributes_", "recipe_", "speech_recipe_")) and "loss" not in r and r not in MAIN
    ]
    lines += ["## Parts", "", *_table(rows, parts, names), ""] if parts else []
    lines += ["## Chosen on validation, and seconds a fit on one core", ""]
    lines += _configurations(results, names)
    return "\n".join(lines) + "\n"


def _sizes(results: Mapping[str, Any]) -> list[str]:
    found = []
    for name, task in TASKS.items():
        result = next((r for k, r in results.items() if k.startswith(f"{name}/all/")), None)
        if result:
            found.append(
                f"- {task.title}: {result['train']} LoRAs to train on, {result['validation']} to choose on."
            )
    return found


def _table(rows: Mapping[str, Any], shown: list[str], names: list[str]) -> list[str]:
    lines = [
        "| model | " + " | ".join(r.replace("_", " ") for r in shown) + " |",
        "| --- |" + " --- |" * len(shown),
    ]
    for name in names:
        cells = []
        for row in shown:
            models = rows[row]["models"]
            if name not in models:
                cells.append("")
                continue
            pick = max if rows[row]["higher_is_better"] else min
            m, best = models[name], pick(x["mean"] for x in models.values())
            text = f"{m['mean']:.3f}" + (f" ± {m['std']:.3f}" if m["std"] else "")
            cells.append(f"**{text}**" if m["mean"] == best else text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return lines


def _verdicts(rows: Mapping[str, Any]) -> list[str]:
    lines = ["| row | ours | best baseline | lead | outside one sd |", "| --- | --- | --- | --- | --- |"]
    for row in (r for r in MAIN if r in rows):
        v = verdict(rows[row])
        if v is not None:
            ours = rows[row]["models"]["ours"]["mean"]
            lines.append(
                f"| {row.replace('_', ' ')} | {ours:.3f} | {v['best']} {v['value']:.3f} | {v['lead']:+.4f} | "
                f"{'yes' if v['outside'] else 'no'} |"
            )
    return lines


def _calibration(rows: Mapping[str, Any]) -> list[str]:
    lines = [
        "Top-class confidence, 15 bins. Bins hold few LoRAs, so that a perfectly calibrated reader would show an error "
        "too: the middle column, by simulation.",
        "",
        "| row | expected calibration error | if perfectly calibrated | coverage of 95 % intervals |",
        "| --- | --- | --- | --- |",
    ]
    for row, entry in rows.items():
        c = entry.get("calibration")
        if c and "mse" not in row:
            cells = [f"{c[k]:.3f}" if k in c else "" for k in ("ece", "ece_if_perfect", "coverage")]
            lines.append(f"| {row.replace('_', ' ')} | " + " | ".join(cells) + " |")
    return lines


def _section(figures: list[str], name: str, title: str, command: str) -> list[str]:
    if name not in figures:
        return []
    return [f"## {title}", "", f"![{title.lower()}]({name})", "", f"`{command}`", ""]


def _configurations(results: Mapping[str, Any], names: list[str]) -> list[str]:
    lines = []
    for task in TASKS:
        for name in names:
            result = results.get(f"{task}/all/{name}")
            if result:
                fit = result["fits"][0]
                config = ", ".join(f"{k} {v:g}" for k, v in fit["config"].items()) or "nothing to choose"
                later = [f["seconds"] for f in result["fits"][1:]] or [fit["seconds"]]
                lines.append(f"- {task}, {name}: {config}; {sum(later) / len(later):.1f} s")
    return lines
