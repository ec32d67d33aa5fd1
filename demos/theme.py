"""Colours and type of the app: one accent, warm greys, the system's own fonts."""

from __future__ import annotations

from typing import Any

import gradio as gr

SANS = (
    "ui-sans-serif",
    "system-ui",
    "-apple-system",
    "Segoe UI",
    "Roboto",
    "Helvetica Neue",
    "Arial",
    "sans-serif",
)
MONO = ("ui-monospace", "SFMono-Regular", "Menlo", "Consolas", "Liberation Mono", "monospace")


def theme() -> Any:
    """A Gradio theme without a font that would have to be fetched."""
    base = gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        secondary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.stone,
        radius_size=gr.themes.sizes.radius_lg,
        spacing_size=gr.themes.sizes.spacing_md,
        text_size=gr.themes.sizes.text_md,
        font=SANS,
        font_mono=MONO,
    )
    return base.set(
        body_background_fill="#faf9f7",
        body_background_fill_dark="#161412",
        background_fill_primary="#ffffff",
        background_fill_primary_dark="#1f1c1a",
        block_background_fill="transparent",
        block_background_fill_dark="transparent",
        block_border_width="0px",
        block_shadow="none",
        block_label_background_fill="transparent",
        block_label_background_fill_dark="transparent",
        block_label_border_width="0px",
        block_title_text_weight="600",
        block_title_text_size="*text_sm",
        block_padding="0px",
        border_color_primary="#e4e0da",
        border_color_primary_dark="#3a3532",
        button_primary_background_fill="#0f766e",
        button_primary_background_fill_hover="#115e59",
        button_primary_background_fill_dark="#0d9488",
        button_primary_background_fill_hover_dark="#14b8a6",
        button_primary_text_color="#ffffff",
        button_primary_text_color_dark="#ffffff",
        button_secondary_background_fill="#ffffff",
        button_secondary_background_fill_dark="#2a2624",
        button_secondary_border_color="#d9d4cc",
        button_secondary_border_color_dark="#463f3b",
        button_large_text_weight="600",
        slider_color="#0f766e",
        slider_color_dark="#2dd4bf",
    )
