"""All or nothing, whatever goes wrong on the way."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from adapters import UNET, random, tree

from lolgen import io
from lolgen.errors import FormatError
from lolgen.io import atomic

FILES = {"weights": b"new weights", "config": b"new config"}


class Stop(BaseException):
    """Stands for a kill between two steps."""


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "x"
    atomic.write_file(file, b"old")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    for step in ("fsync", "replace"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space"):
            patch.setattr(os, step, refuse)
            atomic.write_file(file, b"new")
        assert tree(tmp_path) == {"x": b"old"}
    atomic.write_file(file, b"new")
    assert tree(tmp_path) == {"x": b"new"}


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"old")
    (tmp_path / "link").symlink_to("real")
    atomic.write_file(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_bytes() == b"new"


def test_a_new_folder_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(os, "rename", refuse)
        atomic.write_folder(tmp_path / "out", FILES, last="config")
    assert list(tmp_path.iterdir()) == []
    atomic.write_folder(tmp_path / "out", FILES, last="config")
    assert tree(tmp_path / "out") == FILES


def stopping_after(count: int) -> Callable[[Path, Path], None]:
    """`os.replace` that works so many times."""
    replace, left = os.replace, [None] * count

    def some(src: Path, dst: Path) -> None:
        if not left:
            raise Stop
        left.pop()
        replace(src, dst)

    return some


def test_an_old_config_never_stands_beside_new_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for left in (0, 1):
        for name in ("weights", "config", "mine"):
            (tmp_path / name).write_bytes(b"old")
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(os, "replace", stopping_after(left))
            atomic.write_folder(tmp_path, FILES, last="config")
        assert tree(tmp_path) == {"weights": b"new weights" if left else b"old", "mine": b"old"}
    atomic.write_folder(tmp_path, FILES, last="config")
    assert tree(tmp_path) == FILES | {"mine": b"old"}


@pytest.mark.parametrize("format", io.FORMATS)
def test_what_cannot_be_saved_touches_nothing(format: str, tmp_path: Path) -> None:
    good = random(UNET)
    place = tmp_path / ("x" if format == "peft" else "x.safetensors")
    io.save(good, place, format)
    before = tree(tmp_path)
    bad = random(UNET)
    bad["unet.conv_in"].B[0, 0] = float("nan")
    with pytest.raises(FormatError, match="1 NaN and 0 Inf"):
        io.save(bad, place, format)
    assert tree(tmp_path) == before
