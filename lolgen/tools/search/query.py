"""Ask an index: what is like this adapter, and which of the indexed are the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lolgen import io
from lolgen.errors import LolgenError
from lolgen.lora import LoRA
from lolgen.tools.inspect.relatives import SAME, groups
from lolgen.tools.search.exact import likeness
from lolgen.tools.search.sketch import direction
from lolgen.tools.search.store import FOLDER, Row, Store

EXACT = 20_000
"""Up to so many vectors every one is looked at; beyond, usearch's graph finds the neighbours."""


@dataclass(frozen=True)
class Hit:
    """`cosine`: exact, from the files; `estimate`: of the sketches; `strength`: norm over the query's."""

    path: str
    cosine: float
    strength: float
    estimate: float
    family: str | None


def open_index(index: str | Path | None, near: str | Path = ".") -> Store:
    """The index at `index`, or the first `.lolgen-search` in `near` or above it."""
    if index is not None:
        return Store(index)
    start = Path(near).resolve()
    for folder in (start, *start.parents):
        if (folder / FOLDER).is_dir():
            return Store(folder / FOLDER)
    raise LolgenError(
        f"{near}: found no {FOLDER} here or above; make one (lolgen search index), or name it by --index"
    )


def like(store: Store, path: str | Path, n: int = 10) -> list[Hit]:
    """The n indexed adapters most like the one at `path`, best first; itself, if it is indexed, left out.

    The nearest sketches are found first, and ranked by the exact cosine of the files. FormatError when the file is
    no LoRA; LolgenError when its delta W is zero or overflows.
    """
    if n < 1:
        raise LolgenError(f"-n: found {n}, wanted 1 or more")
    query = io.load(path)
    vector = direction(query)
    if vector is None:
        raise LolgenError(f"{path}: delta W is zero, or overflows: nothing is like it")
    rows = {r.id: r for r in store.rows()}
    index = store.index()
    if not len(index):
        return []
    count = min(len(index), 4 * n + 20)
    found = index.search(vector.numpy(), count, exact=len(index) <= EXACT)
    me = Path(path).resolve()
    hits = []
    for key, distance in zip(found.keys.tolist(), found.distances.tolist(), strict=True):
        row = rows.get(int(key))
        if row is None or (store.root / row.path).resolve() == me:
            continue
        one = _compared(query, store, row)
        if one is not None:
            hits.append(Hit(row.path, *one, estimate=round(1 - distance, 4), family=row.family))
    return sorted(hits, key=lambda h: -h.cosine)[:n]


def _compared(query: LoRA, store: Store, row: Row) -> tuple[float, float] | None:
    """(cosine, strength); None for a file that is gone, changed for the worse, or of other shapes."""
    try:
        found = likeness(query, io.load(store.root / row.path))
    except LolgenError:
        return None
    return round(found.cosine, 6), round(found.strength, 6)


def duplicates(store: Store, threshold: float = SAME) -> list[dict[str, Any]]:
    """Groups of adapters whose delta W have a cosine of at least `threshold`, whatever gauge, rank, precision and
    format: {"files": [...], "pairs": [{"a", "b", "cosine", "strength"}]}; files of the same bytes are not read."""
    if not 0.5 <= threshold <= 1:
        raise LolgenError(f"--threshold: found {threshold:g}, wanted a cosine between 0.5 and 1")
    rows = {r.id: r for r in store.rows()}
    pairs: list[dict[str, Any]] = []
    loaded: dict[int, LoRA | None] = {}
    for i, j in _close(store, threshold):
        a, b = rows[i], rows[j]
        if a.sha256 and a.sha256 == b.sha256:
            pairs.append({"a": a.path, "b": b.path, "cosine": 1.0, "strength": 1.0, "same_bytes": True})
            continue
        for row in (a, b):
            if row.id not in loaded:
                if len(loaded) > 64:
                    loaded.clear()
                loaded[row.id] = _load(store, row)
        x, y = loaded.get(i) or _load(store, a), loaded.get(j) or _load(store, b)
        if x is None or y is None:
            continue
        try:
            found = likeness(x, y)
        except LolgenError:
            continue
        if found.cosine >= threshold:
            pairs.append({"a": a.path, "b": b.path, "cosine": round(found.cosine, 6),
                          "strength": round(found.strength, 6), "same_bytes": False})  # fmt: skip
    found_groups = groups([(p["a"], p["b"]) for p in pairs])
    return [{"files": g, "pairs": [p for p in pairs if p["a"] in g]} for g in found_groups]


def _load(store: Store, row: Row) -> LoRA | None:
    try:
        return io.load(store.root / row.path)
    except LolgenError:
        return None


def _close(store: Store, threshold: float, most: int = 32) -> Iterator[tuple[int, int]]:
    """Pairs of ids whose sketches are near enough for the cosine to reach the threshold, each once."""
    # The sketch of a small difference is off by a share of that difference: near 1 the margin may be small.
    cut = 1 - min(0.5, 3 * (1 - threshold) + 0.005)
    index = store.index()
    rows = [r for r in store.rows(sketches=True) if r.sketch is not None]
    if len(rows) < 2:
        return
    seen: set[tuple[int, int]] = set()
    while rows:
        count = min(most, len(index))
        matrix = np.stack([r.sketch for r in rows])  # type: ignore[misc]
        found = index.search(matrix, count, exact=len(index) <= EXACT)
        crowded = []
        keys, distances = found.keys.reshape(len(rows), -1), found.distances.reshape(len(rows), -1)
        for row, near, far in zip(rows, keys, distances, strict=True):
            for key, distance in zip(near.tolist(), far.tolist(), strict=True):
                pair = (min(row.id, int(key)), max(row.id, int(key)))
                if pair[0] != pair[1] and 1 - distance >= cut and pair not in seen:
                    seen.add(pair)
                    yield pair
            if count < len(index) and 1 - float(far[-1]) >= cut:
                crowded.append(row)  # more neighbours than were asked for
        rows, most = crowded, most * 4
