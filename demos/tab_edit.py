"""The tab Edit: change attributes of an adapter and see before and after."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from lolgen.errors import LolgenError

from . import html
from .page import PROGRESS, Page, attribute_chips, on, request_of, share
from .studio import Result

KEEP = "keep"
MODES = {"All the rest": "all", "The person": "identity"}


def build(page: Page) -> Callable[[], None]:
    """Lay the tab out; the function that binds its events."""
    studio = page.studio
    with gr.Row(elem_classes="ll-split"):
        with gr.Column(scale=5, min_width=280, elem_classes="ll-controls"):
            gr.HTML(
                html.heading("Which LoRA?", "An example, one made in this session, or your own for tiny-sd.")
            )
            picker = page.picker("LoRA to edit")
            bind_upload = page.upload_button(picker, "edit-upload")
            gr.HTML(html.heading("What should change?", "The rest is kept."))
            chips = attribute_chips(KEEP, "edit", {"glasses": "yes"})
            with gr.Row(elem_classes="ll-numbers"):
                strength = gr.Slider(
                    0, 2, 1, step=0.05, label="Strength", min_width=150, elem_id="edit-strength"
                )
                keep = gr.Radio(
                    list(MODES),
                    value=next(iter(MODES)),
                    label="Keep",
                    info="All the rest of its weights, or the person without the accidents of training.",
                    elem_classes="ll-chips",
                    elem_id="edit-keep",
                )
            go = gr.Button("Apply the edit", variant="primary", elem_id="edit-go")
        with gr.Column(scale=7, min_width=280):
            result = gr.HTML(
                html.empty(
                    "Before and after will appear here",
                    "Choose a LoRA and a change, and press Apply the edit.",
                ),
                elem_id="edit-result",
                elem_classes="ll-result",
            )

    def edit(request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any) -> list[Any]:
        id, *attributes, amount, mode = values
        asked = request_of(attributes, KEEP)
        if not asked:
            raise LolgenError(
                "nothing to change: every attribute is on keep; choose a value for at least one"
            )
        if mode not in MODES:
            raise LolgenError(f"keep: found {mode!r}, wanted one of {', '.join(MODES)}")
        source = page.chosen(request, id)
        if not source.native:
            raise LolgenError(f"{source.name} is for another base model; edits are for LoRAs of tiny-sd")
        before, after = studio.edit(
            request.session_hash, source, asked, share(amount, "strength", 2.0), MODES[mode], 0, progress
        )
        return [_shown(before, after, asked), *page.refreshed(request)]

    def bind() -> None:
        bind_upload()
        on(
            go.click,
            edit,
            [picker, *chips, strength, keep],
            [result, *page.shared],
            show_progress_on=[result],
            scroll_to="edit-result",
        )

    return bind


def _shown(before: Result, after: Result, asked: dict[str, str]) -> str:
    report = after.report
    moved = f"delta W moved by {100 * report['moved']:.0f} %"
    return html.panel(
        html.title(
            after.item, f"from {before.item.name}, rank {report['rank']}, {report['seconds']:.2f} s, {moved}"
        ),
        html.notices(report["warnings"], "Only what was asked for has changed."),
        html.heading(
            "Before and after",
            f"Left before, right after; the same seed and prompt in each pair: {after.item.prompt}.",
        ),
        html.pairs(before.pictures, after.pictures, after.captions),
        html.links(after.item),
        html.usage(after.item),
        html.heading("What lolgen reads in the weights", "Segments are probabilities of the values."),
        html.bars_before_after(before.read, after.read, asked, report["moved_unasked"], report["also_set"]),
    )
