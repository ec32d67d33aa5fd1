"""Build a zoo: plan the banks, train them on a worker a core, write a shard each, then the index.

Each bank is a function of the plan and its own number, so a killed build loses at most the banks in flight, and a
resumed one ends in the same bytes whatever the number of workers.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as serialise
from tqdm import tqdm

from lolgen.base import Base
from lolgen.errors import LolgenError
from lolgen.precision import bf16_matmuls
from lolgen.zoo.bank import find_modules
from lolgen.zoo.plan import Plan, banks_of
from lolgen.zoo.training import Prior, Recipe, Task, train_bank
from lolgen.zoo.zoo import shard_tensors

_worker: tuple[Plan, Base, Prior] | None = None


def _start(plan: Plan, base_folder: str) -> None:
    global _worker
    torch.set_num_threads(1)
    base = Base.load(base_folder)
    if torch.cuda.is_available():
        base.to("cuda")
    else:
        bf16_matmuls(base.unet)
    _worker = plan, base, plan.prior(base)


def _build(number: int, rows: list[dict[str, Any]], path: str) -> int:
    assert _worker is not None
    plan, base, prior = _worker
    spec = find_modules(base.unet, plan.targets, "unet.")
    tasks = [Task(Recipe(**r["recipe"]), plan.draw(r)) for r in rows]
    loras = train_bank(
        base, spec, tasks, prior, plan.seed * 100_003 + number,
        batch=plan.batch, prior_batch=plan.prior_batch, prior_weight=plan.prior_weight,
    )  # fmt: skip
    data = serialise(shard_tensors(spec, loras, torch.float16), {"rows": json.dumps(rows, sort_keys=True)})
    _write(Path(path), data)
    return len(rows)


def _write(path: Path, data: bytes) -> None:
    tmp = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    tmp.write_bytes(data)
    os.replace(tmp, path)


def build(
    plan: Plan,
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
    base = Base.load(base_folder)
    spec = find_modules(base.unet, plan.targets, "unet.")
    info = {"name": plan.name, "base": fingerprint(base), "spec": spec.to_json(), "plan": plan.to_json()}
    started = out / "plan.json"
    for found in (started, out / "zoo.json"):
        if found.exists() and json.loads(found.read_text("utf-8")) != json.loads(json.dumps(info)):
            raise LolgenError(
                f"{out}: found a zoo of another plan or base, wanted this one; choose another folder"
            )
    _write(started, json.dumps(info, indent=1, sort_keys=True).encode())
    banks = banks_of(plan)
    paths = [out / f"shard-{i:04d}.safetensors" for i in range(len(banks))]
    todo = [i for i in (only if only is not None else range(len(banks))) if not paths[i].exists()]
    bar = tqdm(
        total=sum(map(len, banks)), initial=sum(len(banks[i]) for i in range(len(banks)) if paths[i].exists()),
        unit="LoRA", desc=plan.name, mininterval=5, smoothing=0.05,
    )  # fmt: skip
    jobs = [(i, banks[i], str(paths[i])) for i in todo]
    if workers <= 1:
        _start(plan, str(base_folder))
        for job in jobs:
            bar.update(_build(*job))
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


def _star(job: tuple[int, list[dict[str, Any]], str]) -> int:
    return _build(*job)


def write_index(out: Path, paths: Sequence[Path], info: dict[str, Any]) -> None:
    """index.jsonl and zoo.json from the headers of the shards."""
    lines = []
    for path in paths:
        with safe_open(path, framework="pt") as f:
            rows = json.loads(f.metadata()["rows"])
        lines += [json.dumps({"shard": path.name, "row": i, **r}, sort_keys=True) for i, r in enumerate(rows)]
    _write(out / "index.jsonl", ("\n".join(lines) + "\n").encode())
    _write(out / "zoo.json", (json.dumps(info, indent=1, sort_keys=True) + "\n").encode())


def fingerprint(base: Base) -> str:
    """sha256 over the UNet's tensors: which base model a zoo belongs to."""
    digest = hashlib.sha256()
    for name, tensor in sorted(base.unet.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
