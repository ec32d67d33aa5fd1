"""What a LoRA is asked to be, as the vector that conditions the generator.

Indicators of the attributes' values (all zero: cannot be seen), indicators of which drawing of each visible part the
identity has, of how its prompts name it, and how strongly it was trained. Users ask for attributes; drawings are
sampled, so that two people with the same attributes are two people. Strength is a condition because real zoos hold weak
and strong LoRAs: the generator learns the difference, and is asked for a strong one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lolgen import pictures

WIDTHS: tuple[int, ...] = tuple(len(v) for v in pictures.ATTRIBUTES.values())
PARTS: dict[str, int] = {"top": 3, "glasses": 2, "beard": 2, "hat_color": 2, "brows": 2}
"""Part -> number of its drawings (fields of `pictures.Identity`)."""
_NAMES = tuple(pictures.ATTRIBUTES)
_TOPS = pictures.ATTRIBUTES["top"]
DRAWINGS: tuple[tuple[str, str, str | None, int], ...] = (
    *(("top", "top", value, 3) for value in _TOPS if value != "bald"),
    ("glasses", "glasses", "yes", 2),
    ("beard", "beard", "yes", 2),
    ("hat_color", "top", "hat", 2),
    ("brows", "", None, 2),
)
"""(part, attribute, value that shows it, number of drawings) in the order of the condition; brows always show."""
IDENTITY = sum(WIDTHS) + sum(count for *_, count in DRAWINGS)
"""Length of the leading part: indicators of attributes and of drawings."""
LENGTH = IDENTITY + len(pictures.SUBJECTS) + 1
"""C, the length of a condition vector."""


def conditions(labels: Tensor, parts: Tensor, subjects: Tensor, strength: Tensor) -> Tensor:
    """labels (N, attributes) long, negative where not visible; parts (N, 5) long in the order of PARTS; subjects (N,)
    index into `pictures.SUBJECTS`; strength (N,), about -1 to 1 -> (N, C) float32."""
    blocks = [
        one_hot(labels[:, k].clamp(min=0), width) * (labels[:, k : k + 1] >= 0)
        for k, width in enumerate(WIDTHS)
    ]
    top = labels[:, _NAMES.index("top")]
    drawings = one_hot(parts[:, 0], 3)
    # The drawings of short hair, long hair and hats are different things; baldness has one.
    blocks += [drawings * (top == k)[:, None] for k, name in enumerate(_TOPS) if name != "bald"]
    shown = {
        "glasses": labels[:, _NAMES.index("glasses")] == 1,
        "beard": labels[:, _NAMES.index("beard")] == 1,
        "hat_color": top == _TOPS.index("hat"),
        "brows": torch.ones_like(top, dtype=torch.bool),
    }
    blocks += [one_hot(parts[:, k], 2) * shown[n][:, None] for k, n in enumerate(PARTS) if n in shown]
    blocks.append(one_hot(subjects, len(pictures.SUBJECTS)))
    return torch.cat([*[b.float() for b in blocks], strength[:, None].float()], 1)


def sample_parts(generator: torch.Generator) -> list[int]:
    """A drawing for every part, uniform."""
    return [int(torch.randint(n, (), generator=generator)) for n in PARTS.values()]


def strength_of(recipe: Mapping[str, float]) -> float:
    """log2 of learning rate times steps, centred: 0 for 60 steps of 4e-3, 1 for eight times as much."""
    return float(torch.log2(torch.tensor(recipe["lr"] * recipe["steps"] / (4e-3 * 60)))) / 3


def complete(
    request: Mapping[str, str], marginals: Sequence[Tensor], generator: torch.Generator
) -> dict[str, str]:
    """The request with every attribute that it leaves open drawn from `marginals` (one (values,) each).

    What is asked for shows: hair colour is not asked of somebody who is drawn without hair, unless the request
    itself says so.
    """
    for _ in range(1000):
        full: dict[str, str] = {}
        for (name, values), p in zip(pictures.ATTRIBUTES.items(), marginals, strict=True):
            k = int(torch.multinomial(p, 1, generator=generator))
            full[name] = request.get(name, values[k])
        if all(pictures.visible(full, name) for name in request):
            break
    return full
