"""Writes that happen in full or not at all: a temporary file beside the target, then a rename over it."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Mapping
from pathlib import Path


def write_file(path: str | os.PathLike[str], data: bytes) -> None:
    """Put `data` at `path`, making its parents; whoever looks sees the old file or the new. OSError."""
    target = Path(os.path.realpath(path))  # a link stays a link
    target.parent.mkdir(parents=True, exist_ok=True)
    staged = _stage(target, data)
    try:
        os.replace(staged, target)
    except BaseException:
        staged.unlink(missing_ok=True)
        raise
    _sync_folder(target.parent)


def write_folder(path: str | os.PathLike[str], files: Mapping[str, bytes], last: str) -> None:
    """Put `files` (name -> bytes) into the folder `path`; other files in it are left alone.

    A folder that is not there yet appears whole. In one that is there, `last` (the file without which no
    reader takes the folder for an adapter) is removed first and put back last, so that a kill between two
    renames leaves a folder that is refused, never new weights under an old config.
    """
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    if not target.exists():
        whole = target.with_name(_hidden(target.name))
        try:
            whole.mkdir()
            for name, data in files.items():
                _write(whole / name, data)
            _sync_folder(whole)
            os.rename(whole, target)
        except BaseException:
            shutil.rmtree(whole, ignore_errors=True)
            raise
        _sync_folder(target.parent)
        return
    staged: dict[str, Path] = {}
    try:
        for name, data in files.items():
            staged[name] = _stage(target / name, data)
        (target / last).unlink(missing_ok=True)
        for name in sorted(staged, key=lambda n: n == last):
            os.replace(staged[name], target / name)
    except BaseException:
        for file in staged.values():
            file.unlink(missing_ok=True)
        raise
    _sync_folder(target)


def _hidden(name: str) -> str:
    return f".{name}.{secrets.token_hex(4)}.tmp"


def _stage(target: Path, data: bytes) -> Path:
    file = target.with_name(_hidden(target.name))
    try:
        _write(file, data)
    except BaseException:
        file.unlink(missing_ok=True)
        raise
    return file


def _write(path: Path, data: bytes) -> None:
    # os.open rather than tempfile: the user's umask decides on the mode, as for any file they make.
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as f:
        f.write(data)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(path: Path) -> None:
    if os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
