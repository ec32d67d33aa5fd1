"""Folders of packages that are read as files and never imported."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from lolgen.errors import LolgenError


def package_folder(name: str, install: str) -> Path:
    """The folder of the installed package with the import name `name`; LolgenError tells to `pip install` it."""
    spec = find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise LolgenError(f"the package {name!r} is not installed; pip install {install}")
    return Path(next(iter(spec.submodule_search_locations)))
