"""What the app shows, as HTML: pictures, bars, facts. Pure functions; everything foreign is escaped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from . import downloads
from .sessions import Item

LABELS = {"top": "Top", "hair_color": "Hair colour", "glasses": "Glasses", "beard": "Beard",
          "skin": "Skin", "clothes": "Clothes"}  # fmt: skip
SWATCHES: dict[str, dict[str, str]] = {
    "hair_color": {"black": "#1d1a19", "brown": "#7b4a2a", "blonde": "#e9c457", "red": "#d2360f",
                   "white": "#ececec", "pink": "#f26fb0"},
    "skin": {"pale": "#ffdfc4", "tan": "#e0a06c", "brown": "#b0703c", "dark": "#593829"},
    "clothes": {"black": "#22262b", "white": "#f4f4f4", "blue": "#2f6fdb", "red": "#d92626",
                "green": "#2e9e4f", "yellow": "#f6cf2f"},
}  # fmt: skip
"""What the values look like in the pictures; the others are shades of the accent colour."""
SHADES = {"no": "var(--ll-bar-0)", "yes": "var(--ll-bar-1)", "bald": "var(--ll-bar-4)", "short": "var(--ll-bar-3)",
          "long": "var(--ll-bar-2)", "hat": "var(--ll-bar-1)"}  # fmt: skip
FORMAT_WORDS = {
    "peft": ("PEFT", ".zip"),
    "diffusers": ("diffusers", ".safetensors"),
    "kohya": ("kohya", ".safetensors"),
}
UNSURE = 0.8
"""Below this probability a prediction is called unsure."""

Read = Mapping[str, Mapping[str, Any]]
"""{attribute: {"value", "probability", "probabilities": {value: p}}}, as `pipeline.predict` gives it."""


def header() -> str:
    return """
<header class="ll-header">
  <div class="ll-logo" aria-hidden="true"><i></i><i></i></div>
  <div>
    <h1>lolgen</h1>
    <p>Make, change, mix and read <b>LoRAs</b> from their weights alone. Nothing is trained here:
    each answer takes seconds, and what you download loads in stock <code>diffusers</code> and <code>peft</code>.</p>
  </div>
</header>"""


def footer() -> str:
    return """
<footer class="ll-footer">The base model is <b>tiny-sd</b>, a Stable Diffusion in miniature that draws 32 &times; 32
portraits, shown enlarged; that of the tab Speak is <b>tiny-lm</b>, a Llama in miniature. Everything runs on the
machine that serves this page; your files are deleted with your session.</footer>"""


def empty(title: str, text: str) -> str:
    """What stands where a result will be."""
    return f"""<div class="ll-empty"><div class="ll-ghosts" aria-hidden="true"><i></i><i></i><i></i></div>
<b>{escape(title)}</b><span>{escape(text)}</span></div>"""


def panel(*parts: str) -> str:
    return f'<section class="ll-panel">{"".join(parts)}</section>'


def title(item: Item, text: str) -> str:
    """The name of a result and a line on it."""
    return f'<div class="ll-title"><h3>{escape(item.name)}</h3><p>{escape(text)}</p></div>'


def links(item: Item) -> str:
    """Download links, one a format."""
    rows = []
    for format in item.formats:
        word, suffix = FORMAT_WORDS[format]
        rows.append(
            f'<a class="ll-download" data-format="{format}" href="{downloads.link(item, format)}" download>'
            f"{word}<small>{suffix}</small></a>"
        )
    body = "".join(rows) or "<span>no format can hold it whole</span>"
    return f'<div class="ll-links"><span>Download</span>{body}</div>'


def usage(item: Item) -> str:
    return f'<p class="ll-usage">Use it with the prompt <code>{escape(item.prompt)}</code></p>'


def notices(texts: Sequence[str], good: str = "") -> str:
    """Warnings, each in a line of its own; `good` when there are none."""
    if texts:
        rows = "".join(f"<li>{escape(t)}</li>" for t in texts)
        return f'<ul class="ll-notices" role="alert">{rows}</ul>'
    return f'<p class="ll-good">{escape(good)}</p>' if good else ""


def seen(picture: str) -> str:
    """An uploaded picture, as it is taken."""
    return f'<div class="ll-seen"><img src="{picture}" alt="your picture"><span>The middle square is used.</span></div>'


def grid(pictures: Sequence[str], captions: Sequence[str]) -> str:
    """Pictures with captions under them."""
    cells = "".join(
        f'<figure><img src="{src}" alt="{escape(text)}"><figcaption>{escape(text)}</figcaption></figure>'
        for src, text in zip(pictures, captions, strict=True)
    )
    return f'<div class="ll-grid">{cells}</div>'


def pairs(before: Sequence[str], after: Sequence[str], captions: Sequence[str]) -> str:
    """Before and after beside each other, the same prompt and seed in each pair."""
    cells = "".join(
        f'<figure><div><img src="{a}" alt="before, {escape(text)}"><img src="{b}" alt="after, {escape(text)}">'
        f"</div><figcaption>{escape(text)}</figcaption></figure>"
        for a, b, text in zip(before, after, captions, strict=True)
    )
    return f'<div class="ll-pairs">{cells}</div>'


def walk(rows: Sequence[tuple[float, Sequence[str]]], chosen: float) -> str:
    """A strip from A to B: a column a step, a row a seed."""
    nearest = min(range(len(rows)), key=lambda i: abs(rows[i][0] - chosen))
    cells = []
    for i, (t, drawn) in enumerate(rows):
        images = "".join(f'<img src="{src}" alt="{100 * t:.0f} % of the way from A to B">' for src in drawn)
        text = "A" if t == 0 else "B" if t == 1 else f"{100 * t:.0f} %"
        mark = ' class="ll-chosen"' if i == nearest else ""
        cells.append(f"<figure{mark}>{images}<figcaption>{text}</figcaption></figure>")
    return f'<div class="ll-walk">{"".join(cells)}</div>'


def bars(read: Read) -> str:
    """One bar an attribute, its segments the probabilities of the values."""
    rows = []
    for name, found in read.items():
        rows.append(
            f'<div class="ll-row"><b>{LABELS.get(name, escape(name))}</b>'
            f'<div class="ll-stack">{_bar(name, found)}</div>{_value(found)}</div>'
        )
    return f'<div class="ll-bars">{"".join(rows)}</div>'


def bars_before_after(
    before: Read, after: Read, asked: Mapping[str, str], moved: Sequence[str] = (), also: Sequence[str] = ()
) -> str:
    """Two bars an attribute; what was asked for, set with it, or moved unasked is marked."""
    rows = []
    for name, found in after.items():
        mark = (
            '<em class="ll-asked">asked</em>' if name in asked
            else '<em class="ll-asked">set with it</em>' if name in also
            else '<em class="ll-moved">moved too</em>' if name in moved
            else ""
        )  # fmt: skip
        old = before[name]["value"]
        arrow = f"<s>{escape(old)}</s> &rarr; " if old != found["value"] else ""
        rows.append(
            f'<div class="ll-row"><b>{LABELS.get(name, escape(name))}{mark}</b><div class="ll-stack">'
            f'<div class="ll-was">{_bar(name, before[name])}</div>{_bar(name, found)}</div>{_value(found, arrow)}</div>'
        )
    key = '<div class="ll-barkey"><span>thin: before</span><span>thick: after</span></div>'
    return f'<div class="ll-bars ll-two">{key}{"".join(rows)}</div>'


def facts(rows: Mapping[str, Any]) -> str:
    cells = "".join(f"<div><dt>{escape(k)}</dt><dd>{escape(str(v))}</dd></div>" for k, v in rows.items())
    return f'<dl class="ll-facts">{cells}</dl>'


def gallery(items: Sequence[Item]) -> str:
    """What was made in this session, newest first."""
    if not items:
        return empty(
            "Nothing made yet",
            "Every LoRA that you generate, edit, mix or upload is kept here until you leave.",
        )
    cells = []
    for item in items:
        picture = f'<img src="{item.thumb}" alt="">' if item.thumb else '<i class="ll-nothumb">LoRA</i>'
        cells.append(
            f"<article>{picture}<div><b>{escape(item.name)}</b><small>{escape(item.kind)}"
            f"{' &middot; ' + escape(item.note) if item.note else ''}</small>{links(item)}</div></article>"
        )
    return f'<div class="ll-gallery">{"".join(cells)}</div>'


def heading(text: str, help: str = "") -> str:
    return f'<div class="ll-heading"><h4>{escape(text)}</h4><p>{escape(help)}</p></div>'


def _bar(name: str, found: Mapping[str, Any]) -> str:
    parts = []
    for value, p in found["probabilities"].items():
        if p < 0.004:
            continue
        colour = SWATCHES.get(name, {}).get(value) or SHADES.get(value, "var(--ll-bar-1)")
        parts.append(
            f'<i style="flex-grow:{p:.4f};background:{colour}" title="{escape(value)} {_percent(p)}"></i>'
        )
    text = ", ".join(f"{v} {_percent(p)}" for v, p in found["probabilities"].items() if p >= 0.004)
    return f'<div class="ll-bar" role="img" aria-label="{escape(text)}">{"".join(parts)}</div>'


def _value(found: Mapping[str, Any], arrow: str = "") -> str:
    p = found["probability"]
    second = sorted(found["probabilities"].items(), key=lambda kv: -kv[1])[1:2]
    doubt = (
        f'<em class="ll-doubt">or {escape(second[0][0])} {_percent(second[0][1])}</em>'
        if p < UNSURE and second
        else ""
    )
    return (
        f'<span class="ll-value">{arrow}{escape(found["value"])} <small>{_percent(p)}</small>{doubt}</span>'
    )


def _percent(p: float) -> str:
    """A probability; a calibrated model is never quite sure, and rounding must not say so."""
    return "> 99 %" if p > 0.99 else "< 1 %" if p < 0.01 else f"{100 * p:.0f} %"
