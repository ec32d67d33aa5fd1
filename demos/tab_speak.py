"""The tab Speak: an adapter of the small language model from the presidents it is to speak like."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr

from lolgen import pipeline
from lolgen.errors import LolgenError
from lolgen.language.sentences import encoder_folder

from . import html, html_speech
from .page import PROGRESS, SEED_MOST, Page, on, whole
from .passages import PASSAGES
from .studio import SPEAKERS, Speech

FIRST = "lincoln"
OPENING = "The people of this country"
MOST = 200
"""Characters of the line that says who is to speak."""
LOADING = 'PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("checkpoints/tiny-lm"), "unzipped folder")'


def build(page: Page) -> Callable[[], None]:
    """Lay the tab out; the function that binds its events."""
    studio = page.studio
    with gr.Row(elem_classes="ll-split"):
        with gr.Column(scale=5, min_width=280, elem_classes="ll-controls"):
            gr.HTML(
                html.heading(
                    "Who should it speak like?",
                    "A language model of 3 million parameters has never read these nineteen presidents. "
                    "Choose one, or several for a blend.",
                )
            )
            chips = gr.CheckboxGroup(
                [(name, source) for source, name in SPEAKERS.items()],
                value=[FIRST],
                label="Presidents",
                elem_id="speak-sources",
                elem_classes="ll-chips",
            )
            line = gr.Textbox(
                label="Or say it in words",
                placeholder="speak like a nineteenth century president",
                info="Counts in place of the names above where it is filled.",
                max_length=MOST,
                visible=_reads_words(),
                elem_id="speak-line",
            )
            passage = gr.Textbox(
                PASSAGES[FIRST],
                label="Passage to judge it by",
                info="From an address that neither the model nor an adapter was trained on; or your own, "
                "up to some 300 words.",
                lines=6,
                max_lines=6,
                elem_id="speak-passage",
            )
            opening = gr.Textbox(OPENING, label="Opening words to go on from", elem_id="speak-opening")
            with gr.Row(elem_classes="ll-numbers"):
                seed = gr.Number(0, label="Seed of the continuation", precision=0, min_width=110)
                rank = gr.Slider(1, 64, 4, step=1, label="Rank", min_width=150)
            go = gr.Button("Generate the adapter", variant="primary", elem_id="speak-go")
        with gr.Column(scale=7, min_width=280):
            result = gr.HTML(
                html.empty(
                    "What the adapter changes will appear here",
                    "Choose a president and press Generate the adapter.",
                ),
                elem_id="speak-result",
                elem_classes="ll-result",
            )

    def speak(request: gr.Request, progress: gr.Progress = PROGRESS, *values: Any) -> list[Any]:
        names, words, text, start, number, width = values
        made = studio.speak(
            request.session_hash, _asked(names, words), text or "", start or "",
            whole(number, "seed", 0, SEED_MOST), whole(width, "rank", 1, 64), progress,
        )  # fmt: skip
        return [_shown(made, start or "", int(number)), *page.refreshed(request)]

    def swap_passage(names: Any, text: Any) -> Any:
        # What a visitor wrote stays.
        ours = (text or "").strip() in PASSAGES.values()
        return PASSAGES[names[-1]] if names and ours else gr.skip()

    def bind() -> None:
        # Two quick clicks: the passage is that of the last.
        on(
            chips.input, swap_passage, [chips, passage], [passage], light=True, show_progress="hidden",
            trigger_mode="always_last",
        )  # fmt: skip
        on(
            go.click,
            speak,
            [chips, line, passage, opening, seed, rank],
            [result, *page.shared],
            show_progress_on=[result],
            scroll_to="speak-result",
        )

    return bind


def _reads_words() -> bool:
    """Whether the sentence encoder, an optional package, is installed."""
    try:
        return encoder_folder().is_dir()
    except LolgenError:
        return False


def _asked(names: Any, line: Any) -> dict[str, float]:
    """Source -> weight. LolgenError when nobody is chosen, or the line fits nobody."""
    words = (line or "").strip()
    if len(words) > MOST:
        raise LolgenError(f"the line in words: found {len(words)} characters, wanted at most {MOST}")
    if words:
        return pipeline.sources_in(words)
    if not names:
        raise LolgenError("nobody is chosen: choose at least one president")
    return dict.fromkeys(names, 1.0)


def _shown(made: Speech, opening: str, seed: int) -> str:
    report, item = made.report, made.item
    return html.panel(
        html.title(item, f"rank {report['rank']}, {report['seconds']:.2f} s from request to file"),
        html_speech.blend({SPEAKERS[s]: w for s, w in report["sources"].items()}),
        html.links(item),
        html_speech.use(LOADING),
        html.heading(
            "How well it expects the passage",
            "Perplexity: among how many tokens, in effect, the model still wavers at each step; lower is better.",
        ),
        html_speech.figures(made.before, made.after),
        html_speech.verdict(made.before, made.after),
        html_speech.context(made.whole_before, made.whole_after),
        html.heading(
            "Token by token", "Shaded by what the adapter did to each; point at one for its figures."
        ),
        html_speech.shaded(made.before, made.after),
        html_speech.extremes(made.before, made.after),
        html.heading(
            "How it goes on",
            f"40 tokens, seed {seed}, temperature 0.8, the same random draws for both: they part where the adapter "
            "tips a choice. At this size sentences hold together only loosely, with or without an adapter; "
            "look for a tone rather than for sense.",
        ),
        html_speech.continuations(opening, made.base_says, made.adapter_says),
    )
