"""Build a zoo: plan the banks, train them on a worker a core, write a shard each, then the index.

Each bank is a function of the plan and its own number, so a killed build loses at most the banks in flight, and a
resumed one ends in the same bytes whatever the number of workers.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import safe_open
from safetensors.torch import save as serialise
from tqdm import tqdm

from lolgen.errors import LolgenError
from lolgen.lora import LoRA, Spec
from lolgen.zoo.zoo import ROW, shard_tensors


class Worker(Protocol):
    """A base model in the hand, and how LoRAs of it are trained."""

    @property
    def spec(self) -> Spec: ...

    @property
    def fingerprint(self) -> str: ...

    def train(self, rows: list[ROW], number: int) -> tuple[list[LoRA], list[ROW]]:
        """The LoRAs of bank `number`, and its rows with what is known only now."""
        ...


class Buildable(Protocol):
    """What a plan has to say for its zoo to be built."""

    @property
    def name(self) -> str: ...

    def to_json(self) -> dict[str, Any]: ...

    def banks(self) -> list[list[ROW]]: ...

    def worker(self, base_folder: str | Path) -> Worker: ...


_worker: Worker | None = None


def _start(plan: Buildable, base_folder: str) -> None:
    global _worker
    torch.set_num_threads(1)
    _worker = plan.worker(base_folder)


def _build(worker: Worker, number: int, rows: list[ROW], path: str) -> int:
    loras, done = worker.train(rows, number)
    data = serialise(
        shard_tensors(worker.spec, loras, torch.float16), {"rows": json.dumps(done, sort_keys=True)}
    )
    _write(Path(path), data)
    return len(rows)


def _write(path: Path, data: bytes) -> None:
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.write_bytes(data)
    os.replace(tmp, path)


def build(
    plan: Buildable,
    base_folder: str | Path,
    out: str | Path,
    *,
    workers: int = 2,
    only: Sequence[int] | None = None,
) -> Path:
    """Train what is missing of `plan` and write the zoo to `out`; LolgenError if `out` holds another plan.

    `only`: numbers of the banks to train in this call (the index is written once all are there).
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    worker = plan.worker(base_folder)
    info = {
        "name": plan.name, "base": worker.fingerprint, "spec": worker.spec.to_json(), "plan": plan.to_json(),
    }  # fmt: skip
    started = out / "plan.json"
    for found in (started, out / "zoo.json"):
        if found.exists() and json.loads(found.read_text("utf-8")) != json.loads(json.dumps(info)):
            raise LolgenError(
                f"{out}: found a zoo of another plan or base, wanted this one; choose another folder"
            )
    _write(started, json.dumps(info, indent=1, sort_keys=True).encode())
    banks = plan.banks()
    paths = [out / f"shard-{i:04d}.safetensors" for i in range(len(banks))]
    todo = [i for i in (only if only is not None else range(len(banks))) if not paths[i].exists()]
    bar = tqdm(
        total=sum(map(len, banks)), initial=sum(len(banks[i]) for i in range(len(banks)) if paths[i].exists()),
        unit="LoRA", desc=plan.name, mininterval=5, smoothing=0.05,
    )  # fmt: skip
    jobs = [(i, banks[i], str(paths[i])) for i in todo]
    if workers <= 1:
        torch.set_num_threads(1)
        for job in jobs:
            bar.update(_build(worker, *job))
    elif jobs:
        context = multiprocessing.get_context("spawn")
        with context.Pool(workers, _start, (plan, str(base_folder))) as pool:
            for done in pool.imap_unordered(_star, jobs):
                bar.update(done)
    bar.close()
    if all(p.exists() for p in paths):
        write_index(out, paths, info)
        started.unlink()
    return out


def _star(job: tuple[int, list[ROW], str]) -> int:
    assert _worker is not None
    return _build(_worker, *job)


def write_index(out: Path, paths: Sequence[Path], info: dict[str, Any]) -> None:
    """index.jsonl and zoo.json from the headers of the shards."""
    lines = []
    for path in paths:
        with safe_open(path, framework="pt") as f:
            rows = json.loads(f.metadata()["rows"])
        lines += [json.dumps({"shard": path.name, "row": i, **r}, sort_keys=True) for i, r in enumerate(rows)]
    _write(out / "index.jsonl", ("\n".join(lines) + "\n").encode())
    _write(out / "zoo.json", (json.dumps(info, indent=1, sort_keys=True) + "\n").encode())
