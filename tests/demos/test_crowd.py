"""Many visitors at once: each gets its own answer or a clear word, and a closed tab leaves nothing."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from served import ANYBODY, CHROMIUM_ARGS, PATIENCE, App, Client, chromium, same_folder, serving

from lolgen import pipeline


@pytest.mark.slow
def test_sixteen_at_once_each_get_their_own(app: App, tmp_path: Path) -> None:
    torch.set_num_threads(1)
    answers: dict[int, Any] = {}
    start = threading.Barrier(16)

    def visit(seed: int) -> None:
        client = Client(app.url, f"crowd-{seed}")
        start.wait()
        joined = client.join("generate", [*ANYBODY, seed, 4])
        if joined.status_code == 503:
            answers[seed] = "busy"
        else:
            page = client.wait()["output"]["data"][0]
            answers[seed] = client.download(page, "peft")
        client.close()

    threads = [threading.Thread(target=visit, args=(seed,)) for seed in range(16)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    served = {seed: a for seed, a in answers.items() if a != "busy"}
    assert len(answers) == 16 and len(served) >= 8
    for seed, archive in served.items():
        made = pipeline.generate({}, tmp_path / str(seed), seed=seed)
        same_folder(archive, Path(made["adapter"]))


SMALL = """
import sys
from lolgen.commands.demo import load_app
app = load_app()
sessions = sys.modules["lolgen._demos.sessions"]
app.serve(port=PORT, queue=2, store=sessions.Store(sessions.Limits(grace=0.5)), sweep=0.2)
"""


@contextlib.contextmanager
def crowded(client: Client) -> Iterator[None]:
    """The queue kept full by other sessions."""
    stop = threading.Event()

    def push() -> None:
        while not stop.wait(0.05):
            client.session = f"push-{time.monotonic()}"
            client.join("generate", [*ANYBODY, 0, 4])

    thread = threading.Thread(target=push)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def until(done: Callable[[], Any], again: Callable[[], Any]) -> None:
    """Do `again` until `done`."""
    limit = time.monotonic() + PATIENCE / 1000
    while not done():
        assert time.monotonic() < limit
        again()
        time.sleep(0.5)


@pytest.mark.slow
def test_a_full_queue_says_so_and_a_closed_tab_leaves_nothing(tmp_path: Path) -> None:
    from playwright.sync_api import sync_playwright

    with serving(tmp_path, SMALL) as app, contextlib.ExitStack() as clients:
        crowd = [clients.enter_context(contextlib.closing(Client(app.url, f"crowd-{i}"))) for i in range(12)]
        joined = [c.join("generate", [*ANYBODY, i, 4]).status_code for i, c in enumerate(crowd)]
        assert set(joined) == {200, 503} and joined.count(200) >= 2
        for c, code in zip(crowd, joined, strict=True):
            if code == 200:
                assert c.wait()["success"]
        with sync_playwright() as play:
            browser = play.chromium.launch(executable_path=chromium(), args=CHROMIUM_ARGS)
            page = browser.new_page()
            page.set_default_timeout(PATIENCE)
            page.goto(app.url)
            page.wait_for_selector("#generate-go")
            with crowded(crowd[0]):
                until(lambda: page.get_by_text("busy").count(), lambda: page.click("#generate-go"))
            until(
                lambda: page.locator("#generate-result .ll-panel").count(), lambda: page.click("#generate-go")
            )
            mine = set(app.temp.glob("lolgen-demo-*/session-*"))
            assert mine
            browser.close()
        until(
            lambda: len(set(app.temp.glob("lolgen-demo-*/session-*")) & mine) < len(mine),
            lambda: time.sleep(0.2),
        )
        assert app.stop() == 0 and app.files() == []
