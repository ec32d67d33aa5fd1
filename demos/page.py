"""What the tabs share: the picker of adapters, the attribute chips, the gallery, and how events are bound."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import gradio as gr

from lolgen import pictures
from lolgen.errors import LolgenError

from . import html
from .guard import friendly
from .sessions import Item
from .studio import Studio

WORKERS = 2
"""Events that compute at once; the drawing itself is one at a time."""
ADAPTER_TYPES = [".safetensors", ".zip", ".json"]
SEED_MOST = 2**31 - 1
PROGRESS = gr.Progress()
"""The default of a handler's second argument: Gradio puts the bar of the running event in its place."""

_PICKER = (
    '<div class="ll-picker" role="radiogroup" aria-label="TITLE">'
    '${choices.map(function (c) { return \'<button type="button" role="radio" aria-checked="\' + (c.id === value)'
    " + '\" data-id=\"' + c.id + '\" data-name=\"' + c.name + '\" title=\"' + c.hint + '\">'"
    " + (c.thumb ? '<img alt=\"\" src=\"' + c.thumb + '\">' : '<i>LoRA</i>') + '<span>' + c.name + '</span></button>';"
    " }).join('')}</div>"
)
_PICK = """
element.addEventListener('click', function (event) {
  const button = event.target.closest('button[data-id]');
  if (!button || button.dataset.id === props.value) return;
  props.value = button.dataset.id;
  trigger('change');
});
"""

_SCROLL = (
    "if (window.innerWidth < 700) "
    "document.getElementById('%s').scrollIntoView({behavior: 'smooth', block: 'start'});"
)


@dataclass
class Page:
    studio: Studio
    pickers: list[Any] = field(default_factory=list)
    gallery: Any = None

    def picker(self, title: str, chosen: int = 0) -> Any:
        """Faces to choose an adapter from; its value is the id of an item."""
        examples = self.studio.store.examples
        picker = gr.HTML(
            value=examples[chosen].id,
            html_template=_PICKER.replace("TITLE", escape(title)),
            js_on_load=_PICK,
            choices=choices(examples),
            elem_classes="ll-pick",
        )
        self.pickers.append(picker)
        return picker

    @property
    def shared(self) -> list[Any]:
        """What every new adapter changes."""
        return [self.gallery, *self.pickers]

    def refreshed(self, request: gr.Request, choose: Item | None = None, where: Any = None) -> list[Any]:
        """Values of `shared`; `choose` is selected in the picker `where`."""
        items = self.studio.store.items(request.session_hash)
        rows = choices([i for i in items if not i.speaks])
        updates = [
            gr.update(choices=rows, value=choose.id) if choose and p is where else gr.update(choices=rows)
            for p in self.pickers
        ]
        return [html.gallery([i for i in items if i.kind != "example"]), *updates]

    def chosen(self, request: gr.Request, id: object) -> Item:
        return self.studio.store.item(request.session_hash, id)

    def upload_button(self, picker: Any, elem_id: str) -> Any:
        """A button that adds an adapter to the session and selects it in `picker`; (the button, its binding)."""
        button = gr.UploadButton(
            "Upload a LoRA",
            file_count="multiple",
            file_types=ADAPTER_TYPES,
            size="sm",
            variant="secondary",
            elem_id=elem_id,
        )

        def take(payload: Any, request: gr.Request) -> list[Any]:
            item = self.studio.upload(request.session_hash, payload)
            return self.refreshed(request, item, picker)

        def bind() -> None:
            # The file's own value is not processed by Gradio: `uploads` looks at what the client sent.
            on(
                button.upload,
                take,
                [button],
                self.shared,
                light=True,
                preprocess=False,
                clears=button,
                show_progress_on=[picker],
            )

        return bind


def on(
    event: Callable[..., Any], handler: Callable[..., Any], inputs: Sequence[Any], outputs: Sequence[Any],
    *, light: bool = False, scroll_to: str = "", clears: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """Bind an event: errors in words, and a bounded number at a time; `light` ones do not wait for the others.

    `scroll_to`: the id of the result, brought into view on a phone; `clears`: an input emptied when it fails."""
    limits = {"concurrency_id": "light", "concurrency_limit": 4} if light else {
        "concurrency_id": "models", "concurrency_limit": WORKERS,
    }  # fmt: skip
    if scroll_to:
        # On a phone the result lies below the fold.
        options["js"] = f"(...given) => {{ {_SCROLL % scroll_to} return given; }}"
    # Endpoints are named for tests and scripts, but no page about them is served.
    options.setdefault("api_name", handler.__name__)
    bound = event(friendly(handler), list(inputs), list(outputs), **limits, **options)
    if clears is not None:
        bound.failure(None, None, [clears], js="() => null")
    return bound


def choices(items: Sequence[Item]) -> list[dict[str, str]]:
    return [
        {
            "id": i.id,
            "name": escape(i.name),
            "hint": escape(f"{i.kind}: {i.note}" if i.note else i.kind),
            "thumb": i.thumb,
        }
        for i in items
    ]


def attribute_chips(none: str, prefix: str, defaults: dict[str, str] | None = None) -> list[Any]:
    """One row of chips an attribute, in the order of `pictures.ATTRIBUTES`; `none` is "leave it"."""
    return [
        gr.Radio(
            [none, *values],
            value=(defaults or {}).get(name, none),
            label=html.LABELS[name],
            elem_id=f"{prefix}-{name}",
            elem_classes=["ll-chips", "ll-leave"],
        )
        for name, values in pictures.ATTRIBUTES.items()
    ]


def request_of(values: Sequence[Any], none: str) -> dict[str, str]:
    """What chips ask for. LolgenError for what no chip says."""
    pairs = {n: str(v) for n, v in zip(pictures.ATTRIBUTES, values, strict=True) if v not in (None, none)}
    return pictures.check_attributes(pairs)


def whole(value: Any, name: str, least: int, most: int) -> int:
    """A whole number from a field. LolgenError says the range."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise LolgenError(f"{name}: found {value!r}, wanted a whole number from {least} to {most}")
    if value != int(value):
        raise LolgenError(f"{name}: found {value!r}, wanted a whole number")
    return int(value)


def share(value: Any, name: str, most: float = 1.0) -> float:
    """A number from 0 to `most` from a slider."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= most:
        raise LolgenError(f"{name}: found {value!r}, wanted a number from 0 to {most:g}")
    return float(value)
