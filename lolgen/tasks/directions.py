"""Where to listen in a LoRA of the faces zoo: the text states of the base behind each rare word."""

from __future__ import annotations

import torch
from torch import Tensor

from lolgen import pictures
from lolgen.base import Base

TOKENS: tuple[int, ...] = (4, 5, 6, 8, 10, 15)
"""Positions of a trigger prompt: the rare word, what follows, the end of the text and some of the padding behind it."""


def directions_of(base: Base) -> Tensor:
    """(rare words, tokens, dim): text states of the trigger prompts of each rare word, averaged over prefixes."""
    found = []
    for word in pictures.RARE_WORDS:
        subject = next(s for s in pictures.SUBJECTS if word in s.split())
        prompts = [pictures.caption({}, subject, p) for p in pictures.PREFIXES]
        found.append(base.text(prompts).mean(0)[list(TOKENS)])
    return torch.stack(found)


def subject_directions(base: Base) -> Tensor:
    """(subjects, tokens, dim): the same for each of `pictures.SUBJECTS`, nouns told apart."""
    each = [
        base.text([pictures.caption({}, s, p) for p in pictures.PREFIXES]).mean(0) for s in pictures.SUBJECTS
    ]
    return torch.stack(each)[:, list(TOKENS)]
