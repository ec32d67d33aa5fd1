"""The app: five tabs over one studio, served by Gradio with a bounded queue.

`lolgen demo` calls `serve`. Nothing is fetched from the network: no fonts, no analytics, no scripts of others.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from pathlib import Path
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr
from starlette.middleware import Middleware

from lolgen.errors import LolgenError

from . import downloads, guard, html, tab_edit, tab_generate, tab_inspect, tab_mix, tab_speak, theme
from .page import Page
from .sessions import Store
from .studio import Studio
from .uploads import MAX_BYTES

QUEUE = 24
"""Requests that may wait; the next is told at once that the app is busy."""
PATIENCE = 20.0
"""Seconds that the end waits for handlers that are computing."""
TABS = {
    "Generate": tab_generate,
    "Edit": tab_edit,
    "Mix": tab_mix,
    "Inspect": tab_inspect,
    "Speak": tab_speak,
}


def build(studio: Studio, queue: int = QUEUE) -> Any:
    """The page, on a studio whose examples are made."""
    store = studio.store
    # Read by Gradio whenever it stores an upload: this app's own folder, deleted with it.
    os.environ["GRADIO_TEMP_DIR"] = str(store.uploads)
    with guard.Blocks(
        store.uploads, title="lolgen", analytics_enabled=False, fill_width=False
    ) as page_blocks:
        page = Page(studio)
        gr.HTML(html.header())
        binds = []
        with gr.Tabs(elem_classes="ll-tabs"):
            for name, tab in TABS.items():
                with gr.Tab(name, id=name.lower()):
                    binds.append(tab.build(page))
        gr.HTML(
            html.heading(
                "Made in this session",
                "Newest first; Edit, Mix and Inspect offer the faces among them, and the examples.",
            )
        )
        page.gallery = gr.HTML(html.gallery([]), elem_id="gallery")
        gr.HTML(html.footer())
        for bind in binds:
            bind()

        def left(request: gr.Request) -> None:
            store.closed(request.session_hash)

        page_blocks.unload(left)
    page_blocks.queue(max_size=queue, api_open=False, default_concurrency_limit=4)
    return page_blocks


def serve(
    port: int = 7860,
    host: str = "127.0.0.1",
    share: bool = False,
    *,
    queue: int = QUEUE,
    store: Store | None = None,
    sweep: float = 15.0,
) -> None:
    """Serve until interrupted, then delete everything. LolgenError when the port cannot be had."""
    import torch

    # The models are small; and the same request gives the same file as on the command line.
    torch.set_num_threads(1)
    store = store or Store()
    signal.signal(signal.SIGTERM, _stop)
    try:
        studio = Studio(store)
        print("lolgen: loading the models and making the examples ...", flush=True)
        studio.warm()
        blocks = build(studio, queue)
        store.keep_sweeping(sweep)
        try:
            _, local, shared = launch(blocks, studio, port, host, share)
        except OSError as error:
            raise LolgenError(f"port {port} on {host} is taken; choose another with --port") from error
        print(f"lolgen: serving on {shared or local} (Ctrl+C stops it)", flush=True)
        threading.Event().wait()
    except KeyboardInterrupt:
        print("lolgen: stopped", flush=True)
    finally:
        gr.close_all()
        # Told a second time to stop, it does not wait.
        with contextlib.suppress(KeyboardInterrupt):
            guard.WORKERS.drain(PATIENCE)
        store.close()


def _stop(*_: Any) -> None:
    """SIGTERM ends the app as Ctrl+C does, so that its files go too."""
    raise KeyboardInterrupt


def launch(blocks: Any, studio: Studio, port: int, host: str, share: bool = False) -> tuple[Any, str, str]:
    """Start the server and return; (the FastAPI app, its local URL, its shared URL)."""
    launched: tuple[Any, str, str] = blocks.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        show_error=False,
        inbrowser=False,
        footer_links=[],
        run_history=False,
        enable_monitoring=False,
        ssr_mode=False,
        max_file_size=MAX_BYTES,
        state_session_capacity=studio.store.limits.sessions,
        theme=theme.theme(),
        css_paths=[Path(__file__).with_name("style.css")],
        favicon_path=Path(__file__).with_name("favicon.svg"),
        app_kwargs={
            "routes": [downloads.route(studio.store)],
            "middleware": [Middleware(guard.BodyLimit)],
            "docs_url": None,
            "redoc_url": None,
            "openapi_url": None,
        },
    )
    return launched
