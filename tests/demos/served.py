"""The app as users get it: `lolgen demo` in a process of its own, a browser, and a client that speaks to its queue."""

from __future__ import annotations

import contextlib
import io as stdio
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lolgen import pictures

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM_ARGS = [
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
]  # fmt: skip

ANYBODY = ["any"] * len(pictures.ATTRIBUTES)
PATIENCE = 120_000
"""Milliseconds that a browser waits, on a machine that is busy with other things."""


def chromium() -> str:
    """The browser's path. Without one: in CI a failure that names the remedy, elsewhere a skip."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        reason = "no chromium: install it (Debian: apt-get install -y --no-install-recommends chromium)"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return found


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


class App:
    """A running app. `temp`: the folder that its temporary files are in; `log`: what it printed."""

    def __init__(self, process: subprocess.Popen[str], url: str, temp: Path, log: Path) -> None:
        self.process, self.url, self.temp, self.log = process, url, temp, log

    def files(self) -> list[Path]:
        return [p for p in self.temp.rglob("*") if p.is_file()]

    def stop(self) -> int:
        self.process.terminate()
        return self.process.wait(timeout=30)


@contextlib.contextmanager
def serving(folder: Path, code: str | None = None) -> Iterator[App]:
    """`lolgen demo` on a free port, called from `folder`; `code` is run in its place, with PORT put in."""
    port = free_port()
    temp = folder / "temp"
    temp.mkdir()
    log = folder / "log"
    command = [sys.executable, "-m", "lolgen.cli", "demo", "--port", str(port)]
    if code is not None:
        command = [sys.executable, "-c", code.replace("PORT", str(port))]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {
        "PYTHONPATH": path,
        "TMPDIR": str(temp),
        "OMP_NUM_THREADS": "1",
        "PYTHONUNBUFFERED": "1",
    }
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out, text=True)
        try:
            limit = time.monotonic() + 300
            while "serving on" not in log.read_text():
                if process.poll() is not None or time.monotonic() > limit:
                    raise AssertionError(f"the app did not start:\n{log.read_text()}")
                time.sleep(0.1)
            yield App(process, f"http://127.0.0.1:{port}", temp, log)
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


class Client:
    """One visitor: calls endpoints through Gradio's queue, as the page does, and can send what the page never would."""

    def __init__(self, url: str, session: str) -> None:
        self.http = httpx.Client(base_url=url, timeout=180, trust_env=False)
        self.session = session
        config = self.http.get("/config").raise_for_status().json()
        self.functions = {d["api_name"]: d["id"] for d in config["dependencies"]}

    def join(self, name: str, data: list[Any]) -> httpx.Response:
        body = {"data": data, "fn_index": self.functions[name], "session_hash": self.session}
        return self.http.post("/gradio_api/queue/join", json=body)

    def wait(self) -> dict[str, Any]:
        """The last message of the running event: {"success", "output"}."""
        with self.http.stream(
            "GET", "/gradio_api/queue/data", params={"session_hash": self.session}
        ) as lines:
            for line in lines.iter_lines():
                message = json.loads(line.removeprefix("data:")) if line.startswith("data:") else {}
                if message.get("msg") == "process_completed":
                    return dict(message)
        raise AssertionError("the queue closed without an answer")

    def call(self, name: str, data: list[Any]) -> dict[str, Any]:
        self.join(name, data).raise_for_status()
        return self.wait()

    def error(self, name: str, data: list[Any]) -> str:
        """The text of an answer that must be an error."""
        found = self.call(name, data)
        assert not found["success"], found
        return str(found["output"]["error"])

    def upload(self, file: str, data: bytes) -> httpx.Response:
        return self.http.post("/gradio_api/upload", files={"files": (file, data)})

    def sent(self, file: str, data: bytes) -> dict[str, Any]:
        """An uploaded file as the page hands it to an event."""
        (path,) = self.upload(file, data).raise_for_status().json()
        return {"path": path, "orig_name": file, "size": len(data), "meta": {"_type": "gradio.FileData"}}

    def download(self, page: str, format: str) -> bytes:
        """What is behind the first download link of a result."""
        found = re.search(rf"lolgen/file/[\w-]+/{format}", page)
        assert found, page[:500]
        return self.http.get(f"/{found[0]}").raise_for_status().content

    def close(self) -> None:
        self.http.close()


def same_folder(archive: bytes, folder: Path) -> None:
    with zipfile.ZipFile(stdio.BytesIO(archive)) as z:
        packed = {n.split("/")[1]: z.read(n) for n in z.namelist()}
    assert packed == {f.name: f.read_bytes() for f in folder.iterdir()}
