"""Everything that lolgen raises on purpose, all from `LolgenError`; the CLI turns it into exit code 2."""

from __future__ import annotations

import os


class LolgenError(Exception):
    """Base of all errors whose message is meant for the user."""


class ShapeError(LolgenError):
    """A tensor does not fit the spec. The message names the module, the shape found and the shape wanted."""


class SpecError(LolgenError):
    """A spec is not valid, or two specs that must be equal are not."""


class AttributeValueError(LolgenError):
    """An attribute, or a value of one, that does not exist. The message names the valid ones."""


class FormatError(LolgenError):
    """A file that is not what it should be.

    `file`: its path; `key`: the key inside it, if one is at fault; `found`, `wanted`: what is there and what
    should be; `remedy`: what the user can do. `str()` is one line that names them all.
    """

    def __init__(
        self, file: str | os.PathLike[str], *, key: str | None = None, found: str, wanted: str, remedy: str
    ) -> None:
        self.file = os.fspath(file)
        self.key = key
        self.found = found
        self.wanted = wanted
        self.remedy = remedy
        where = self.file if key is None else f"{self.file}, key {_brief(repr(key))}"
        # A name or a library's message may hold line breaks, and be long; the error stays one line.
        line = f"{where}: found {_brief(found)}; wanted {_brief(wanted)}; {_brief(remedy)}"
        super().__init__(" ".join(line.split()))

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments: the default would rebuild from `args` and fail in a process pool.
        return _format_error, (self.file, self.key, self.found, self.wanted, self.remedy)


def _brief(text: str, most: int = 400) -> str:
    return text if len(text) <= most else f"{text[: most - 40]} ... ({len(text)} characters)"


def _format_error(file: str, key: str | None, found: str, wanted: str, remedy: str) -> FormatError:
    return FormatError(file, key=key, found=found, wanted=wanted, remedy=remedy)
