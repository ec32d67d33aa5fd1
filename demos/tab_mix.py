"""The tab Mix: an adapter between two, and the walk from one to the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from lolgen.errors import LolgenError

from . import html
from .page import PROGRESS, Page, on, share


def build(page: Page) -> Callable[[], None]:
    """Lay the tab out; the function that binds its events."""
    studio = page.studio
    with gr.Row(elem_classes="ll-split"):
        with gr.Column(scale=5, min_width=280, elem_classes="ll-controls"):
            gr.HTML(html.heading("A", "Where the walk starts."))
            first = page.picker("LoRA A", 0)
            bind_first = page.upload_button(first, "mix-upload-a")
            gr.HTML(html.heading("B", "Where it ends."))
            second = page.picker("LoRA B", 1)
            bind_second = page.upload_button(second, "mix-upload-b")
            t = gr.Slider(0, 1, 0.5, step=0.05, label="How far from A to B", elem_id="mix-t")
            go = gr.Button("Mix", variant="primary", elem_id="mix-go")
        with gr.Column(scale=7, min_width=280):
            result = gr.HTML(
                html.empty("The mix and the walk will appear here", "Choose two LoRAs and press Mix."),
                elem_id="mix-result",
                elem_classes="ll-result",
            )

    def mix(
        request: gr.Request,
        progress: gr.Progress = PROGRESS,
        a: Any = None,
        b: Any = None,
        amount: Any = None,
    ) -> list[Any]:
        start, end = page.chosen(request, a), page.chosen(request, b)
        if start is end:
            raise LolgenError(f"A and B are both {start.name}; choose two different LoRAs")
        for item in (start, end):
            if not item.native:
                raise LolgenError(f"{item.name} is for another base model; mixes are for LoRAs of tiny-sd")
        at = share(amount, "t")
        key = request.session_hash
        made = studio.mix(key, start, end, at, progress)
        rows = studio.walk(key, start, end, made.item.prompt, progress)
        report, item = made.report, made.item
        page_html = html.panel(
            html.title(
                item,
                f"{100 * at:.0f} % of the way from {start.name} to {end.name}, {report['seconds']:.2f} s",
            ),
            html.notices(report.get("warnings", [])),
            html.heading(
                f"The walk from {start.name} to {end.name}",
                "The same seed in each row; the frame is on the step nearest to your mix.",
            ),
            html.walk(rows, at),
            html.heading("The mix", ""),
            html.grid(made.pictures, made.captions),
            html.links(item),
            html.usage(item),
            html.heading("What lolgen reads in its weights", "Segments are probabilities of the values."),
            html.bars(made.read),
        )
        return [page_html, *page.refreshed(request)]

    def bind() -> None:
        bind_first()
        bind_second()
        on(
            go.click,
            mix,
            [first, second, t],
            [result, *page.shared],
            show_progress_on=[result],
            scroll_to="mix-result",
        )

    return bind
