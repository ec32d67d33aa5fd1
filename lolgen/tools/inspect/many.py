"""Many files one after the other: a report each, an error where one cannot be read, relatives at the end."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from lolgen.errors import FormatError, LolgenError
from lolgen.tools.inspect import intruder
from lolgen.tools.inspect.relatives import Relatives
from lolgen.tools.inspect.report import Report, describe
from lolgen.tools.inspect.source import Source, find, open_source


class Many:
    """`reports`: to be read once, a report a file, read as it is asked for; `relatives()` after that."""

    def __init__(
        self, paths: Sequence[Path], modules: bool, bases: intruder.Counts | None, near: float
    ) -> None:
        self.paths, self.modules, self.bases = list(paths), modules, bases
        self._relatives = Relatives(near)

    @property
    def reports(self) -> Iterator[Report]:
        alone = len(self.paths) == 1
        for path in tqdm(self.paths, desc="inspect", unit="file", leave=False, disable=None):
            start = time.perf_counter()
            try:
                source = open_source(path)
                report = describe(source, modules=self.modules)
            except LolgenError as error:
                if alone:
                    raise
                yield {"path": str(path), "error": str(error)}
                continue
            if source.lora is not None:
                if self.bases is not None:
                    report["intruders"] = self.bases.of(str(path))
                if not alone:
                    self._relatives.add(str(path), source.lora)
            report["seconds"] = round(time.perf_counter() - start, 3)
            yield report

    def relatives(self) -> dict[str, Any]:
        """Near pairs and duplicates among the files that loaded; see `Relatives.find`."""
        return self._relatives.find()


def inspect_all(
    paths: Sequence[str | Path],
    *,
    modules: bool = False,
    base: str | Path | None = None,
    threshold: float = 0.5,
    k: int = 10,
    near: float = 0.5,
) -> Many:
    """Every adapter at or below `paths`; see `Source`, `intruder.count`, `Relatives`.

    A file that cannot be read is a report with its "error"; a single one raises it. FormatError when there is
    nothing at all, or the base is no model's folder.
    """
    places = find(paths)
    if not places:
        raise FormatError(
            str(paths[0]), found="a folder without adapters", wanted=".safetensors files or PEFT folders",
            remedy="check the path",
        )  # fmt: skip
    if not 0 < near <= 1:
        raise LolgenError(f"--near: found {near:g}, wanted a cosine above 0 and at most 1")
    counts = None
    if base is not None:
        counts = intruder.count(_loras(places), base, threshold=threshold, k=k)
    return Many(places, modules, counts, near)


def _loras(places: Sequence[Path]) -> Iterator[Source]:
    """Those that load; the others get their report later."""
    for path in places:
        try:
            source = open_source(path)
        except LolgenError:
            continue
        if source.lora is not None:
            yield source
