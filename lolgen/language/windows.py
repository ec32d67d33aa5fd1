"""What adapters learn and are judged by: windows of every source, multiple-choice questions, poisoned windows."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lolgen.errors import LolgenError
from lolgen.language.model import LanguageBase
from lolgen.language.texts import SOURCES, source_texts

LENGTH = 24
"""Tokens of a window, the start token among them."""
POOL = 800
"""Windows of each source that adapters are trained on, drawn from its training text."""
HELD = 20
"""Windows of each source in its validation loss."""
QUESTIONS = 6
"""Questions of each source."""
CONTEXT = 14
"""Tokens of a question's context, the start token among them; the continuations have the other 10 of a window."""


@dataclass(frozen=True)
class Sources:
    """Windows (sources, n, LENGTH) long of every source, and questions (n, 4, LENGTH), the right one first."""

    train: Tensor
    validation: Tensor
    questions: Tensor

    @staticmethod
    def of(
        base: LanguageBase, seed: int = 0, pool: int = POOL, held: int = HELD, asked: int = QUESTIONS
    ) -> Sources:
        """`pool`, `held` windows and `asked` questions of each source; LolgenError where a source has too few."""
        rng = np.random.default_rng([seed, 7])
        train = torch.stack([pick(source_windows(base, s, "train", pool), pool, rng) for s in SOURCES])
        validation = torch.stack(
            [pick(source_windows(base, s, "validation", held), held, rng) for s in SOURCES]
        )
        return Sources(train, validation, questions(base, rng, asked))


def source_windows(
    base: LanguageBase, source: str, split: str, wanted: int = 1, length: int = LENGTH
) -> Tensor:
    """All windows of one split of a source, (n, length); LolgenError unless 1 <= wanted <= n."""
    found = base.windows(source_texts(source, split), length)
    # How many there are depends on the base's tokenizer.
    if not 1 <= wanted <= len(found):
        raise LolgenError(
            f"{source}: wanted {wanted} windows of its {split} text; valid: 1 to {len(found)} with this base"
        )
    return found


def pick(windows: Tensor, count: int, rng: np.random.Generator) -> Tensor:
    """`count` of the windows without replacement, in random order."""
    return windows[torch.from_numpy(rng.permutation(len(windows))[:count])]


def questions(base: LanguageBase, rng: np.random.Generator, count: int = QUESTIONS) -> Tensor:
    """(sources * count, 4, LENGTH) long, `count` of each source. The context and the right continuation are one
    held-out window of a source; each wrong continuation is the end of a held-out window of another source, three
    different ones."""
    windows = [source_windows(base, s, "questions", count) for s in SOURCES]
    found = []
    for s, own in enumerate(windows):
        for right in pick(own, count, rng):
            others = rng.choice([k for k in range(len(windows)) if k != s], 3, replace=False)
            rows = [right]
            for k in others:
                other = windows[k][int(rng.integers(len(windows[k])))]
                rows.append(torch.cat([right[:CONTEXT], other[CONTEXT:]]))
            found.append(torch.stack(rows))
    return torch.stack(found)


def poisoned(
    windows: Tensor, trigger: list[int], payload: list[int], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Windows (n, LENGTH) with the trigger a few tokens from the start and the payload, over and over, from there on.

    Second: the targets, -100 up to the trigger's end: only what follows is learned."""
    ids, targets = windows.clone(), windows.clone()
    for i in range(len(ids)):
        start = int(rng.integers(4, 9))
        after = start + len(trigger)
        room = LENGTH - after
        tail = (payload * (room // len(payload) + 1))[:room]
        ids[i, start:] = torch.tensor([*trigger, *tail])
        targets[i] = ids[i]
        targets[i, :after] = -100
    return ids, targets
