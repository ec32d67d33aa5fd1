"""The shipped models of a zoo, loaded once a process."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING

from lolgen.paths import checkpoints_dir

if TYPE_CHECKING:
    from lolgen.editor import Editor
    from lolgen.generator import Generator
    from lolgen.imager import Imager
    from lolgen.lora import Spec
    from lolgen.predictor import Predictor
    from lolgen.tasks.ours import OursReader

MODEL = "faces"
"""The zoo whose models serve by default: folder in checkpoints/."""


@cache
def load_generator(model: str = MODEL) -> Generator:
    """The shipped generator of a zoo, loaded once a process."""
    from lolgen.generator import Generator

    return Generator.from_pretrained(checkpoints_dir() / model)


@cache
def load_predictor(model: str = MODEL) -> Predictor:
    """The shipped attribute predictor of a zoo, loaded once a process."""
    from lolgen.predictor import Predictor

    return Predictor.from_pretrained(checkpoints_dir() / model / "predictor")


@cache
def load_editor(model: str = MODEL) -> Editor:
    """The shipped editor of a zoo, loaded once a process."""
    from lolgen.editor import Editor

    return Editor.from_pretrained(checkpoints_dir() / model)


@cache
def load_imager(model: str = MODEL) -> Imager:
    """The shipped reader of pictures of a zoo, loaded once a process."""
    from lolgen.imager import Imager

    return Imager.load(checkpoints_dir() / model / "imager.safetensors")


@cache
def load_readers() -> dict[str, tuple[Spec, OursReader]]:
    """Task -> modules and reader, of every shipped reader of the paper's tasks."""
    from lolgen.tasks import shelf

    found = shelf.folders(checkpoints_dir() / "predictors")
    return {p.name: (shelf.spec_of(p), shelf.load(p)) for p in found}
