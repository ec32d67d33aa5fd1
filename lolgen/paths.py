"""Where the shipped models and zoos lie: `lolgen/_checkpoints/` in the wheel, `checkpoints/` in a clone."""

from __future__ import annotations

import os
from pathlib import Path

from lolgen.errors import LolgenError

ENV = "LOLGEN_CHECKPOINTS"
"""Environment variable naming a folder to use in place of the shipped one."""

_PACKAGE = Path(__file__).resolve().parent


def checkpoints_dir() -> Path:
    """The folder of the shipped models, an existing directory.

    The first of: `$LOLGEN_CHECKPOINTS`; `_checkpoints` in the installed package; `checkpoints` beside the
    package in a clone. LolgenError names what was tried; a variable that names no folder is an error too,
    never passed over.
    """
    override = os.environ.get(ENV)
    if override:
        path = Path(override).expanduser()
        if not path.is_dir():
            raise LolgenError(f"{ENV}={override} is not a folder; correct or unset it")
        return path.resolve()
    packaged, repository = _PACKAGE / "_checkpoints", _PACKAGE.parent
    if packaged.is_dir():
        return packaged
    # Beside an installed package lies site-packages, where a `checkpoints` would be somebody else's.
    if (repository / "pyproject.toml").is_file() and (repository / "checkpoints").is_dir():
        return repository / "checkpoints"
    raise LolgenError(
        f"no checkpoints: tried {packaged} and {repository / 'checkpoints'}; "
        f"reinstall lolgen, or set {ENV} to the folder `checkpoints` of a clone"
    )


def zoos_dir() -> Path:
    """The folder of the zoos' shards, an existing directory; LolgenError where there is none (in a wheel)."""
    path = checkpoints_dir() / "zoos"
    if not path.is_dir():
        raise LolgenError(
            f"no zoos: {path} is not a folder (the wheel leaves them out); "
            f"set {ENV} to the folder `checkpoints` of a clone"
        )
    return path
