"""The end of the app waits for handlers that are computing, and not for ever."""

from __future__ import annotations

import threading

import gradio as gr
import pytest

from demos import guard
from lolgen.errors import LolgenError


def test_draining_waits_for_the_handler_that_is_at_work(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = guard.Workers()
    monkeypatch.setattr(guard, "WORKERS", workers)
    begun, go_on = threading.Event(), threading.Event()

    def handler() -> str:
        begun.set()
        assert go_on.wait(20)
        return "done"

    thread = threading.Thread(target=guard.friendly(handler))
    assert workers.drain(0)
    thread.start()
    assert begun.wait(20)
    assert not workers.drain(0.05)
    go_on.set()
    assert workers.drain(20)
    thread.join()


def test_a_handler_that_fails_is_at_work_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    workers = guard.Workers()
    monkeypatch.setattr(guard, "WORKERS", workers)

    def handler() -> None:
        raise LolgenError("no such thing")

    with pytest.raises(gr.Error):
        guard.friendly(handler)()
    assert workers.drain(0)
