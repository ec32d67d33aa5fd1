"""What the tab Speak shows, as HTML: perplexities, a shaded passage, continuations. Everything foreign is escaped."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape
from typing import Any

from lolgen.language.windows import LENGTH

from . import html

STEPS = (0.02, 0.1, 0.25)
"""By how much a token's probability must change for each shade, as a share."""
MOST = 5
"""Tokens in each list of the most changed."""

Heard = Mapping[str, Any]
"""What `pipeline.listen` gives."""


def blend(shares: Mapping[str, float]) -> str:
    """Who is in it, with what share, if there is more than one."""
    if len(shares) < 2:
        return ""
    cells = "".join(f"<li>{escape(name)} <b>{100 * w:.0f} %</b></li>" for name, w in shares.items())
    return f'<ul class="ll-blend">{cells}</ul>'


def use(code: str) -> str:
    return f'<p class="ll-usage">Use it with <code>{escape(code)}</code></p>'


def figures(before: Heard, after: Heard) -> str:
    """Perplexity before and after, and the change."""
    return html.facts(
        {
            "Base model alone": f"{before['perplexity']:.2f}",
            "With the adapter": f"{after['perplexity']:.2f}",
            "Change": _change(before, after),
        }
    )


def verdict(before: Heard, after: Heard) -> str:
    """In words, whether the passage is expected better."""
    if after["perplexity"] < before["perplexity"]:
        text = "The model expects this passage better with the adapter."
        return html.notices([], text)
    return html.notices(["The model does not expect this passage better with this adapter."])


def context(before: Heard, after: Heard) -> str:
    """What the figure above is of, and what it is where the model sees all that came before."""
    return (
        f'<p class="ll-note">The passage is read in stretches of {LENGTH} tokens, each with nothing before it: so '
        "these adapters were trained and judged, and there the perplexity of their presidents falls by 1 to 5 %. Read "
        f"as one text, all of it in view, it is {before['perplexity']:.2f} alone and {after['perplexity']:.2f} with "
        f"the adapter ({_change(before, after)}): the more a model sees of a text, the less these adapters add.</p>"
    )


def shaded(before: Heard, after: Heard) -> str:
    """The passage, every token on a shade of its change, with a legend and how many changed which way."""
    spans, more, less = [], 0, 0
    for piece, x, y in _moved(before, after):
        level = _level(x - y)
        more, less = more + (level > 0), less + (level < 0)
        shade = f' class="{"ll-more" if level > 0 else "ll-less"}-{abs(level)}"' if level else ""
        spans.append(f'<span{shade} title="{_title(x, y)}">{escape(piece)}</span>')
    shades = range(1, len(STEPS) + 1)
    swatches = {"more": "".join(f'<i class="ll-more-{k}"></i>' for k in shades),
                "less": "".join(f'<i class="ll-less-{k}"></i>' for k in reversed(shades))}  # fmt: skip
    same = len(spans) - more - less
    return (
        f'<p class="ll-key"><span>{less} less likely</span> <span aria-hidden="true">{swatches["less"]}</span> '
        f'<span>{same} about the same</span> <span aria-hidden="true">{swatches["more"]}</span> '
        f"<span>{more} likelier</span></p>"
        f'<p class="ll-passage">{"".join(spans)}</p>'
        '<p class="ll-note">Shades begin where the probability of a token changes by 2, 10 and 25 %; '
        "what became less likely is underlined too.</p>"
    )


def extremes(before: Heard, after: Heard) -> str:
    """The tokens that changed most, with their figures, for those who cannot point."""
    rows = sorted(_moved(before, after), key=lambda r: r[2] - r[1])
    lists = []
    for text, found in {
        "Gained most": [r for r in rows[:MOST] if r[1] > r[2]],
        "Lost most": [r for r in rows[::-1][:MOST] if r[1] < r[2]],
    }.items():
        if found:
            cells = "".join(
                f"<li><b>{escape(piece.strip() or 'space')}</b> {_percent(math.exp(min(x - y, 50)) - 1)}</li>"
                for piece, x, y in found
            )
            lists.append(f'<div><span>{text}</span><ul class="ll-blend">{cells}</ul></div>')
    return f'<div class="ll-extremes">{"".join(lists)}</div>' if lists else ""


def continuations(opening: str, base: str, adapter: str) -> str:
    """What both write after the same words, side by side."""
    cells = "".join(
        f"<figure><figcaption>{name}</figcaption><blockquote><b>{escape(opening.strip())}</b>{escape(text)} ..."
        "</blockquote></figure>"
        for name, text in {"Base model alone": base, "With the adapter": adapter}.items()
    )
    return f'<div class="ll-said">{cells}</div>'


def _moved(before: Heard, after: Heard) -> list[tuple[str, float, float]]:
    """(piece, its surprisal in nats before, after)."""
    return list(zip(before["pieces"], before["nats"], after["nats"], strict=True))


def _level(gain: float) -> int:
    """Nats that a token gained -> its shade, -3 to 3."""
    level = sum(abs(gain) > math.log1p(step) for step in STEPS)
    return level if gain > 0 else -level


def _title(x: float, y: float) -> str:
    way = "likelier" if y < x else "less likely"
    return f"{way}: probability {100 * math.exp(-x):.3g} % to {100 * math.exp(-y):.3g} %"


def _change(before: Heard, after: Heard) -> str:
    return _percent(after["perplexity"] / before["perplexity"] - 1, digits=2)


def _percent(share: float, digits: int = 0) -> str:
    """A change with its sign; the minus is a real one."""
    text = f"{100 * abs(share):.{digits}f} %"
    return text if float(text[:-2]) == 0 else f"{'+' if share > 0 else '−'}{text}"
