"""Index a folder of adapters: read what is new or changed, forget what is gone, note what is bad."""

from __future__ import annotations

import hashlib
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lolgen.errors import LolgenError
from lolgen.io import peft
from lolgen.tools.inspect.source import find, open_source
from lolgen.tools.search.sketch import direction
from lolgen.tools.search.store import FOLDER, Row, Store

SAVE_EVERY = 32
"""Files between two commits: the most that a kill costs."""


@dataclass
class Built:
    """What a run of `build` did, in files; `bad`: path -> error of every file that is no LoRA, old ones included."""

    indexed: int = 0
    unchanged: int = 0
    removed: int = 0
    total: int = 0
    bad: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def build(folder: str | Path, index: str | Path | None = None) -> Built:
    """Index every adapter below `folder` in `index` (default: `.lolgen-search` in the folder itself).

    Files whose size and time, or failing that whose sha256, are known are not read again; those that are gone drop
    out; a bad one is a row with its error. LolgenError when the folder is not there or the index cannot be used.
    """
    start = time.perf_counter()
    root = Path(folder)
    if not root.is_dir():
        raise LolgenError(f"{folder}: found no such folder, wanted a folder of adapters")
    store = Store(index if index is not None else root / FOLDER, root=root)
    try:
        done = _update(store, root)
        store.save_index()
    finally:
        store.close()
    done.seconds = round(time.perf_counter() - start, 2)
    return done


def _update(store: Store, root: Path) -> Built:
    done = Built()
    known = {r.path: r for r in store.rows()}
    places = {_relative(p, root): p for p in find([root])}
    gone = [p for p in known if p not in places]
    store.drop(gone)
    done.removed = len(gone)
    waiting = 0
    for path, place in tqdm(places.items(), desc="index", unit="file", leave=False, disable=None):
        old = known.get(path)
        stamp = _stamp(place)
        if old is not None and old.stamp == stamp:
            done.unchanged += 1
            continue
        digest = _digest(place)
        if old is not None and old.sha256 == digest:
            store.touch(path, stamp)
            done.unchanged += 1
        else:
            store.put(read(place, path, stamp, digest))
            done.indexed += 1
        waiting += 1
        if waiting >= SAVE_EVERY:
            store.commit()
            waiting = 0
    store.commit()
    done.total = len(places)
    done.bad = {r.path: r.error for r in store.rows() if r.error is not None}
    return done


def read(place: Path, path: str, stamp: str, digest: str) -> Row:
    """The row of a file, its error if it has one."""
    try:
        source = open_source(place)
    except LolgenError as error:
        return Row(path, stamp, digest, error=str(error))
    if source.lora is None:
        why = f"{place}: {source.reason}"
        return Row(path, stamp, digest, error=why, family=source.family.name, format=source.format)
    vector = direction(source.lora)
    return Row(
        path, stamp, digest, family=source.family.name, format=source.format, modules=len(source.lora),
        sketch=None if vector is None else vector.numpy(),
    )  # fmt: skip


def _relative(place: Path, root: Path) -> str:
    return place.relative_to(root).as_posix()


def _files(place: Path) -> list[Path]:
    """What an adapter consists of."""
    if not place.is_dir():
        return [place]
    return sorted([*place.glob("*.safetensors"), *place.glob(peft.CONFIG)])


def _stamp(place: Path) -> str:
    """Sizes and times of the files; "" where they cannot be read."""
    try:
        found = [(f.name, f.stat()) for f in _files(place)]
    except OSError:
        return ""
    return " ".join(f"{name}:{s.st_size}:{s.st_mtime_ns}" for name, s in found)


def _digest(place: Path) -> str:
    """sha256 of the content of the files, names of a folder's own files included; "" where they cannot be read."""
    total = hashlib.sha256()
    try:
        for file in _files(place):
            if place.is_dir():
                total.update(f"{file.name}:{file.stat().st_size}\n".encode())
            with file.open("rb") as f:
                total.update(hashlib.file_digest(f, "sha256").digest())
    except OSError:
        return ""
    return total.hexdigest()
