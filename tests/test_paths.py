from __future__ import annotations

from pathlib import Path

import pytest

from lolgen import paths
from lolgen.errors import LolgenError


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder in which a package `lolgen` is installed, without checkpoints so far."""
    (tmp_path / "lolgen").mkdir()
    monkeypatch.setattr(paths, "_PACKAGE", tmp_path / "lolgen")
    monkeypatch.delenv(paths.ENV, raising=False)
    return tmp_path


def as_clone(site: Path) -> Path:
    (site / "pyproject.toml").touch()
    (site / "checkpoints").mkdir()
    return site / "checkpoints"


def as_wheel(site: Path) -> Path:
    (site / "lolgen" / "_checkpoints").mkdir()
    return site / "lolgen" / "_checkpoints"


def test_a_clone_has_them_beside_the_package(site: Path) -> None:
    beside = as_clone(site)
    assert paths.checkpoints_dir() == beside


def test_a_wheel_has_them_inside_and_they_come_first(site: Path) -> None:
    as_clone(site)
    inside = as_wheel(site)
    assert paths.checkpoints_dir() == inside


def test_the_variable_comes_before_both(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    as_clone(site), as_wheel(site)
    (site / "mine").mkdir()
    monkeypatch.setenv(paths.ENV, str(site / "mine"))
    assert paths.checkpoints_dir() == site / "mine"


def test_a_variable_that_names_no_folder_is_never_passed_over(
    site: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_wheel(site)
    monkeypatch.setenv(paths.ENV, str(site / "gone"))
    with pytest.raises(LolgenError, match=f"{paths.ENV}=.*gone is not a folder"):
        paths.checkpoints_dir()


def test_somebody_elses_folder_in_site_packages_is_not_taken(site: Path) -> None:
    (site / "checkpoints").mkdir()
    with pytest.raises(LolgenError) as error:
        paths.checkpoints_dir()
    for tried in (site / "lolgen" / "_checkpoints", site / "checkpoints", paths.ENV):
        assert str(tried) in str(error.value)


def test_zoos_are_in_a_clone_and_not_in_a_wheel(site: Path) -> None:
    zoos = as_clone(site) / "zoos"
    zoos.mkdir()
    assert paths.zoos_dir() == zoos
    as_wheel(site)
    with pytest.raises(LolgenError, match="the wheel leaves them out"):
        paths.zoos_dir()
