"""What lies at a path: the file, its header, its config, and the LoRA if it loads as one."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from lolgen import io
from lolgen.errors import FormatError, LolgenError
from lolgen.io import family, peft, raw
from lolgen.io import safetensors_file as stf
from lolgen.lora import LoRA

GROWTH = 8
"""How many times a LoHa or LoKr file may grow when it is looked at as a LoRA."""
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
_MODEL = ("model_index.json", "config.json")
_NOT_ADAPTERS = ("optimizer", "scheduler", "training_args", "rng_state", "scaler")
_MODEL_PARTS = ("unet", "transformer", "vae", "text_encoder")


@dataclass
class Source:
    """A file that was opened. `rows`: dtype and shape by key; `config`: `adapter_config.json` beside it.

    `lora`: what `lolgen.io.load` made of it, None with the `reason` where it refused.
    """

    path: Path
    file: Path
    rows: Mapping[str, Any]
    metadata: dict[str, str]
    config: dict[str, Any] = field(default_factory=dict)
    format: str | None = None
    lora: LoRA | None = None
    reason: str | None = None

    @cached_property
    def shapes(self) -> dict[str, raw.Shape]:
        return {k: tuple(r["shape"]) for k, r in self.rows.items()}

    @cached_property
    def modules(self) -> dict[str, raw.RawModule]:
        """The modules by the keys alone; see `lolgen.io.raw`."""
        return raw.modules_of(self.shapes)

    @cached_property
    def method(self) -> str:
        """The method most modules are of, those of full weights counted last; a key of `raw.METHODS`."""
        count = Counter(m.method for m in self.modules.values())
        plain = ("full", "norm", "unknown")
        order = sorted(count, key=lambda m: (m in plain, m == "unknown", -count[m]))
        return order[0] if order else "unknown"

    @property
    def is_model(self) -> bool:
        """Whether it holds a model's own weights, or some of them, and no adapter."""
        return self.method == "full" and any(len(s) > 1 for s in self.shapes.values())

    @cached_property
    def claims(self) -> dict[str, str]:
        """The header, and what of the config speaks of the base."""
        return {**self.metadata, **({"adapter_config": json.dumps(self.config)} if self.config else {})}

    @cached_property
    def family(self) -> family.Family:
        return family.of_modules(self.modules, self.claims)


def open_source(path: str | Path, *, load: bool = True) -> Source:
    """Open a file or an adapter's folder. FormatError when it is no safetensors file at all (a pickle is never
    opened); a file that is one but does not load as a LoRA has its `reason`. `load=False`: the header only."""
    place = Path(path)
    file = _model_file(place) or peft.weights_file(place)
    rows, metadata = stf.read_header(file)
    metadata.pop("format", None)
    source = Source(place, file, rows, metadata, _config(file.parent / peft.CONFIG))
    try:
        source.format = io.detect(place if place.is_file() or not _model_file(place) else file)
        if load:
            _check_growth(source)
            source.lora = io.load(place)
    except LolgenError as error:
        text = str(error)
        source.reason = text.removeprefix(f"{getattr(error, 'file', '')}: ")  # the report has the path
    return source


def _check_growth(source: Source) -> None:
    """FormatError for LoHa and LoKr that as LoRAs, which `io.load` makes of them, would be many times the file."""
    found = sum(m.numbers_as_lora or 0 for m in source.modules.values())
    if found > GROWTH * sum(m.numbers for m in source.modules.values()) + (1 << 22):
        raise FormatError(
            source.file, found=f"{raw.METHODS[source.method]} that as a LoRA would be {found} numbers",
            wanted=f"at most {GROWTH} times the file's own, to look at it as a LoRA",
            remedy="make a smaller one: lolgen convert --rank",
        )  # fmt: skip


def _config(file: Path) -> dict[str, Any]:
    """The adapter's config; {} where there is none to read, which `io.load` reports where it matters."""
    try:
        found = json.loads(file.read_bytes()) if file.is_file() else {}
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _model_file(place: Path) -> Path | None:
    """The biggest weights file of a model's folder: a pipeline, or a transformers model."""
    if not place.is_dir() or (place / peft.CONFIG).exists() or not any((place / f).exists() for f in _MODEL):
        return None
    found = [f for part in (".", *_MODEL_PARTS) for f in (place / part).glob("*.safetensors")]
    return max(found, key=lambda f: f.stat().st_size, default=None)


def find(paths: Iterable[str | Path]) -> list[Path]:
    """Every adapter under `paths`, in order: files as they are; a folder that is an adapter or a model is one;
    of any other folder, what is found below it (pickles too, so that they are named and refused).

    A path that does not exist is given back, for `open_source` to say so; an empty folder gives nothing.
    """
    found: dict[Path, None] = {}
    for path in paths:
        place = Path(path)
        for one in _below(place) if place.is_dir() else (place,):
            found[one] = None
    return list(found)


def _below(folder: Path) -> Iterator[Path]:
    if (folder / peft.CONFIG).exists() or _model_file(folder) is not None:
        yield folder
        return
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise FormatError(
            folder, found=error.strerror or str(error), wanted="a folder that can be read",
            remedy="check its permissions",
        ) from error  # fmt: skip
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from () if entry.is_symlink() else _below(entry)  # a link may lead back up
        elif entry.suffix == ".safetensors" or (
            entry.suffix in PICKLES and not any(word in entry.name for word in _NOT_ADAPTERS)
        ):
            yield entry
