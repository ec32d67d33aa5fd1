"""What users do with LoRAs, in one place: generate, edit, mix, invert, predict, compare. The CLI and the demos call it.

from lolgen import pipeline
made = pipeline.generate({"hair_color": "red", "glasses": "yes"}, "out/red", seed=0)
pipeline.edit("out/red", {"beard": "yes"}, "out/bearded")["attributes"]["beard"]["after"]
pipeline.predict(["out/red"])[0]["attributes"]["glasses"]      # {"value": "yes", "probability": 0.99, ...}
"""

from __future__ import annotations

from lolgen.pipeline.drawing import draw_change, draw_preview, draw_rows
from lolgen.pipeline.editing import edit, mix
from lolgen.pipeline.listening import continue_text, listen, warm_listener
from lolgen.pipeline.making import generate, invert, sample
from lolgen.pipeline.models import (
    MODEL,
    load_editor,
    load_generator,
    load_imager,
    load_predictor,
    load_readers,
)
from lolgen.pipeline.reading import predict, read
from lolgen.pipeline.speaking import (
    BARELY,
    edit_sources,
    load_speaker,
    load_speech_editor,
    read_sources,
    sources_in,
    speak,
)
from lolgen.tools.compare import compare

__all__ = [
    "BARELY",
    "MODEL",
    "compare",
    "continue_text",
    "draw_change",
    "draw_preview",
    "draw_rows",
    "edit",
    "edit_sources",
    "generate",
    "invert",
    "listen",
    "load_editor",
    "load_generator",
    "load_imager",
    "load_predictor",
    "load_readers",
    "load_speaker",
    "load_speech_editor",
    "mix",
    "predict",
    "read",
    "read_sources",
    "sample",
    "sources_in",
    "speak",
    "warm_listener",
]
