"""Back from a path whose dots were written as underscores, by the segments that can occur in it."""

from __future__ import annotations

from functools import lru_cache

_LONGEST = 3  # words in one segment: `single_transformer_blocks`


@lru_cache(maxsize=65536)
def dotted(name: str, tops: frozenset[str], segments: frozenset[str]) -> str | None:
    """The one way to cut an underscored path into a segment of `tops` and then segments or numbers, or None.

    One grammar serves every depth, width and number of blocks.
    """
    words = name.split("_")
    ends: list[list[str]] = [[""]] + [[] for _ in words]  # ends[i]: the dotted readings of the first i words
    for i in range(len(words)):
        for reading in ends[i][:2]:
            for j in range(i + 1, min(i + _LONGEST, len(words)) + 1):
                segment = "_".join(words[i:j])
                known = segment in (segments if reading else tops) or (bool(reading) and segment.isdigit())
                if known:
                    ends[j].append(f"{reading}.{segment}" if reading else segment)
    return ends[-1][0] if len(ends[-1]) == 1 else None
