"""Style membership: ten bits, which styles a LoRA was trained on. Styles zoo, split by subset; loss cross-entropy,
metric accuracy over bits. Also the unit of sample efficiency (`lolgen.tasks.paper.samples`)."""

from __future__ import annotations

from pathlib import Path

from lolgen import pictures
from lolgen.tasks.paper import samples
from lolgen.tasks.paper.task import Data, Task, labels_of, splits
from lolgen.tasks.reader import Classes
from lolgen.zoo.zoo import Zoo


def load(zoos: Path) -> Data:
    train, validation, test = splits(Zoo.open(zoos / "styles"), labels_of)
    return Data(Classes(dict.fromkeys(pictures.STYLES, 2)), train, validation, {"styles": test})


TASK = Task("styles", "Style membership (10 bits)", ("styles",), load, sizes=samples.SIZES)
