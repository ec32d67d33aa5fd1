"""The tab Inspect: what a file is, what is in it, what it does."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from . import html
from .facts import facts_of
from .page import ADAPTER_TYPES, PROGRESS, Page, on


def build(page: Page) -> Callable[[], None]:
    """Lay the tab out; the function that binds its events."""
    studio = page.studio
    with gr.Row(elem_classes="ll-split"):
        with gr.Column(scale=5, min_width=280, elem_classes="ll-controls"):
            gr.HTML(
                html.heading(
                    "A LoRA file",
                    "A .safetensors file, a zip of a PEFT folder, or its files together, up to 64 MB.",
                )
            )
            file = gr.File(
                label="Adapter",
                file_count="multiple",
                file_types=ADAPTER_TYPES,
                height=140,
                elem_id="inspect-file",
                elem_classes="ll-drop",
                show_label=False,
            )
            gr.HTML(html.heading("Or one that is here", "Pickles (.bin, .pt) are refused, unopened."))
            picker = page.picker("LoRA to inspect")
            go = gr.Button("Inspect", variant="primary", elem_id="inspect-go")
        with gr.Column(scale=7, min_width=280):
            result = gr.HTML(
                html.empty(
                    "What is in the file will appear here", "Drop a file, or choose a LoRA and press Inspect."
                ),
                elem_id="inspect-result",
                elem_classes="ll-result",
            )

    def inspect_upload(
        request: gr.Request, progress: gr.Progress = PROGRESS, payload: Any = None
    ) -> list[Any]:
        progress(0.1, "Reading the file")
        item = studio.upload(request.session_hash, payload)
        return [_shown(page, item, progress), None, *page.refreshed(request, item, picker)]

    def inspect(request: gr.Request, progress: gr.Progress = PROGRESS, id: Any = None) -> list[Any]:
        return [_shown(page, page.chosen(request, id), progress)]

    def bind() -> None:
        on(
            file.upload,
            inspect_upload,
            [file],
            [result, file, *page.shared],
            preprocess=False,
            clears=file,
            show_progress_on=[result],
            scroll_to="inspect-result",
        )
        on(go.click, inspect, [picker], [result], scroll_to="inspect-result")

    return bind


def _shown(page: Page, item: Any, progress: Any) -> str:
    progress(0.3, "Reading the weights")
    facts, warnings = facts_of(item)
    progress(0.5, "Drawing with it")
    found = page.studio.preview(item)
    if not item.native:
        warnings = [
            "It is for another base model than tiny-sd: nothing is predicted from it or drawn with it.",
            *warnings,
        ]
    parts = [html.title(item, item.kind), html.notices(warnings), html.facts(facts)]
    if item.native:
        parts += [
            html.heading("What lolgen reads in its weights", "Segments are probabilities of the values."),
            html.bars(found.read),
            html.heading("What it draws", f"With the prompt: {item.prompt}."),
            html.grid(found.pictures, found.captions),
        ]
    return html.panel(*parts, html.links(item))
