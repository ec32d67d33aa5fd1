"""`lolgen eval predict`: how well each model reads attributes off LoRAs of identities it has never seen.

Writes `predict.json` and `predict.md` into the output folder. Every finished fit is kept in `.cache` there, so a
killed run goes on where it stopped; another zoo, other settings or other code start afresh.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lolgen import pictures, probe
from lolgen.errors import LolgenError
from lolgen.io.atomic import write_file
from lolgen.lora import Batch
from lolgen.tasks import ours
from lolgen.tasks.models import MODELS, SOURCES, model
from lolgen.tasks.reader import FULL, QUICK
from lolgen.zoo.zoo import Zoo

ROW = "attributes"
"""The row of the mean over attributes; the others are named after one attribute each."""
SPLITS = ("train", "validation", "test")
_SHARED = ("features", "predict", "reader", "ridge", "token_net", "training", "traits")
"""Files beside the models' own, one a model, whose change makes kept results stale."""
Data = dict[str, tuple[Batch, Tensor]]
Result = dict[str, Any]
"""Of one fit: `accuracy` (row -> share of visible labels read right) and `config`."""


def evaluate(
    zoo: str | Path,
    models: Sequence[str] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    out: str | Path = "reports",
    *,
    quick: bool = False,
    rank: int = 4,
    classes: Mapping[str, int] | None = None,
    directions: Tensor | None = None,
) -> dict[str, Any]:
    """Fit `models` (default: all) on the train split, choose on validation, score on test; the report, as written.

    Each model chooses its configuration with the first seed and keeps it for the others; models without randomness
    run once. `quick`: one seed, 200 LoRAs and a small budget, to see that everything works. `rank`: of the LoRAs
    read. `classes`: attribute -> number of classes, in the order of the zoo's labels (default: the portraits').
    `directions` (words, tokens, in): where `ours` listens in a LoRA, see
    `lolgen.tasks.directions`; without them it reads by what the LoRAs alone tell.
    LolgenError for an unknown model, or a zoo that lacks a split.
    """
    names = list(MODELS if models is None else models)
    for name in names:
        model(name)
    opened = Zoo.open(zoo)
    layout = dict(classes or {n: len(v) for n, v in pictures.ATTRIBUTES.items()})
    splits = {s: opened.split(s, rank) for s in SPLITS}
    for split, rows in splits.items():
        if not len(rows):
            raise LolgenError(
                f"{zoo}: found no LoRA of rank {rank} in the {split} split, wanted all of {SPLITS}"
            )
    if quick:
        seeds = seeds[:1]
        splits["train"] = Zoo(opened.folder, opened.info, splits["train"].rows[:200])
    cache = _Cache(Path(out), _key(opened, layout, rank, quick, directions))
    jobs = [(n, s) for n in names for s in (seeds if model(n).random else seeds[:1])]
    data: Data = {}
    for name, seed in tqdm(jobs, desc="eval predict", unit="fit"):
        if cache.get(name, seed) is not None:
            continue
        if not data:
            data = {s: (rows.load(), rows.labels()) for s, rows in splits.items()}
        first = cache.get(name, seeds[0])
        config = None if first is None else first["config"]
        cache.put(name, seed, _run(name, data, layout, seed, config, quick, directions))
    results = {n: [found for s in seeds if (found := cache.get(n, s)) is not None] for n in names}
    report = _report(results)
    write_file(Path(out) / "predict.json", (json.dumps(report, indent=1) + "\n").encode())
    counts = {s: len(rows) for s, rows in splits.items()}
    write_file(
        Path(out) / "predict.md", _markdown(report, results, opened, counts, len(seeds), quick).encode()
    )
    return report


def _run(
    name: str,
    data: Data,
    classes: Mapping[str, int],
    seed: int,
    config: dict[str, float] | None,
    quick: bool,
    directions: Tensor | None,
) -> Result:
    fit = model(name).fit
    if name == "ours":
        fit = partial(ours.fit, directions=directions)
    budget = QUICK if quick else FULL
    reader = fit(*data["train"], *data["validation"], classes, seed, config=config, budget=budget)
    batch, labels = data["test"]
    read = torch.stack([p.argmax(1) for p in reader.predict(batch).values()], dim=1)
    seen = (labels >= 0).any(0).tolist()
    each = zip(classes, probe.accuracy(read, labels).tolist(), seen, strict=True)
    accuracy = {ROW: probe.mean_accuracy(read, labels)} | {n: a for n, a, visible in each if visible}
    return {"accuracy": accuracy, "config": reader.config}


def _report(results: Mapping[str, Sequence[Result]]) -> dict[str, Any]:
    """{"rows": {ROW: {"metric", "higher_is_better", "models": {MODEL: {"mean", "std"}}}}}; std over seeds, n - 1."""
    rows: dict[str, Any] = {}
    for name, found in results.items():
        for row in found[0]["accuracy"]:
            values = [r["accuracy"][row] for r in found]
            entry = rows.setdefault(row, {"metric": "accuracy", "higher_is_better": True, "models": {}})
            std = stdev(values) if len(values) > 1 else 0.0
            entry["models"][name] = {"mean": round(mean(values), 6), "std": round(std, 6)}
    return {"rows": rows}


def _markdown(
    report: Mapping[str, Any],
    results: Mapping[str, Sequence[Result]],
    zoo: Zoo,
    counts: Mapping[str, int],
    seeds: int,
    quick: bool,
) -> str:
    names = list(results)
    lines = [
        "# Reading attributes off LoRAs",
        "",
        f"Written by `lolgen eval predict{' --quick' if quick else ''}` from the zoo `{zoo.info['name']}`: "
        f"{counts['train']} LoRAs to train on, {counts['validation']} to choose on, {counts['test']} to test on. "
        "No combination of visible attributes is in two splits.",
        "Accuracy over the visible labels of the test split; `attributes` is the mean over attributes. "
        f"Mean and standard deviation over {seeds} seed{'s' if seeds > 1 else ''}; one fit where nothing is random.",
        "",
        "| row | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for row, entry in report["rows"].items():
        best = max(m["mean"] for m in entry["models"].values())
        cells = []
        for name in names:
            m = entry["models"][name]
            text = f"{m['mean']:.3f}" + (f" ± {m['std']:.3f}" if len(results[name]) > 1 else "")
            cells.append(f"**{text}**" if m["mean"] == best else text)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    lines += ["", "Chosen on validation:", ""]
    for name in names:
        config = results[name][0]["config"]
        if config:
            lines.append(f"- {name}: " + ", ".join(f"{k} {v:g}" for k, v in config.items()))
    return "\n".join(lines) + "\n"


def _key(
    zoo: Zoo,
    classes: Mapping[str, int],
    rank: int,
    quick: bool,
    directions: Tensor | None,
) -> str:
    """What a kept result depends on: the zoo, the settings and the code of the models."""
    digest = hashlib.sha256(
        json.dumps([zoo.info, zoo.rows, dict(classes), rank, quick], sort_keys=True).encode()
    )
    for name in sorted({r["shard"] for r in zoo.rows}):
        digest.update(hashlib.sha256((zoo.folder / name).read_bytes()).digest())
    for path in (*SOURCES, *(Path(__file__).parent / f"{name}.py" for name in _SHARED)):
        digest.update(path.read_bytes())
    given = {} if directions is None else {"directions": directions}
    for name, S in sorted(given.items()):
        digest.update(name.encode() + S.detach().double().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


class _Cache:
    """One JSON file of results per key: "model/seed" -> Result."""

    def __init__(self, out: Path, key: str) -> None:
        self.path = out / ".cache" / f"predict-{key}.json"
        self.results: dict[str, Result] = {}
        if self.path.is_file():
            self.results = json.loads(self.path.read_text("utf-8"))

    def get(self, name: str, seed: int) -> Result | None:
        return self.results.get(f"{name}/{seed}")

    def put(self, name: str, seed: int, result: Result) -> None:
        self.results[f"{name}/{seed}"] = result
        write_file(self.path, (json.dumps(self.results, indent=1) + "\n").encode())
