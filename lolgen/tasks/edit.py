"""`lolgen eval edit`: edits of held-out real LoRAs, judged by pictures under equal seeds and prompts.

Every LoRA x every attribute that it shows x one other value; lolgen beside weights2weights, the ridge direction, the
difference of class means, and a LoRA trained anew on pictures of the edited person. Strengths trace a curve; the
default of every system was tuned on validation LoRAs by a reader that does not judge (`train.editor_train`). Points are
kept in `.cache` of the output folder as they are finished: a killed run goes on.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from safetensors.torch import save as serialise
from torch import Tensor
from tqdm import tqdm

from lolgen import io, metrics, pictures, testing
from lolgen.base import Base
from lolgen.editor import Editor
from lolgen.io import atomic
from lolgen.lora import Batch
from lolgen.paths import checkpoints_dir
from lolgen.precision import bf16_matmuls
from lolgen.probe import Probe
from lolgen.tasks.editing import EditCase, EditSystem, Judged, at, judge, make_edit_cases, pictures_of
from lolgen.tasks.editors import RIVALS, along, rival_reach
from lolgen.zoo.plan import Plan
from lolgen.zoo.training import Recipe, Task, make_prior, train_bank
from lolgen.zoo.zoo import Zoo

STRENGTHS: tuple[float, ...] = (0.5, 0.75, 1.0, 1.25, 1.5)
RIVAL_STRENGTHS: tuple[float, ...] = (0.5, 1.0, 1.5)
SYSTEMS: tuple[str, ...] = ("lolgen", *RIVALS, "retrained")
RANKS: tuple[int, ...] = (1, 2, 8, 16, 32)
BANK = 40
EditFile = Callable[..., dict[str, Any]]
"""`lolgen.pipeline.edit`, which lies above this file: (path, request, out, seed=...) -> report."""


@dataclass(frozen=True)
class Point:
    """One entry of the report: a system at a strength, on the LoRAs of a rank. `variant`: "" or one of "identity"
    (keep), "kohya", "regauged" (copies of the input), "floor" (the LoRA itself, 1.1 times as strong)."""

    system: str
    strength: float = 1.0
    rank: int = 4
    variant: str = ""

    @property
    def key(self) -> str:
        return f"{self.system}/{self.strength:g}/{self.rank}/{self.variant}"


def points() -> list[Point]:
    """What the report is made of, most important first."""
    defaults = [Point(s) for s in SYSTEMS]
    copies = [Point("lolgen", variant=v) for v in ("floor", "identity", "kohya", "regauged")]
    curve = [Point("lolgen", x) for x in STRENGTHS] + [Point(s, x) for x in RIVAL_STRENGTHS for s in RIVALS]
    return list(dict.fromkeys([*defaults, *copies, *(Point("lolgen", rank=r) for r in RANKS), *curve]))


class Bench:
    """The models, LoRAs and cases that points need, each loaded when first used."""

    def __init__(
        self, zoo: str, model: str, count: int, seeds: Sequence[int], cache: Path, edit_file: EditFile | None
    ) -> None:
        torch.set_num_threads(1)
        self.edit_file = edit_file
        self.zoo, self.model, self.count, self.seeds, self.cache = (
            Zoo.open(zoo),
            model,
            count,
            list(seeds),
            cache,
        )
        self._before: dict[int, Tensor] = {}

    @cached_property
    def test(self) -> Zoo:
        """The test LoRAs in the order of their ids: as stored they are sorted by how long they were trained, and the
        first ids are those that have copies at other ranks."""
        split = self.zoo.split("test")
        return Zoo(split.folder, split.info, sorted(split.rows, key=lambda r: r["id"]))

    @cached_property
    def base(self) -> Base:
        base = Base.load(checkpoints_dir() / "tiny-sd")
        bf16_matmuls(base.unet)
        return base

    @cached_property
    def probe(self) -> Probe:
        return Probe.load(checkpoints_dir() / "probe.safetensors")

    @cached_property
    def editor(self) -> Editor:
        return Editor.from_pretrained(checkpoints_dir() / self.model)

    @cached_property
    def cases(self) -> list[EditCase]:
        return make_edit_cases(self.test, self.count, 0)

    @cached_property
    def subjects(self) -> list[str]:
        return [r["recipe"]["subject"] for r in self.test.rows[: self.count]]

    def loras(self, rank: int) -> Batch:
        """The LoRAs of the first `count` test identities at this rank, in the order of `test`."""
        ids = [r["id"] for r in self.test.rows[: self.count]]
        rows = {r["id"]: r for r in self.zoo.split("test", rank)}
        return Zoo(self.zoo.folder, self.zoo.info, [rows[i] for i in ids]).load()

    def before(self, rank: int) -> Tensor:
        if rank not in self._before:
            self._before[rank] = pictures_of(self.base, self.loras(rank), self.subjects, self.seeds)
        return self._before[rank]

    def system(self, point: Point) -> EditSystem:
        if point.variant == "floor":
            return lambda batch, cases, strength: batch.map(lambda U, V: (1.1 * U, V))
        if point.system == "lolgen":
            keep = "identity" if point.variant == "identity" else "all"
            return lambda batch, cases, strength: self.editor.edit(
                batch, [c.request for c in cases], [c.seed for c in cases], strength=strength, keep=keep
            )[0]
        familiarity = self.editor.familiarity
        weights = RIVALS[point.system]
        return along(weights, self.zoo, self.test, familiarity, rival_reach(point.system))

    def run(self, point: Point) -> dict[str, Any]:
        """Figures of every case, and what the point is about besides."""
        more: dict[str, Any] = {}
        batch = at(self.loras(point.rank), self.cases)
        if point.system == "retrained":
            edited, more["seconds"] = self.retrained()
        elif point.variant == "kohya":
            edited, more = self.through_files(batch)
        else:
            system = self.system(point)
            if point.variant == "regauged":
                batch = _regauged(batch)
            start = time.perf_counter()
            edited = system(batch, self.cases, point.strength)
            more["seconds"] = (time.perf_counter() - start) / len(self.cases)
            if point.variant == "regauged":
                plain = system(at(self.loras(point.rank), self.cases), self.cases, point.strength)
                more["distance"] = float(metrics.relative_distance(plain, edited).max())
        after = pictures_of(self.base, edited, [self.subjects[c.row] for c in self.cases], self.seeds)
        judged = judge(self.probe, self.test, self.cases, self.before(point.rank), after)
        return {"cases": {k: v.tolist() for k, v in vars(judged).items()}, **more}

    def through_files(self, batch: Batch) -> tuple[Batch, dict[str, Any]]:
        """Edits from kohya file to kohya file, with the time of each and how far they are from the edits in memory."""
        assert self.edit_file is not None
        loras, edited, seconds = batch.unstack(), [], []
        with tempfile.TemporaryDirectory() as folder:
            source, target = Path(folder) / "in.safetensors", Path(folder) / "out.safetensors"
            for lora, case in zip(loras, self.cases, strict=True):
                io.save(lora, source, "kohya")
                report = self.edit_file(source, case.request, target, seed=case.seed)
                assert report["format"] == "kohya"
                seconds.append(report["seconds"])
                edited.append(io.load(target, modules=batch.spec))
        found = Batch.stack(edited)
        plain = self.system(Point("lolgen"))(batch, self.cases, 1.0)
        distance = float(metrics.relative_distance(plain, found.to(torch.float64)).max())
        return found, {"seconds": median(seconds), "slowest": max(seconds), "distance": distance}

    def retrained(self) -> tuple[Batch, float]:
        """A LoRA trained by the recipe of each case's own on pictures of the edited person; banks are kept in the
        cache. The second value is seconds a LoRA, trained in banks."""
        plan = Plan()
        order = sorted(
            range(len(self.cases)), key=lambda k: self.test.rows[self.cases[k].row]["recipe"]["steps"]
        )
        found: list[Any] = [None] * len(self.cases)
        prior, seconds = None, 0.0
        for start in tqdm(range(0, len(order), BANK), desc="retrained", mininterval=5):
            some = order[start : start + BANK]
            path = self.cache / f"retrained-{start:04d}.safetensors"
            if not path.exists():
                prior = prior or make_prior(self.base, plan.prior_pictures, plan.seed)
                began = time.perf_counter()
                loras = train_bank(
                    self.base, self.test.spec, [self._task(self.cases[k], plan) for k in some], prior, 7_000 + start,
                    batch=plan.batch, prior_batch=plan.prior_batch, prior_weight=plan.prior_weight,
                )  # fmt: skip
                bank = Batch.stack(loras)
                tensors = {"seconds": torch.tensor(time.perf_counter() - began)}
                for g, group in enumerate(bank.groups):
                    tensors |= {f"U.{g}": group.U, f"V.{g}": group.V}
                atomic.write_file(path, serialise(tensors))
            tensors = load_file(path)
            seconds += float(tensors["seconds"])
            for i, k in enumerate(some):
                found[k] = [
                    (tensors[f"U.{g}"][i], tensors[f"V.{g}"][i]) for g in range(len(self.test.spec.groups))
                ]
        batch = at(self.loras(4), self.cases)
        for g, group in enumerate(batch.groups):
            group.U = torch.stack([f[g][0] for f in found])
            group.V = torch.stack([f[g][1] for f in found])
        return batch, seconds / len(self.cases)

    def _task(self, case: EditCase, plan: Plan) -> Task:
        row = self.test.rows[case.row]
        person = pictures.Identity.from_json(row["identity"])
        edited = pictures.Identity.from_json(
            {**row["identity"], "attributes": {**person.attributes, case.attribute: case.value}}
        )
        rng = np.random.default_rng([case.seed, 37])
        drawn = [pictures.draw_portrait(edited, rng) for _ in range(plan.pictures)]
        return Task(Recipe(**row["recipe"]), torch.from_numpy(np.stack(drawn)))


def _regauged(batch: Batch) -> Batch:
    generator = torch.Generator().manual_seed(0)
    return testing.regauge(batch.to(torch.float64), condition=1e4, generator=generator)[0]


_bench: Bench | None = None


def _start(*arguments: Any) -> None:
    global _bench
    _bench = Bench(*arguments)


def _run(point: Point) -> tuple[Point, dict[str, Any]]:
    assert _bench is not None
    return point, _bench.run(point)


def measure(
    zoo: str | Path,
    out: Path,
    *,
    edit_file: EditFile,
    quick: bool = False,
    model: str = "faces",
    workers: int = 2,
) -> tuple[dict[Point, dict[str, Any]], Bench]:
    """Every point of the report, from the cache where it is there; the bench for what else the report shows.

    `quick`: 4 LoRAs, the systems at their defaults, to see that everything works.
    """
    count, seeds = (4, [0]) if quick else (100, [0, 1])
    wanted = [p for p in points() if not quick or (p.strength == 1 and p.rank in (1, 4))]
    folder = out / ".cache" / f"edit-{_fingerprint(zoo, model, count)}"
    folder.mkdir(parents=True, exist_ok=True)
    arguments = (str(zoo), model, count, seeds, folder, edit_file)
    found: dict[Point, dict[str, Any]] = {}
    for point in wanted:
        path = _place(folder, point)
        if path.is_file():
            found[point] = json.loads(path.read_text("utf-8"))
    left = [p for p in wanted if p not in found]
    bar = tqdm(total=len(found) + len(left), initial=len(found), desc="eval edit", unit="point")
    if left:
        context = multiprocessing.get_context("spawn")
        with context.Pool(min(workers, len(left)), _start, arguments) as pool:
            for point, result in pool.imap_unordered(_run, left):
                found[point] = result
                atomic.write_file(_place(folder, point), json.dumps(result).encode())
                bar.update()
    bar.close()
    return found, Bench(*arguments)


def _place(folder: Path, point: Point) -> Path:
    """The file of a point; a rival's also depends on the factors that it was tuned to."""
    reach = json.dumps(rival_reach(point.system)) if point.system in RIVALS else ""
    tuned = hashlib.sha256(reach.encode()).hexdigest()[:8] if reach else "own"
    return folder / (point.key.replace("/", "_") + f"_{tuned}.json")


def _fingerprint(zoo: str | Path, model: str, count: int) -> str:
    """What a kept point depends on: the zoo's index, the models, the code of the editor and of this task."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256(f"{count}".encode())
    files = [Path(zoo) / "index.jsonl", *sorted((checkpoints_dir() / model).rglob("*.safetensors"))]
    files += [checkpoints_dir() / model / "editor.json", root / "editor.py", root / "framing.py"]
    files += [root / "nn" / n for n in ("coordinates.py", "familiarity.py")]
    files += [root / "tasks" / n for n in ("editing.py", "editors.py")]
    for file in files:
        digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()[:12]


def judged(result: dict[str, Any]) -> Judged:
    """The figures of every case of a point."""
    return Judged(**{k: torch.tensor(v) for k, v in result["cases"].items()})
