"""What the app keeps of its visitors: a folder a session, deleted when the tab is closed or left idle.

A session is known by the random id that Gradio gives a browser tab. An adapter made or uploaded in it is an
`Item` with a random id of its own: whoever has that id may download the file, as the link says, while it lives.
"""

from __future__ import annotations

import re
import secrets
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lolgen.errors import LolgenError

MIB = 2**20


@dataclass(frozen=True)
class Limits:
    """Bounds of one running app; seconds and bytes."""

    sessions: int = 256
    items: int = 40
    """Adapters a session keeps; the oldest goes first."""
    session_bytes: int = 256 * MIB
    all_bytes: int = 2048 * MIB
    idle: float = 3600.0
    """A session without any event for so long is over."""
    grace: float = 120.0
    """A closed tab may come back (a phone that lost its network): its files wait so long."""
    uploads: float = 600.0
    """Uploads that no event asked for are deleted after this."""


@dataclass
class Item:
    """An adapter in the app: where it lies, what it is called, how it is prompted."""

    name: str
    path: Path
    """A file or a PEFT folder that `lolgen.io.load` reads."""
    kind: str
    """"example", "upload", "generated", "edited", "mixed" or "from a picture"."""
    prompt: str = ""
    note: str = ""
    native: bool = True
    """Whether it is for the base model that the app draws with."""
    speaks: bool = False
    """Whether it was made for the language model: the gallery shows it, the pickers of faces do not."""
    thumb: str = ""
    """Data URI of a small picture, or empty."""
    formats: tuple[str, ...] = ()
    id: str = field(default_factory=lambda: secrets.token_urlsafe(12))
    pictures: dict[tuple[str, ...], list[str]] = field(default_factory=dict)
    """Pictures drawn already, as data URIs, by prompts and seeds."""

    @property
    def slug(self) -> str:
        """The name as part of a file name."""
        return re.sub(r"[^a-z0-9]+", "-", self.name.lower()).strip("-")[:40] or "lora"


@dataclass
class Session:
    folder: Path
    items: list[Item] = field(default_factory=list)
    uploads: set[Path] = field(default_factory=set)
    """Files in the upload cache that this session was sent."""
    picture: Path | None = None
    """The picture that a LoRA may be made from next."""
    seen: float = 0.0
    closed: float | None = None
    count: int = 0

    def place(self) -> Path:
        """A new path in the session's folder, nothing there yet."""
        self.count += 1
        return self.folder / f"{self.count:04d}-{secrets.token_hex(4)}"


class Store:
    """All sessions of a running app. Everything it writes lies under `root`, which `close` deletes."""

    def __init__(self, limits: Limits | None = None, clock: Callable[[], float] = time.monotonic) -> None:
        self.limits = limits or Limits()
        self.clock = clock
        self.root = Path(tempfile.mkdtemp(prefix="lolgen-demo-"))
        self.uploads = self.root / "uploads"
        self.uploads.mkdir()
        self.examples: list[Item] = []
        self._sessions: dict[str, Session] = {}
        self._lock = threading.RLock()
        self._stop = threading.Event()

    def session(self, key: str | None) -> Session:
        """The session of a browser tab, opened on its first event. LolgenError when the app holds too many."""
        if not key:
            raise LolgenError("this page has lost its session; reload it")
        with self._lock:
            found = self._sessions.get(key)
            if found is None:
                if len(self._sessions) >= self.limits.sessions:
                    self.sweep()
                if len(self._sessions) >= self.limits.sessions:
                    raise LolgenError("busy: too many people are using this app now; try again in a minute")
                folder = Path(tempfile.mkdtemp(prefix="session-", dir=self.root))
                found = self._sessions[key] = Session(folder)
            found.seen, found.closed = self.clock(), None
            return found

    def items(self, key: str | None) -> list[Item]:
        """What a session can choose from: its own, newest first, then the examples."""
        with self._lock:
            own = self._sessions[key].items if key in self._sessions else []
            return [*reversed(own), *self.examples]

    def add(self, key: str | None, item: Item) -> Item:
        """Keep `item`; the oldest ones of the session make room. LolgenError when the disk's share is used up."""
        with self._lock:
            session = self.session(key)
            size = _size(item.path)
            others = sum(_size(s.folder) for s in self._sessions.values() if s is not session)
            while session.items and (
                len(session.items) >= self.limits.items
                or sum(_size(i.path) for i in session.items) + size > self.limits.session_bytes
            ):
                _remove(session.items.pop(0).path)
            if others + _size(session.folder) > self.limits.all_bytes:
                _remove(item.path)
                raise LolgenError("busy: the app's disk space is used up; try again in a few minutes")
            session.items.append(item)
            return item

    def item(self, key: str | None, id: object) -> Item:
        """The item that a session chose. LolgenError when it is none of its own."""
        for item in self.items(key):
            if item.id == id:
                return item
        raise LolgenError("this LoRA is gone: it left with its session; choose another")

    def linked(self, id: str) -> Item | None:
        """The item behind a download link."""
        with self._lock:
            everything = [*self.examples, *(i for s in self._sessions.values() for i in s.items)]
            return next((i for i in everything if secrets.compare_digest(i.id, id)), None)

    def closed(self, key: str | None) -> None:
        """The tab was closed: the session goes unless it comes back within the grace."""
        with self._lock:
            if key in self._sessions:
                self._sessions[key].closed = self.clock()

    def sweep(self) -> None:
        """Delete what is over: closed and idle sessions with all their files, and stray uploads."""
        now = self.clock()
        with self._lock:
            for key, session in list(self._sessions.items()):
                left = session.closed is not None and now - session.closed >= self.limits.grace
                if left or now - session.seen >= self.limits.idle:
                    del self._sessions[key]
                    _remove(session.folder)
                    held = {u for s in self._sessions.values() for u in s.uploads}
                    for upload in session.uploads - held:
                        _remove(upload.parent if upload.parent != self.uploads else upload)
        stale = time.time() - self.limits.uploads
        for upload in self.uploads.iterdir():
            try:
                if upload.stat().st_ctime < stale:
                    _remove(upload)
            except FileNotFoundError:
                pass

    def keep_sweeping(self, every: float = 15.0) -> None:
        """Sweep in the background until `close`."""

        def loop() -> None:
            while not self._stop.wait(every):
                self.sweep()

        threading.Thread(target=loop, name="lolgen-demo-sweep", daemon=True).start()

    def close(self) -> None:
        """Delete everything."""
        self._stop.set()
        with self._lock:
            self._sessions.clear()
            shutil.rmtree(self.root, ignore_errors=True)


def names_taken(items: Sequence[Item], name: str) -> str:
    """`name`, numbered when the session has one called so."""
    taken = {i.name for i in items}
    return (
        name
        if name not in taken
        else next(f"{name} {n}" for n in range(2, 10**6) if f"{name} {n}" not in taken)
    )


def _size(path: Path) -> int:
    if path.is_file():
        return path.stat().st_size
    return sum(p.stat().st_size for p in path.rglob("*") if p.is_file())


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
