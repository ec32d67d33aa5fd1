"""The shipped readers on the shipped test splits: each gives its own row of the table again, in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lolgen.errors import LolgenError
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.tasks import shelf
from lolgen.tasks.paper.figures import figures
from lolgen.tasks.paper.tasks import TASKS


def score(name: str, readers: Path | None = None, zoos: Path | None = None) -> dict[str, Any]:
    """The figures (`lolgen.tasks.paper.figures`) of a task's shipped reader on its test split; LolgenError for an
    unknown task or one without a reader."""
    if name not in TASKS:
        raise LolgenError(f"unknown task {name!r}; valid tasks: {', '.join(TASKS)}")
    reader = shelf.load((readers or checkpoints_dir() / "predictors") / name)
    row, (batch, y) = next(iter(TASKS[name].load(zoos or zoos_dir()).tests.items()))
    found = figures(reader, batch, y)
    return {"row": row, "loras": len(batch)} | {k: v for k, v in found.items() if k != "reliability"}


def evaluate() -> str:
    """A Markdown table of all shipped readers."""
    lines = ["| row | LoRAs | metric | calibration error or coverage |", "| --- | --- | --- | --- |"]
    for name in TASKS:
        if (checkpoints_dir() / "predictors" / name).is_dir():
            f = score(name)
            lines.append(
                f"| {f['row']} | {f['loras']} | {f['metric']:.4f} | {f.get('ece', f.get('coverage')):.3f} |"
            )
    return "\n".join(lines)
