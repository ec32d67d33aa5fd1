"""Run the table: every task, every model, several seeds, on a worker a core; resumable, with progress.

One job is one (task, number of training LoRAs, model): its configuration is chosen on validation with the first seed
and kept for the others. Finished jobs are kept in `.cache/paper.json` under the output folder with a key of what they
depend on (zoo, labels, settings, the model's code), so that a killed run goes on, and a changed model runs anew.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import multiprocessing
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from lolgen.errors import LolgenError
from lolgen.io.atomic import write_file
from lolgen.paths import checkpoints_dir
from lolgen.tasks import features, ours, reader, ridge, token_net, training, traits
from lolgen.tasks.models import MODELS, model
from lolgen.tasks.paper import figures as figures_
from lolgen.tasks.paper import samples, task
from lolgen.tasks.paper.figures import figures
from lolgen.tasks.paper.task import Data
from lolgen.tasks.paper.tasks import TASKS
from lolgen.tasks.reader import Budget

PAPER = Budget(configurations=3, epochs=0.7)
QUICK = Budget(configurations=1, epochs=0.1)
QUICK_LORAS = 120
SEEDS = (0, 1, 2)
Job = tuple[str, int | None, str]
Result = dict[str, Any]


def run(
    zoos: Path,
    out: Path,
    *,
    models: Sequence[str] | None = None,
    tasks: Sequence[str] | None = None,
    seeds: Sequence[int] = SEEDS,
    quick: bool = False,
    workers: int = 2,
    base: Path | None = None,
) -> dict[str, Result]:
    """All results by "task/size/model"; tasks whose zoo is not there are left out with a line that says so.

    `base`: the folder of the base model whose text states lolgen's reader may listen at (default: the shipped one).
    LolgenError for an unknown name.
    """  # fmt: skip
    names = list(MODELS if models is None else models)
    for name in names:
        model(name)
    chosen = list(TASKS if tasks is None else tasks)
    for name in chosen:
        if name not in TASKS:
            raise LolgenError(f"unknown task {name!r}; valid tasks: {', '.join(TASKS)}")
    jobs: list[Job] = []
    for name in chosen:
        gone = TASKS[name].missing(zoos)
        if gone:
            tqdm.write(f"{name}: left out, no zoo {', '.join(gone)} in {zoos}")
            continue
        sizes = TASKS[name].sizes if not quick else TASKS[name].sizes[:2]
        jobs += [(name, n, m) for n in sizes for m in names]
    seeds = seeds[:1] if quick else seeds
    path = out / ".cache" / ("paper-quick.json" if quick else "paper.json")
    kept: dict[str, Result] = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    keys = {job: key_of(job, zoos, seeds, quick) for job in jobs}
    todo = [j for j in jobs if kept.get(label(j), {}).get("key") != keys[j]]
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(todo), desc="eval paper", unit="job", mininterval=1)

    def keep(job: Job, result: Result) -> None:
        kept[label(job)] = {"key": keys[job]} | result
        write_file(path, (json.dumps(kept) + "\n").encode())
        bar.set_postfix_str(label(job))
        bar.update()

    arguments = [(job, zoos, tuple(seeds), quick, base) for job in todo]
    if workers <= 1 or len(todo) <= 1:
        for entry in arguments:
            keep(*_star(entry))
    else:
        with multiprocessing.get_context("spawn").Pool(min(workers, len(todo)), _one_thread) as pool:
            for job, result in pool.imap_unordered(_star, arguments):
                keep(job, result)
    bar.close()
    return {label(j): kept[label(j)] for j in jobs}


def label(job: Job) -> str:
    return f"{job[0]}/{job[1] or 'all'}/{job[2]}"


def _one_thread() -> None:
    torch.set_num_threads(1)


def _star(entry: tuple[Job, Path, tuple[int, ...], bool, Path | None]) -> tuple[Job, Result]:
    return entry[0], fit(*entry)


@cache
def _data(name: str, zoos: Path) -> Data:
    return TASKS[name].load(zoos)


@cache
def directions(base: Path) -> torch.Tensor:
    """Where lolgen's reader listens, see `lolgen.tasks.directions`."""
    from lolgen.base import Base
    from lolgen.tasks.directions import directions_of

    return directions_of(Base.load(base))


def fit(job: Job, zoos: Path, seeds: Sequence[int], quick: bool, base: Path | None = None) -> Result:
    """Fit one job with every seed; the figures of all its rows."""
    name, size, model_name = job
    of, data = TASKS[name], _data(name, zoos)
    train, validation = data.train, data.validation
    if quick:
        train, validation = (samples.subset(d, QUICK_LORAS) for d in (train, validation))
    train = samples.subset(train, size)
    extra: dict[str, Any] = {}
    if model_name == "ours" and of.hears:
        extra["directions"] = directions(base or checkpoints_dir() / "tiny-sd")
    budget = QUICK if quick else PAPER
    chosen, fits = None, []
    for seed in seeds if MODELS[model_name].random else seeds[:1]:
        started = time.perf_counter()
        fitted = MODELS[model_name].fit(
            *train, *validation, data.layout, seed, config=chosen, budget=budget, **extra
        )
        chosen = fitted.config or None
        seconds = time.perf_counter() - started
        tests = data.tests if size is None else dict(list(data.tests.items())[:1])
        fits.append(
            {
                "seed": seed,
                "seconds": round(seconds, 2),
                "config": fitted.config,
                "tests": {row: figures(fitted, *labelled) for row, labelled in tests.items()},
            }
        )
    return {"fits": fits, "train": len(train[0]), "validation": len(validation[0])}


_SHARED = (features, reader, ridge, token_net, training, figures_, samples, task)


def key_of(job: Job, zoos: Path, seeds: Sequence[int], quick: bool) -> str:
    """What a kept result depends on."""
    name, size, model_name = job
    digest = hashlib.sha256(repr((size, tuple(seeds), quick, PAPER, QUICK, QUICK_LORAS)).encode())
    sources = [inspect.getfile(m) for m in _SHARED]
    sources += [inspect.getfile(TASKS[name].load), inspect.getfile(MODELS[model_name].fit)]
    if model_name == "ours":
        sources += [inspect.getfile(m) for m in (ours, traits)]
    for source in sources:
        digest.update(Path(source).read_bytes())
    for zoo in (*TASKS[name].zoos, *(TASKS[name].optional)):
        digest.update(_of_zoo(zoos / zoo, TASKS[name].files).encode())
    return digest.hexdigest()[:16]


@cache
def _of_zoo(folder: Path, files: tuple[str, ...]) -> str:
    digest = hashlib.sha256()
    for path in sorted(p for pattern in files for p in folder.glob(pattern)):
        digest.update(path.name.encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()
