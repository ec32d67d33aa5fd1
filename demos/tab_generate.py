"""The tab Generate: an adapter from attributes, from nothing, or from a picture."""

from __future__ import annotations

import secrets
from collections.abc import Callable
from typing import Any

import gradio as gr

from . import html
from .page import PROGRESS, SEED_MOST, Page, attribute_chips, on, request_of, whole
from .studio import Result

ANY = "any"
DEFAULTS = {"hair_color": "red", "glasses": "yes"}


def build(page: Page) -> Callable[[], None]:
    """Lay the tab out; the function that binds its events."""
    studio = page.studio
    with gr.Row(elem_classes="ll-split"):
        with gr.Column(scale=5, min_width=280, elem_classes="ll-controls"):
            gr.HTML(html.heading("Who should it draw?", "What stays on any is drawn by the seed."))
            chips = attribute_chips(ANY, "generate", DEFAULTS)
            with gr.Row(elem_classes="ll-numbers"):
                seed = gr.Number(0, label="Seed", precision=0, min_width=110)
                rank = gr.Slider(1, 64, 4, step=1, label="Rank", min_width=150)
            with gr.Row(elem_classes="ll-buttons"):
                go = gr.Button("Generate", variant="primary", elem_id="generate-go", min_width=130)
                surprise = gr.Button("Surprise me", elem_id="generate-surprise", min_width=130)
            with gr.Accordion("Or start from a picture", open=False, elem_classes="ll-fold"):
                gr.HTML(html.heading("", "A drawn portrait works best: the base model knows no photographs."))
                picture = gr.File(
                    label="Picture",
                    file_types=[".png", ".jpg", ".jpeg", ".webp"],
                    height=140,
                    elem_id="generate-picture",
                    elem_classes="ll-drop",
                    show_label=False,
                )
                seen = gr.HTML(visible=False)
                invert = gr.Button(
                    "Make a LoRA of this picture", interactive=False, elem_id="generate-invert"
                )
        with gr.Column(scale=7, min_width=280):
            result = gr.HTML(
                html.empty("Your LoRA will appear here", "Choose a few attributes and press Generate."),
                elem_id="generate-result",
                elem_classes="ll-result",
            )

    def generate(request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any) -> list[Any]:
        *attributes, number, width = values
        made = studio.generate(
            request.session_hash, request_of(attributes, ANY), whole(number, "seed", 0, SEED_MOST),
            whole(width, "rank", 1, 64), progress,
        )  # fmt: skip
        return [_shown(made), *page.refreshed(request)]

    def surprise_me(request: gr.Request, progress: gr.Progress = PROGRESS, width: Any = None) -> list[Any]:
        number = secrets.randbelow(10**6)
        made = studio.surprise(request.session_hash, number, whole(width, "rank", 1, 64), progress)
        return [_shown(made), number, *page.refreshed(request)]

    def take_picture(payload: Any, request: gr.Request) -> list[Any]:
        view = html.seen(studio.picture(request.session_hash, payload))
        return [gr.update(value=view, visible=True), gr.update(interactive=True), None]

    def from_picture(
        request: gr.Request, progress: gr.Progress = PROGRESS, number: Any = None, width: Any = None
    ) -> list[Any]:
        made = studio.from_picture(
            request.session_hash, whole(number, "seed", 0, SEED_MOST), whole(width, "rank", 1, 64), progress
        )
        return [_shown(made), *page.refreshed(request)]

    def bind() -> None:
        shown = [result, *page.shared]
        on(
            go.click,
            generate,
            [*chips, seed, rank],
            shown,
            show_progress_on=[result],
            scroll_to="generate-result",
        )
        on(
            surprise.click,
            surprise_me,
            [rank],
            [result, seed, *page.shared],
            show_progress_on=[result],
            scroll_to="generate-result",
        )
        on(
            picture.upload,
            take_picture,
            [picture],
            [seen, invert, picture],
            light=True,
            preprocess=False,
            clears=picture,
        )
        on(
            invert.click,
            from_picture,
            [seed, rank],
            shown,
            show_progress_on=[result],
            scroll_to="generate-result",
        )

    return bind


def _shown(made: Result) -> str:
    report, item = made.report, made.item
    line = f"rank {report['rank']}, seed {report['seed']}, " if "seed" in report and "rank" in report else ""
    return html.panel(
        html.title(item, f"{line}{report['seconds']:.2f} s from request to file"),
        html.notices(report.get("warnings", [])),
        html.grid(made.pictures, made.captions),
        html.links(item),
        html.usage(item),
        html.heading("What lolgen reads in its weights", "Segments are probabilities of the values."),
        html.bars(made.read),
    )
