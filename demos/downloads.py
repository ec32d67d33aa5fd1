"""Downloads: any adapter of the app in any of the three formats, written when the link is followed."""

from __future__ import annotations

import io as stdio
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from lolgen import io
from lolgen.errors import LolgenError
from lolgen.io import diffusers
from lolgen.lora import LoRA

from .sessions import Item, Store

ROUTE = "lolgen/file"


def link(item: Item, format: str) -> str:
    """Relative, so that it holds behind a proxy too."""
    return f"{ROUTE}/{item.id}/{format}"


def formats_of(lora: LoRA) -> tuple[str, ...]:
    """The formats that can hold `lora`: tried, since only a writer knows (a PEFT folder is for one model)."""
    found = []
    for format in io.FORMATS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                io.save(lora, _target(Path(folder), format), format)
            except LolgenError:
                continue
            found.append(format)
    return tuple(found)


def content(item: Item, format: str) -> tuple[str, bytes]:
    """(file name, bytes) of an item in a format: a zip of the folder for PEFT, one .safetensors file otherwise.

    LolgenError when the format cannot hold it.
    """
    if format not in io.FORMATS:
        raise LolgenError(f"found format {format!r}, wanted one of {', '.join(io.FORMATS)}")
    if format == "peft" and (item.path / diffusers.FILE).is_file():
        # As it was made: the very files that the command line writes.
        return f"{item.slug}-peft.zip", _zipped(item.slug, item.path)
    with tempfile.TemporaryDirectory() as folder:
        written = io.save(io.load(item.path), _target(Path(folder), format), format)
        if format == "peft":
            return f"{item.slug}-peft.zip", _zipped(item.slug, written)
        return f"{item.slug}-{format}.safetensors", written.read_bytes()


def _zipped(name: str, folder: Path) -> bytes:
    buffer = stdio.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.iterdir()):
            # A fixed date: the same adapter is the same zip.
            entry = zipfile.ZipInfo(f"{name}/{file.name}", (2024, 1, 1, 0, 0, 0))
            entry.compress_type, entry.external_attr = zipfile.ZIP_DEFLATED, 0o644 << 16
            archive.writestr(entry, file.read_bytes())
    return buffer.getvalue()


def route(store: Store) -> Any:
    """The Starlette route behind `link`."""
    from starlette.concurrency import run_in_threadpool
    from starlette.requests import Request
    from starlette.responses import PlainTextResponse, Response
    from starlette.routing import Route

    async def send(request: Request) -> Response:
        item = store.linked(request.path_params["id"])
        if item is None:
            return PlainTextResponse("This file is gone: it left with its session.\n", 404)
        try:
            name, data = await run_in_threadpool(content, item, request.path_params["format"])
        except (LolgenError, OSError) as error:
            text = str(error) if isinstance(error, LolgenError) else "this file is gone"
            return PlainTextResponse(f"{text.replace(str(item.path), item.name)}\n", 409)
        kind = "application/zip" if name.endswith(".zip") else "application/octet-stream"
        headers = {
            "content-disposition": f'attachment; filename="{name}"',
            "cache-control": "no-store",
            "x-content-type-options": "nosniff",
        }
        return Response(data, media_type=kind, headers=headers)

    return Route(f"/{ROUTE}/{{id}}/{{format}}", send)


def _target(folder: Path, format: str) -> Path:
    return folder / "adapter" if format == "peft" else folder / "adapter.safetensors"
