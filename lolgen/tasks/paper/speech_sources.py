"""Which of the nineteen sources a language LoRA was trained on: nineteen bits. Speeches zoo, clean LoRAs, its splits;
loss cross-entropy, metric accuracy over bits."""

from __future__ import annotations

from pathlib import Path

from lolgen.language.texts import SOURCES
from lolgen.tasks.paper.task import Data, Task, labels_of, splits
from lolgen.tasks.reader import Classes
from lolgen.zoo.zoo import ROW, Zoo


def clean(row: ROW) -> bool:
    return "poison" not in row


def load(zoos: Path) -> Data:
    train, validation, test = splits(Zoo.open(zoos / "speeches").select(clean), labels_of)
    return Data(Classes(dict.fromkeys(SOURCES, 2)), train, validation, {"speech_sources": test})


TASK = Task("speech_sources", "Sources of a language LoRA (19 bits)", ("speeches",), load, hears=False)
