"""How well and how fast `lolgen search` finds, beside the exact Gram matrix of everything, on the real zoo of faces.

    python -m train.search_bench --out reports        # search.json; about 1 min on one core

A thousand of the zoo's LoRAs (of the embedded base, real ones) are written as kohya files and indexed. The truth is
`lolgen.metrics.gram` over all of them, which needs every LoRA in memory. Recall: of the exact nearest of a query, how
many the search gives. Duplicates: fifty LoRAs are written again in another gauge, rank, format and in float16. The
error of the sketch is the root mean square of (its cosine - the exact one) over pairs, for several sizes, on the zoo
(7 modules, the hardest case) and on random LoRAs of 64 modules.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from lolgen import gl, io, metrics
from lolgen.lora import Batch, LoRA, ModuleSpec, Spec
from lolgen.paths import zoos_dir
from lolgen.testing import random_lora, regauge
from lolgen.tools.search import sketch as sketching
from lolgen.tools.search.build import build
from lolgen.tools.search.query import duplicates, like
from lolgen.tools.search.store import FOLDER, Store
from lolgen.zoo.zoo import Zoo

SIZES = (8, 16, 32, 64)


def sketch_errors(loras: list[LoRA]) -> dict[str, float]:
    """p -> root mean square error of the cosine over all pairs."""
    exact = metrics.gram(Batch.stack(loras, torch.float64))
    size = exact.diagonal().sqrt()
    cosines = exact / size / size[:, None]
    off = torch.triu(torch.ones_like(cosines), 1).bool()
    found = {}
    for p in SIZES:
        x = torch.stack([sketching.sketch(lora, p) for lora in loras])
        x = x / x.norm(dim=1, keepdim=True)
        found[str(p)] = round(float((x @ x.T - cosines)[off].square().mean().sqrt()), 4)
    return found


def again(lora: LoRA, i: int, folder: Path) -> None:
    """The same delta W in another gauge, at another rank, in another format and precision."""
    other = regauge(lora, condition=20.0, generator=torch.Generator().manual_seed(i))[0]
    U_V = {n: gl.pad(f.U, f.V, f.rank + 2) for n, f in other.factors.items()}
    factors = {n: type(other[n])(U, V.T.contiguous()) for n, (U, V) in U_V.items()}
    form = ("diffusers", "kohya", "peft")[i % 3]
    name = f"copy{i}" if form == "peft" else f"copy{i}.safetensors"
    io.save(other.replace(factors), folder / name, form, dtype=torch.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--loras", type=int, default=1000)
    parser.add_argument("--queries", type=int, default=50)
    parser.add_argument("--out", type=Path, default=Path("reports"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    zoo = Zoo.open(zoos_dir() / "faces")
    batch = Zoo(zoo.folder, zoo.info, zoo.rows[: args.loras]).load()
    loras = batch.unstack()
    report: dict[str, Any] = {"command": "python -m train.search_bench", "loras": len(loras), "threads": 1}
    report["sketch_error"] = {"faces": sketch_errors(loras[:300])}
    wide = Spec(tuple(ModuleSpec(f"m.{i}", 96, 128) for i in range(64)))
    g = torch.Generator().manual_seed(0)
    report["sketch_error"]["random, 64 modules"] = sketch_errors(
        [random_lora(wide, 8, generator=g) for _ in range(40)]
    )
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        for i, lora in enumerate(loras):
            io.save(lora, folder / f"{i % 16}" / f"{i}.safetensors", "kohya")
        done = build(folder)
        again_done = build(folder)
        report["index"] = {
            "seconds": done.seconds,
            "files_a_second": round(done.indexed / done.seconds, 1),
            "seconds_when_nothing_changed": again_done.seconds,
            "bytes_a_file": round(sum(f.stat().st_size for f in (folder / FOLDER).iterdir()) / done.indexed),
        }
        store = Store(folder / FOLDER)
        start = time.perf_counter()
        gram = metrics.gram(batch, dtype=torch.float32)
        report["gram_of_all_seconds"] = round(time.perf_counter() - start, 2)
        size = gram.diagonal().sqrt()
        cosines = (gram / size / size[:, None]).fill_diagonal_(-2)
        hit, seconds = 0, []
        step = max(1, len(loras) // args.queries)
        for i in range(0, len(loras), step):
            start = time.perf_counter()
            found = like(store, folder / f"{i % 16}" / f"{i}.safetensors", 10)
            seconds.append(time.perf_counter() - start)
            wanted = {f"{j % 16}/{j}.safetensors" for j in cosines[i].topk(10).indices.tolist()}
            hit += len(wanted & {h.path for h in found})
        report["like"] = {
            "queries": len(seconds),
            "recall_at_10": round(hit / (10 * len(seconds)), 4),
            "seconds_a_query": round(sorted(seconds)[len(seconds) // 2], 4),
        }
        copied = range(0, len(loras), max(1, len(loras) // 50))
        for i in copied:
            again(loras[i], i, folder / "copies")
        build(folder)
        start = time.perf_counter()
        groups = duplicates(Store(folder / FOLDER))
        wanted_pairs = {(f"copies/copy{i}", f"{i % 16}/{i}") for i in copied}
        pairs = {
            tuple(p.removesuffix(".safetensors") for p in sorted(g["files"], reverse=True)) for g in groups
        }
        report["duplicates"] = {
            "copies": len(wanted_pairs),
            "found": len(wanted_pairs & pairs),
            "false": len(pairs - wanted_pairs),
            "seconds": round(time.perf_counter() - start, 2),
        }
        shutil.rmtree(folder / "copies")
    print(json.dumps(report, indent=1))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "search.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
