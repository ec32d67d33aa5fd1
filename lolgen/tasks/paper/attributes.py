"""Portrait attributes: six classes of each identity of the faces zoo. Split by what can be seen of the identity (no
combination of visible attributes is in two splits), loss cross-entropy, metric accuracy over what is visible."""

from __future__ import annotations

from pathlib import Path

from lolgen import pictures
from lolgen.tasks.paper import cross_model, ranks
from lolgen.tasks.paper.task import Data, Task, labels_of, splits
from lolgen.tasks.reader import Classes
from lolgen.zoo.zoo import Zoo


def load(zoos: Path) -> Data:
    zoo = Zoo.open(zoos / "faces")
    train, validation, test = splits(zoo, labels_of)
    tests = {"attributes": test}
    tests |= ranks.tests(zoo, "attributes", labels_of) | cross_model.tests(zoos, labels_of)
    return Data(Classes({n: len(v) for n, v in pictures.ATTRIBUTES.items()}), train, validation, tests)


TASK = Task(
    "attributes",
    "Portrait attributes (6)",
    ("faces",),
    load,
    parts=True,
    optional=tuple(cross_model.ZOOS.values()),
)
