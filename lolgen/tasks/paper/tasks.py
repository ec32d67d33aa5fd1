"""The tasks of the table, in its order."""

from __future__ import annotations

from lolgen.tasks.paper import (
    attributes,
    clip_score,
    dataset_size,
    poisoned,
    rank,
    recipe,
    speech_accuracy,
    speech_loss,
    speech_recipe,
    speech_sources,
    styles,
)
from lolgen.tasks.paper.task import Task

_MODULES = (
    clip_score, attributes, styles, dataset_size, recipe, rank, speech_sources, speech_loss, speech_accuracy,
    speech_recipe, poisoned,
)  # fmt: skip
TASKS: dict[str, Task] = {t.name: t for t in (m.TASK for m in _MODULES)}
