"""What stands between visitors and the app: one-line errors, no file but uploads, no body beyond a limit."""

from __future__ import annotations

import functools
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from lolgen.errors import LolgenError

from .uploads import MAX_BYTES, received

SORRY = "Something went wrong on our side, and nothing was changed. Try again, perhaps with another LoRA."
SLACK = 2**20
"""Bytes of a request around what is uploaded."""


class Workers:
    """How many handlers are computing. A thread that the end of the process finds inside torch aborts it."""

    def __init__(self) -> None:
        self._idle = threading.Condition()
        self._count = 0

    def __enter__(self) -> None:
        with self._idle:
            self._count += 1

    def __exit__(self, *_: object) -> None:
        with self._idle:
            self._count -= 1
            self._idle.notify_all()

    def drain(self, seconds: float) -> bool:
        """Wait until none is left, or so long; whether none is."""
        with self._idle:
            return self._idle.wait_for(lambda: self._count == 0, seconds)


WORKERS = Workers()


def friendly(handler: Callable[..., Any]) -> Callable[..., Any]:
    """`handler` with its errors in words: LolgenError as its one line, all others as `SORRY`, logged on stderr."""

    @functools.wraps(handler)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        try:
            with WORKERS:
                return handler(*args, **kwargs)
        except gr.Error:
            raise
        except LolgenError as error:
            raise message(" ".join(str(error).split())) from None
        except Exception as error:
            traceback.print_exception(error, file=sys.stderr)
            raise message(SORRY) from None

    return wrapped


def message(text: str) -> gr.Error:
    """A toast with one line, without the traceback that Gradio would log. Toasts are HTML, and names are foreign."""
    if text.split(" ")[0].isalpha():  # not a file's name
        text = text[:1].upper() + text[1:]
    return gr.Error(escape(text[:600]), duration=12, title="That did not work", print_exception=False)


class Blocks(gr.Blocks):
    """`gr.Blocks` that takes no file from a client but what its own upload route stored.

    Gradio opens (or fetches, for a URL) whatever a client's FileData names if it lies in its cache; here the cache
    is this app's alone, and everything else is refused before it is looked at.
    """

    def __init__(self, uploads: Path, **kwargs: Any) -> None:
        self.uploads = uploads
        super().__init__(**kwargs)

    async def preprocess_data(
        self, block_fn: Any, inputs: list[Any], state: Any, explicit_call: bool = False
    ) -> Any:
        try:
            for row in _file_objects(inputs):
                received(self.uploads, row)
            return await super().preprocess_data(block_fn, inputs, state, explicit_call)
        except LolgenError as error:
            raise message(str(error)) from None
        except gr.Error as error:
            raise message(error.message) from None
        except Exception:
            # What the page cannot send: a text where a number goes, too few values.
            raise message("a field holds what it cannot hold; reload the page") from None


def _file_objects(value: Any) -> Iterator[dict[str, Any]]:
    """Everything in a client's data that Gradio could take for a file: it has a path or a URL."""
    if isinstance(value, dict):
        if "path" in value or "url" in value:
            yield value
        for inner in value.values():
            yield from _file_objects(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _file_objects(inner)


class BodyLimit:
    """ASGI middleware: a request with a body of more than `most` bytes, or of a size it does not tell, is refused."""

    def __init__(self, app: Any, most: int = MAX_BYTES + SLACK) -> None:
        self.app = app
        self.most = most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and scope["method"] in ("POST", "PUT", "PATCH"):
            headers = dict(scope["headers"])
            length = headers.get(b"content-length", b"")
            untold = b"transfer-encoding" in headers and not length
            if untold or (length.isdigit() and int(length) > self.most):
                text = f"This is more than {self.most // 2**20 - 1} MB, or its size is not told.".encode()
                start = {"type": "http.response.start", "status": 413,
                         "headers": [(b"content-type", b"text/plain"), (b"connection", b"close")]}  # fmt: skip
                await send(start)
                await send({"type": "http.response.body", "body": text})
                return
        await self.app(scope, receive, send)
