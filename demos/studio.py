"""What the tabs ask for, done with `lolgen.pipeline`: every result is an `Item` of the session that asked."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lolgen import io, pipeline
from lolgen import pictures as portraits
from lolgen.errors import LolgenError
from lolgen.language.eras import FACTS
from lolgen.lora import Batch, LoRA

from . import downloads, drawing, uploads
from .sessions import Item, Session, Store, names_taken

EXAMPLES: dict[str, tuple[str, ...]] = {
    "Ruby": ("long", "red", "no", "no", "pale", "green"),
    "Otto": ("short", "black", "no", "yes", "tan", "blue"),
    "Pearl": ("long", "pink", "yes", "no", "dark", "yellow"),
    "Finn": ("hat", "brown", "no", "no", "brown", "red"),
}
"""Values in the order of `pictures.ATTRIBUTES`. Generated at start, seed 0."""
SPEAKERS = {source: facts.names[0] for source, facts in FACTS.items()}
"""Source of the language model's adapters -> the name that is shown."""
WALK = (0.0, 0.25, 0.5, 0.75, 1.0)
WALK_SEEDS = (0, 1)

Report = dict[str, Any]
Progress = Callable[[float, str], Any]


@dataclass
class Result:
    """One answer: what was made, what the pipeline said of it, what was read off it, what it draws."""

    item: Item
    report: Report = field(default_factory=dict)
    read: Report = field(default_factory=dict)
    pictures: list[str] = field(default_factory=list)
    captions: list[str] = field(default_factory=list)


@dataclass
class Speech:
    """An adapter of the language model; what `pipeline.listen` and `continue_text` say without it and with it."""

    item: Item
    report: Report
    before: Report
    after: Report
    whole_before: Report
    """`whole_`: the passage read as one, not in stretches."""
    whole_after: Report
    base_says: str
    adapter_says: str


class Studio:
    """The models, loaded once, and the store that results go to."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.painter = drawing.Painter()
        # The models are shared; some of their users (a fit, a probe of activations) attach to them while at work.
        self._models = threading.Lock()

    def warm(self) -> None:
        """Load the models and make the examples, before the first visitor comes."""
        self.painter.warm()
        pipeline.load_predictor()
        pipeline.load_editor()
        pipeline.load_speaker()
        pipeline.warm_listener()
        folder = self.store.root / "examples"
        for name, values in EXAMPLES.items():
            request = dict(zip(portraits.ATTRIBUTES, values, strict=True))
            report = pipeline.generate(request, folder / name.lower(), seed=0)
            item = Item(name, Path(report["adapter"]), "example", report["prompt"], "generated at start")
            item.formats = io.FORMATS
            item.thumb = self.painter.draw(item, [item.prompt], [0])[0]
            self.store.examples.append(item)

    def generate(
        self, key: str | None, request: Mapping[str, str], seed: int, rank: int, progress: Progress
    ) -> Result:
        """An adapter with the attributes of `request`."""
        progress(0.1, "Generating the weights")
        with self._making(key) as out, self._models:
            report = pipeline.generate(request, out, seed=seed, rank=rank)
        return self._show(key, "", "generated", report, progress)

    def surprise(self, key: str | None, seed: int, rank: int, progress: Progress) -> Result:
        """A new identity."""
        progress(0.1, "Sampling a new identity")
        with self._making(key) as out, self._models:
            report = pipeline.sample(out, seed=seed, rank=rank)
        return self._show(key, "", "generated", report, progress)

    def from_picture(self, key: str | None, seed: int, rank: int, progress: Progress) -> Result:
        """An adapter of the person in the picture that the session uploaded last."""
        picture = self.store.session(key).picture
        if picture is None:
            raise LolgenError("choose a picture first")
        progress(0.1, "Reading the picture and fitting the weights")
        with self._making(key) as out, self._models:
            report = pipeline.invert(picture, out, rank=rank, seed=seed)
        return self._show(key, "From a picture", "from a picture", report, progress)

    def edit(
        self, key: str | None, source: Item, request: Mapping[str, str], strength: float, keep: str, seed: int,
        progress: Progress,
    ) -> tuple[Result, Result]:  # fmt: skip
        """(the source, the edited one), with the same prompts and seeds."""
        before = Result(source, read=self.read(source))
        progress(0.1, "Editing the weights")
        with self._making(key) as out, self._models:
            report = pipeline.edit(
                source.path, request, out, strength=strength, keep=keep, format="peft", seed=seed
            )
        source.prompt = report["prompt"]
        progress(0.35, "Drawing before")
        self._draw(before)
        after = self._show(key, f"{source.name.split(' + ')[0]} + {', '.join(map(_short, request.items()))}", "edited",
                           report, progress)  # fmt: skip
        return before, after

    def mix(self, key: str | None, a: Item, b: Item, t: float, progress: Progress) -> Result:
        """An adapter between `a` (t = 0) and `b` (t = 1)."""
        progress(0.05, "Mixing the weights")
        with self._making(key) as out, self._models:
            report = pipeline.mix(a.path, b.path, out, t=t, format="peft")
        return self._show(
            key,
            f"{a.name} x {b.name}"[:40],
            "mixed",
            report,
            progress,
            note=f"{100 * t:.0f} % of the way",
            seeds=drawing.SEEDS[:3],
        )

    def walk(
        self, key: str | None, a: Item, b: Item, prompt: str, progress: Progress
    ) -> list[tuple[float, list[str]]]:
        """Pictures at five steps from `a` to `b`, the same seeds in each."""
        rows = []
        for i, t in enumerate(WALK):
            progress(0.45 + 0.1 * i, f"Drawing the walk, step {i + 1} of {len(WALK)}")
            with self._making(key, keep=False) as out, self._models:
                pipeline.mix(a.path, b.path, out, t=t, format="peft")
                step = Item("step", out, "mixed", prompt)
                rows.append((t, self.painter.draw(step, [prompt], WALK_SEEDS)))
        return rows

    def speak(
        self, key: str | None, request: Mapping[str, float], passage: str, opening: str, seed: int, rank: int,
        progress: Progress,
    ) -> Speech:  # fmt: skip
        """An adapter that speaks like the sources of `request`, judged by a passage and a continuation."""
        progress(0.1, "Generating the weights")
        with self._making(key) as out:
            with self._models:
                report = pipeline.speak(request, out, rank=rank)
            progress(0.3, "Reading the passage")
            before, after = (pipeline.listen(a, passage) for a in (None, out))
            whole_before, whole_after = (pipeline.listen(a, passage, stretch=None) for a in (None, out))
            progress(0.6, "Going on from the opening words")
            base_says, adapter_says = (pipeline.continue_text(a, opening, seed=seed) for a in (None, out))
        who = [SPEAKERS[s] for s in report["sources"]]
        name = " + ".join(who) if len(who) < 3 else f"{who[0]} and {len(who) - 1} others"
        item = Item(names_taken(self.store.items(key), name), Path(report["adapter"]), "generated", native=False,
                    speaks=True, note="for tiny-lm", formats=(report["format"],))  # fmt: skip
        self.store.add(key, item)
        return Speech(item, report, before, after, whole_before, whole_after, base_says, adapter_says)

    def upload(self, key: str | None, payload: Any) -> Item:
        """The adapter of an upload, kept in the session."""
        files = uploads.received(self.store.uploads, payload)
        session = self._session(key, files)
        place, name, lora = uploads.take_adapter(files, session.place())
        item = Item(names_taken(self.store.items(key), name), place, "upload")
        self._place(item, lora)
        return self.store.add(key, item)

    def picture(self, key: str | None, payload: Any) -> str:
        """Take the picture of an upload for `from_picture`: its middle square, as a data URI."""
        files = uploads.received(self.store.uploads, payload)
        session = self._session(key, files)
        square = uploads.take_picture(files[0])
        path = session.place().with_suffix(".png")
        square.save(path)
        if session.picture:
            session.picture.unlink(missing_ok=True)
        session.picture = path
        return drawing.data_uri(square)

    def read(self, item: Item) -> Report:
        """Attributes with their probabilities; nothing for an adapter of another base."""
        if not item.native:
            return {}
        with self._models:
            found: Report = pipeline.predict([item.path])[0]["attributes"]
        return found

    def preview(self, item: Item) -> Result:
        """What is in an adapter of the session, and what it draws if it is for this base."""
        result = Result(item, read=self.read(item))
        if item.native:
            self._draw(result)
        return result

    def _show(
        self,
        key: str | None,
        name: str,
        kind: str,
        report: Report,
        progress: Progress,
        note: str = "",
        seeds: Sequence[int] = drawing.SEEDS,
    ) -> Result:
        """Keep what was made, read it, draw with it."""
        item = Item(name, Path(report["adapter"]), kind, report["prompt"], formats=io.FORMATS)
        result = Result(item, report, self.read(item))
        words = list(_words(result.read))
        item.name = names_taken(self.store.items(key), name[:60] or ", ".join(words[:2]).capitalize())
        item.note = note or ", ".join(words)
        progress(0.6, "Drawing with it")
        self._draw(result, seeds)
        item.thumb = result.pictures[0]
        self.store.add(key, item)
        return result

    def _draw(self, result: Result, seeds: Sequence[int] = drawing.SEEDS) -> None:
        result.pictures = self.painter.draw(result.item, [drawing.prompt_of(result.item)], seeds)
        result.captions = [f"seed {s}" for s in seeds]

    def _place(self, item: Item, lora: LoRA) -> None:
        """Whether an uploaded adapter is for this base, and what follows from it."""
        try:
            item.prompt = self._prompt(item, lora)
            item.thumb = self.painter.draw(item, [item.prompt], [0])[0]
            item.note = ", ".join(_words(self.read(item)))
            item.formats = io.FORMATS
        except LolgenError:
            item.native = False
            item.note = "for another base model"
            item.formats = downloads.formats_of(lora)

    def _prompt(self, item: Item, lora: LoRA) -> str:
        """The prompt that an uploaded adapter names, or one with the word that it answers to. LolgenError when it is
        for another base."""
        predictor = pipeline.load_predictor()
        batch = Batch.stack([io.load(item.path, modules=predictor.spec)])
        told = lora.metadata.get("lolgen.prompt", "")
        if told.endswith(portraits.SUBJECTS):
            return portraits.caption({}, drawing.subject_of(told))
        with self._models:
            word = portraits.RARE_WORDS[int(predictor.words(batch)[0])]
        return portraits.caption({}, next(s for s in portraits.SUBJECTS if word in s.split()))

    def _session(self, key: str | None, files: list[Path]) -> Session:
        session = self.store.session(key)
        session.uploads.update(files)
        return session

    @contextmanager
    def _making(self, key: str | None, keep: bool = True) -> Iterator[Path]:
        """A place for a new adapter in the session's folder; empty again if it fails."""
        out = self.store.session(key).place()
        try:
            yield out
        except BaseException:
            shutil.rmtree(out, ignore_errors=True)
            raise
        if not keep:
            shutil.rmtree(out, ignore_errors=True)


def _words(read: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """`long red hair`, `glasses`, ... of what is read."""
    value = {n: r["value"] for n, r in read.items()}
    hair = value["hair_color"]
    yield {"bald": "bald", "hat": "hat"}.get(value["top"], f"{value['top']} {hair} hair")
    if value["beard"] == "yes":
        yield "beard" if value["top"] in ("short", "long") else f"{hair} beard"
    if value["glasses"] == "yes":
        yield "glasses"
    yield f"{value['skin']} skin"
    yield f"{value['clothes']} shirt"


def _short(change: tuple[str, str]) -> str:
    name, value = change
    if name in ("glasses", "beard"):
        return name if value == "yes" else f"no {name}"
    return {"hair_color": f"{value} hair", "skin": f"{value} skin", "clothes": f"{value} shirt",
            "top": value if value in ("bald", "hat") else f"{value} hair"}[name]  # fmt: skip
