"""The index on disk: SQLite with a row an adapter, its sketch in it, and usearch's file made from those rows.

    .lolgen-search/
      adapters.sqlite     what is known of every file: stamp, sha256, base, sketch, or its error
      vectors.usearch     the sketches as a nearest-neighbour index, in usearch's own format

The rows are the truth and are written as files are read, so a killed run goes on where it stopped; the vectors are
put in place in one rename at the end, and made anew whenever they do not belong to the rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import secrets
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lolgen.errors import LolgenError
from lolgen.tools.search.sketch import SIZE, VERSION

FOLDER = ".lolgen-search"
ROWS, VECTORS = "adapters.sqlite", "vectors.usearch"
_FORMAT = f"1 sketch {VERSION} {SIZE}"
_SCHEMA = """
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE adapters (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    path TEXT UNIQUE NOT NULL,
    stamp TEXT NOT NULL,
    sha256 TEXT NOT NULL,
    error TEXT,
    family TEXT,
    format TEXT,
    modules INTEGER,
    sketch BLOB
);
"""


@dataclass(frozen=True)
class Row:
    """An indexed file. `path` is relative to the indexed folder; `sketch` (p * p,) float32 of length 1, None for a
    file with an `error` and for a LoRA that is zero. A file that changes gets a new `id`."""

    path: str
    stamp: str
    sha256: str
    error: str | None = None
    family: str | None = None
    format: str | None = None
    modules: int | None = None
    sketch: np.ndarray[Any, Any] | None = None
    id: int = 0


class Store:
    """An index's folder. LolgenError when it is none, is of another version, is damaged, or is in use."""

    def __init__(self, folder: str | Path, *, root: str | Path | None = None) -> None:
        """Open the index in `folder`; with `root`, the folder of adapters, it is made where it is missing."""
        self.folder = Path(folder)
        file = self.folder / ROWS
        if root is None and not file.is_file():
            raise LolgenError(f"{folder}: found no search index; make one: lolgen search index FOLDER")
        with self._errors():
            self.folder.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(file, timeout=5)
            if not self._db.execute("SELECT 1 FROM sqlite_master WHERE name = 'meta'").fetchone():
                self._db.executescript(f"BEGIN; {_SCHEMA} COMMIT;")
                self._set("format", _FORMAT)
            if self._get("format") != _FORMAT:
                raise LolgenError(
                    f"{folder}: an index of another version of lolgen; remove it and index again"
                )
            if root is not None:
                self._set("root", os.path.relpath(Path(root).resolve(), self.folder.resolve()))
            self._db.commit()
        self._index: Any = None

    @property
    def root(self) -> Path:
        """The folder that was indexed; kept relative to the index, so that both can be moved together."""
        return Path(os.path.normpath(self.folder.resolve() / self._get("root")))

    def rows(self, *, sketches: bool = False) -> list[Row]:
        """Every row, by path; sketches are left out unless asked for."""
        columns = "path, stamp, sha256, error, family, format, modules, id, sketch"
        if not sketches:
            columns = columns.replace("sketch", "NULL")
        with self._errors():
            found = self._db.execute(f"SELECT {columns} FROM adapters ORDER BY path").fetchall()
        return [
            Row(path, stamp, sha, error, family, form, modules, _vector(blob), key)
            for path, stamp, sha, error, family, form, modules, key, blob in found
        ]

    def put(self, row: Row) -> None:
        """Add a row, in place of the one of the same path. Lasting after `commit`."""
        blob = None if row.sketch is None else np.asarray(row.sketch, np.float32).tobytes()
        with self._errors():
            self._db.execute("DELETE FROM adapters WHERE path = ?", (row.path,))
            self._db.execute(
                "INSERT INTO adapters (path, stamp, sha256, error, family, format, modules, sketch) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                (row.path, row.stamp, row.sha256, row.error, row.family, row.format, row.modules, blob),
            )

    def touch(self, path: str, stamp: str) -> None:
        """The same content under a new stamp."""
        with self._errors():
            self._db.execute("UPDATE adapters SET stamp = ? WHERE path = ?", (stamp, path))

    def drop(self, paths: Iterable[str]) -> None:
        """Forget files that are gone."""
        with self._errors():
            self._db.executemany("DELETE FROM adapters WHERE path = ?", [(p,) for p in paths])

    def commit(self) -> None:
        with self._errors():
            self._db.commit()

    def close(self) -> None:
        self._db.close()

    def index(self) -> Any:
        """The usearch index of all sketches, keys = ids: from its file, brought up to date with the rows."""
        if self._index is None:
            self._index = self._load_index()
        return self._index

    def _load_index(self) -> Any:
        from usearch.index import Index

        rows = [r for r in self.rows(sketches=True) if r.sketch is not None]
        index = Index(ndim=SIZE * SIZE, metric="cos", dtype="f16")
        file = self.folder / VECTORS
        kept: set[int] = set()
        if file.is_file() and self._get("vectors") == _digest(file):
            index.load(os.fspath(file))
            kept = {int(k) for k in index.keys}
        wanted = {r.id for r in rows}
        for gone in kept - wanted:
            index.remove(gone)
        new = [r for r in rows if r.id not in kept]
        if new:
            index.add(np.array([r.id for r in new], np.uint64), np.stack([r.sketch for r in new]))  # type: ignore[misc]
        return index

    def save_index(self) -> None:
        """Bring usearch's file up to date with the rows, in one rename."""
        self._index = None
        index, file = self.index(), self.folder / VECTORS
        staged = file.with_name(f".{VECTORS}.{secrets.token_hex(4)}.tmp")
        try:
            index.save(os.fspath(staged))
            digest = _digest(staged)
            os.replace(staged, file)
        except OSError as error:
            raise LolgenError(f"{file}: cannot write: {error.strerror or error}") from error
        finally:
            staged.unlink(missing_ok=True)
        with self._errors():
            self._set("vectors", digest)
            self._db.commit()

    def _get(self, key: str) -> str:
        found = self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()
        return str(found[0]) if found else ""

    def _set(self, key: str, value: str) -> None:
        self._db.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (key, value))

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.OperationalError as error:
            raise LolgenError(
                f"{self.folder}: cannot use the index: {error}; is another run at work?"
            ) from error
        except sqlite3.DatabaseError as error:
            raise LolgenError(
                f"{self.folder}: a damaged index ({error}); remove it and index again"
            ) from error
        except OSError as error:
            raise LolgenError(f"{self.folder}: {error.strerror or error}") from error


def _vector(blob: bytes | None) -> np.ndarray[Any, Any] | None:
    return None if blob is None else np.frombuffer(blob, np.float32)


def _digest(file: Path) -> str:
    with file.open("rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()
