"""The report of `lolgen eval edit`: edit.json, edit.md, the contact sheet edit.png and the curves edit_curves.png."""

from __future__ import annotations

import io as stdio
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lolgen import preview
from lolgen.io import atomic
from lolgen.tasks.edit import RANKS, STRENGTHS, SYSTEMS, Bench, EditFile, Point, judged, measure
from lolgen.tasks.editing import NAMES, at, pictures_of
from lolgen.tasks.editors import RIVALS

INTRO = """\
`{command}` writes this page, `edit.json`, `edit.png` and `edit_curves.png` from the shipped models and zoo.
{pictures} pictures an edit, before and after under the same seeds and prompt, read by the probe, which took no part in
training, guiding or tuning. Success: the asked attribute reads as asked. Collateral: readings of the other attributes
that differ from the picture before. Wrong: those that differ from what the LoRA was trained on. Identity: cosine of the
probe's features before and after, which a successful edit lowers too.
"""
NOTES = """\
Seconds: lolgen from file to file, models loaded, one core; the others in memory, `retrained` in banks of 40. The rivals
know the true value that a LoRA has; lolgen reads it. The factor of every rival is tuned per attribute, as lolgen's.
The last line is what changes without any edit: weak LoRAs draw an attribute now so, now so. Of the {reliable} LoRAs
whose pictures were all right before:
"""
COPIES = """\
Copies of these LoRAs (kohya: from file to file; regauged: condition 1e4). The zoo's recipe was tuned at rank 4: at
ranks 1 and 2 the LoRAs are undertrained, and draw much of their identity wrong before any edit."""
Found = Mapping[Point, dict[str, Any]]


def evaluate(
    zoo: str | Path, out: str | Path, *, edit_file: EditFile, quick: bool = False, workers: int = 2
) -> str:
    """Measure, write the four files, and give the Markdown table."""
    out = Path(out)
    found, bench = measure(zoo, out, edit_file=edit_file, quick=quick, workers=workers)
    report = summary(found, bench, quick)
    atomic.write_file(out / "edit.json", (json.dumps(report, indent=1) + "\n").encode())
    text = markdown(report)
    atomic.write_file(out / "edit.md", text.encode())
    preview.save_image(sheet(bench), out / "edit.png")
    atomic.write_file(out / "edit_curves.png", plot(report))
    return text


def summary(found: Found, bench: Bench, quick: bool) -> dict[str, Any]:
    """What edit.json holds."""
    cases = bench.cases
    floor = judged(found[Point("lolgen", variant="floor")])
    rows = torch.tensor([c.row for c in cases])
    all_right = reliable_loras(bench)
    reliable = all_right[rows]
    systems: dict[str, Any] = {}
    for name in SYSTEMS:
        result = found[Point(name)]
        figures = judged(result)
        systems[name] = {
            **figures.figures(),
            "seconds": round(result["seconds"], 4),
            "each": {n: figures[torch.tensor([c.attribute == n for c in cases])].figures() for n in NAMES},
            "reliable": figures[reliable].figures(),
        }
        if name != "retrained":
            systems[name]["curve"] = [
                {"strength": s, **judged(found[Point(name, s)]).figures()}
                for s in STRENGTHS
                if Point(name, s) in found
            ]
    kohya, regauged = found[Point("lolgen", variant="kohya")], found[Point("lolgen", variant="regauged")]
    systems["lolgen"]["seconds"] = round(kohya["seconds"], 4)
    report: dict[str, Any] = {
        "command": "lolgen eval edit" + (" --quick" if quick else ""),
        "loras": bench.count,
        "edits": len(cases),
        "pictures_an_edit": len(bench.seeds),
        "reliable_loras": int(all_right.sum()),
        "systems": systems,
        "keep_identity": judged(found[Point("lolgen", variant="identity")]).figures(),
        "floor": {**floor.figures(), "success": None},
        "ranks": {
            str(r): {**judged(found[Point("lolgen", rank=r)]).figures(), "wrong_before": wrong_before(bench, r)}
            for r in (*RANKS, 4)
            if Point("lolgen", rank=r) in found
        },
        "kohya": {
            **judged(kohya).figures(), "largest_distance": kohya["distance"], "slowest_seconds": kohya["slowest"]
        },
        "regauged": {**judged(regauged).figures(), "largest_distance": regauged["distance"], "condition": 1e4},
    }  # fmt: skip
    report["at_equal_success"] = equal_success(report)
    return report


def right_before(bench: Bench, rank: int) -> Tensor:
    """(LoRAs, seeds, attributes) bool: readings of the pictures before any edit that are as trained; true where an
    attribute does not show."""
    images = bench.before(rank)
    read = bench.probe.read(images.flatten(0, 1)).unflatten(0, images.shape[:2])
    truth = bench.test.labels()[: bench.count, None]
    return (read == truth) | (truth < 0)


def reliable_loras(bench: Bench) -> Tensor:
    """(LoRAs,) bool: whether every picture before the edit reads, in every attribute, as the LoRA was trained on."""
    return right_before(bench, 4).all(-1).all(-1)


def wrong_before(bench: Bench, rank: int) -> float:
    """Share of wrong readings, of those that show, before any edit."""
    shows = (bench.test.labels()[: bench.count, None] >= 0).expand(-1, len(bench.seeds), -1)
    return round(float((~right_before(bench, rank))[shows].float().mean()), 4)


def equal_success(report: dict[str, Any]) -> list[dict[str, Any]]:
    """lolgen's curve read off at the success of every point of every rival: who has less collateral, more identity.

    Points beyond what lolgen's curve reaches are left out (its ends are the unchanged LoRA and its largest strength).
    """
    own = report["systems"]["lolgen"]["curve"]
    path = sorted([{"success": 0.0, "collateral": 0.0, "identity": 1.0}, *own], key=lambda p: p["success"])
    x = [p["success"] for p in path]
    rows = []
    for name in (*RIVALS, "retrained"):
        system = report["systems"][name]
        for p in system.get("curve") or [
            {**{k: system[k] for k in ("success", "collateral", "identity")}, "strength": 1.0}
        ]:
            if p["success"] > x[-1]:
                continue
            mine = {
                k: float(np.interp(p["success"], x, [q[k] for q in path])) for k in ("collateral", "identity")
            }
            rows.append({
                "system": name, "strength": p["strength"], "success": p["success"],
                "collateral": p["collateral"], "lolgen_collateral": round(mine["collateral"], 4),
                "identity": p["identity"], "lolgen_identity": round(mine["identity"], 4),
                "ahead": mine["collateral"] <= p["collateral"] and mine["identity"] >= p["identity"],
            })  # fmt: skip
    return rows


def markdown(report: dict[str, Any]) -> str:
    lines = [
        f"# Edits of {report['loras']} held-out LoRAs, every attribute that they show ({report['edits']} edits)",
        "",
        INTRO.format(command=report["command"], pictures=report["pictures_an_edit"]),
        "| system, at its default | success | collateral | wrong | identity | seconds |",
        "| --- | --- | --- | --- | --- | --- |",
    ]

    def row(name: str, f: Mapping[str, Any], seconds: str = "") -> str:
        success = "" if f["success"] is None else f"{f['success']:.3f}"
        return f"| {name} | {success} | {f['collateral']:.3f} | {f['wrong']:.3f} | {f['identity']:.3f} | {seconds} |"

    for name, f in report["systems"].items():
        lines.append(row(name, f, f"{f['seconds']:.3g}"))
    lines += [
        row("lolgen, `--keep identity`", report["keep_identity"]),
        row("no edit, LoRA x 1.1", report["floor"]),
        "",
        NOTES.format(reliable=report["reliable_loras"]),
        "| system | success | collateral | wrong | identity |",
        "| --- | --- | --- | --- | --- |",
    ]
    for name, f in report["systems"].items():
        r = f["reliable"]
        lines.append(
            f"| {name} | {r['success']:.3f} | {r['collateral']:.3f} | {r['wrong']:.3f} | {r['identity']:.3f} |"
        )
    lines += [
        "",
        "By attribute (success / collateral): "
        + "; ".join(
            f"{n} {f['success']:.3f} / {f['collateral']:.3f}"
            for n, f in report["systems"]["lolgen"]["each"].items()
        )
        + ".",
        "",
        COPIES,
        "",
        "| lolgen on | success | collateral | wrong | identity | wrong before, or largest distance of delta W |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for r, f in sorted(report["ranks"].items(), key=lambda kv: int(kv[0])):
        lines.append(row(f"rank {r}", f, f"{f['wrong_before']:.3f}"))
    for name in ("kohya", "regauged"):
        lines.append(row(name, report[name], f"{report[name]['largest_distance']:.1e}"))
    ahead = report["at_equal_success"]
    behind = [f"{p['system']} at {p['strength']:g}" for p in ahead if not p["ahead"]]
    lines += [
        "",
        f"At equal success (lolgen's curve interpolated) lolgen has less collateral and more identity than "
        f"{sum(p['ahead'] for p in ahead)} of {len(ahead)} points of the rivals' curves"
        + (f"; not than {', '.join(behind)}." if behind else "."),
        "",
        "![curves](edit_curves.png)",
        "",
        "Contact sheet `edit.png`: a LoRA a row, before, then each of its attributes edited.",
        "",
    ]
    return "\n".join(lines)


def sheet(bench: Bench, rows: int = 12) -> Any:
    """A LoRA a row: before, then every attribute edited (a blank where it does not show), one seed."""
    cases = [c for c in bench.cases if c.row < rows]
    edited = bench.system(Point("lolgen"))(at(bench.loras(4), cases), cases, 1.0)
    after = pictures_of(bench.base, edited, [bench.subjects[c.row] for c in cases], [0])[:, 0]
    before = bench.before(4)[:, 0]
    grid = torch.ones(min(rows, bench.count), 1 + len(NAMES), *before.shape[1:])
    grid[:, 0] = before[: len(grid)]
    for case, image in zip(cases, after, strict=True):
        grid[case.row, 1 + NAMES.index(case.attribute)] = image
    return preview.grid(grid.flatten(0, 1) / 2 + 0.5, 1 + len(NAMES), 2)


def plot(report: dict[str, Any]) -> bytes:
    """Collateral and identity over success, a curve a system, as PNG bytes."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 4), constrained_layout=True)
    for axis, key in zip(axes, ("collateral", "identity"), strict=True):
        for name, system in report["systems"].items():
            curve = system.get("curve") or [system]
            axis.plot([p["success"] for p in curve], [p[key] for p in curve], "o-", label=name, markersize=4)
        axis.set_xlabel("success")
        axis.set_ylabel(key)
        axis.grid(alpha=0.3)
    axes[0].axhline(0.05, color="grey", linewidth=0.8, linestyle=":")
    axes[0].axvline(0.95, color="grey", linewidth=0.8, linestyle=":")
    axes[1].legend()
    buffer = stdio.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()
