"""The tasks of the table, in its order."""

from __future__ import annotations

from lolgen.tasks.paper import attributes, clip_score, dataset_size, rank, recipe, styles
from lolgen.tasks.paper.task import Task

TASKS: dict[str, Task] = {
    t.name: t for t in (m.TASK for m in (clip_score, attributes, styles, dataset_size, recipe, rank))
}
