"""Uploads, which are untrusted: what is taken from them, under which limits, and where it goes.

No name that comes from a client is ever a path here: files are read where the server put them, and what is taken
is written under names of our own. Nothing is unpickled, and a zip is read in pieces against a limit, so what its
directory claims does not matter.
"""

from __future__ import annotations

import stat
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from lolgen import io
from lolgen.errors import LolgenError
from lolgen.lora import LoRA

MAX_BYTES = 64 * 2**20
"""Of one upload: a file, all files together, or what a zip unpacks to."""
MAX_HEADER = 8 * 2**20
"""Of a safetensors header: real ones stay below one MiB, and parsed JSON takes many times its length."""
MAX_ENTRIES = 200
MAX_RANK = 1024
MAX_PICTURE_BYTES = 16 * 2**20
MAX_PIXELS = 24_000_000
PICTURE_FORMATS = ("PNG", "JPEG", "WEBP")

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
_WANTED = "wanted one .safetensors file, the files of a PEFT folder, or a zip of one"


def received(root: Path, payload: Any) -> list[Path]:
    """The files that Gradio's upload route stored under `root`, from what a client says they are.

    `payload`: a FileData object or a list of them, as a client sent it. LolgenError for a path that is not a
    plain file inside `root`, whoever made it up.
    """
    rows = payload if isinstance(payload, list) else [payload]
    root = root.resolve()
    found = []
    for row in rows:
        path = row.get("path") if isinstance(row, Mapping) else None
        if not isinstance(path, str) or not path or "\0" in path:
            raise LolgenError("found no uploaded file; choose one")
        place = Path(path)
        # Checked before it is touched: a made-up path must not even tell whether it exists.
        inside = place.is_absolute() and ".." not in place.parts and place.is_relative_to(root)
        if not inside or place.is_symlink() or place.resolve() != place or not place.is_file():
            raise LolgenError("this is not a file that was uploaded here; upload it again")
        found.append(place)
    if not found:
        raise LolgenError("found no uploaded file; choose one")
    return found


def take_adapter(files: Sequence[Path], target: Path) -> tuple[Path, str, LoRA]:
    """Put the adapter of an upload at `target`; (its path there, a name for it, what it holds).

    LolgenError in one line for anything else than exactly one readable adapter; nothing is left then.
    """
    total = sum(f.stat().st_size for f in files)
    if total > MAX_BYTES:
        raise LolgenError(f"found {_mb(total)}, wanted at most {_mb(MAX_BYTES)}; make the rank smaller first")
    if len(files) == 1 and zipfile.is_zipfile(files[0]) and files[0].suffix == ".zip":
        parts, name = _from_zip(files[0]), files[0].stem
    else:
        parts = {f.name: f.read_bytes() for f in files if _useful(f.name)}
        _no_pickle([f.name for f in files], parts)
        name = files[0].stem
    chosen = _choose(parts)
    target.mkdir(parents=True)
    try:
        for file, data in chosen.items():
            _check_header(file, data)
            (target / file).write_bytes(data)
        place = target if CONFIG in chosen else target / next(iter(chosen))
        shown = next((n for n in parts if n.endswith(".safetensors")), name)
        lora = load(place, shown)
    except BaseException:
        for written in target.iterdir():
            written.unlink()
        target.rmdir()
        raise
    name = "uploaded LoRA" if name in ("adapter_model", "pytorch_lora_weights", "adapter") else name
    return place, _plain(name), lora


def load(place: Path, shown: str) -> LoRA:
    """`io.load`, whose errors name the file as the user does, not where the server keeps it."""
    try:
        lora = io.load(place)
    except LolgenError as error:
        folder = place if place.is_dir() else place.parent
        text = str(error)
        for weights in folder.glob("*.safetensors"):
            text = text.replace(str(weights), shown)
        raise LolgenError(text.replace(f"{folder}/", "").replace(str(folder), shown)) from None
    most = max((f.rank for f in lora.factors.values()), default=0)
    if most > MAX_RANK:
        raise LolgenError(f"{shown}: found rank {most}, wanted at most {MAX_RANK} in this app")
    return lora


def take_picture(file: Path) -> Any:
    """The middle square of an uploaded picture, RGB, at most 256 pixels a side. LolgenError for anything else."""
    from PIL import Image, ImageOps

    if file.stat().st_size > MAX_PICTURE_BYTES:
        raise LolgenError(
            f"found a picture of {_mb(file.stat().st_size)}, wanted at most {_mb(MAX_PICTURE_BYTES)}"
        )
    try:
        with Image.open(file, formats=PICTURE_FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                found = f"{picture.width} x {picture.height} pixels"
                raise LolgenError(
                    f"found {found}, wanted at most {MAX_PIXELS // 10**6} million; make it smaller"
                )
            square = ImageOps.exif_transpose(picture).convert("RGBA")
            square = Image.alpha_composite(Image.new("RGBA", square.size, "white"), square).convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        raise LolgenError("this is not a picture that can be read; wanted a PNG, JPEG or WebP file") from None
    return ImageOps.fit(square, (min(256, *square.size),) * 2, Image.Resampling.LANCZOS)


def _from_zip(file: Path) -> dict[str, bytes]:
    """{name without folders: bytes} of what a PEFT folder is made of; one folder's only."""
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if len(entries) > MAX_ENTRIES:
                raise LolgenError(f"found a zip of {len(entries)} files, wanted one adapter")
            for entry in entries:
                _check_entry(entry)
            names = [e.filename for e in entries if not e.is_dir() and not e.filename.startswith("__MACOSX/")]
            useful = [n for n in names if _useful(n)]
            _no_pickle(names, useful)
            if len({n.rpartition("/")[0] for n in useful}) > 1:
                raise LolgenError(
                    "found several folders in the zip, wanted one adapter; zip one of them alone"
                )
            left, parts = MAX_BYTES, {}
            for name in useful:
                with archive.open(name) as stream:
                    parts[name.rpartition("/")[2]] = data = _read(stream, left)
                left -= len(data)
            return parts
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:100]
        raise LolgenError(
            f"the zip cannot be read ({reason}); zip the folder again, without a password"
        ) from None
    except Exception as error:
        # zlib.error, lzma.LZMAError: they share no base but Exception.
        if isinstance(error, LolgenError):
            raise
        raise LolgenError("the zip is damaged; zip the folder again") from None


def _check_entry(entry: zipfile.ZipInfo) -> None:
    name = entry.filename
    parts = name.replace("\\", "/").split("/")
    if name.startswith(("/", "\\")) or ".." in parts or ":" in parts[0] or "\\" in name:
        raise LolgenError("the zip has a path that leads out of it, so it was refused; zip the folder itself")
    if stat.S_ISLNK(entry.external_attr >> 16):
        raise LolgenError("the zip has a link in it, so it was refused; zip the files themselves")


def _read(stream: IO[bytes], most: int) -> bytes:
    data = stream.read(most + 1)
    if len(data) > most:
        raise LolgenError(f"the zip unpacks to more than {_mb(MAX_BYTES)}, so it was refused")
    return data


def _useful(name: str) -> bool:
    return name.endswith(".safetensors") or name.rpartition("/")[2] == CONFIG


def _no_pickle(names: Sequence[str], useful: Mapping[str, bytes] | Sequence[str]) -> None:
    pickles = [n for n in names if n.lower().endswith(_PICKLES)]
    if pickles and not any(n.endswith(".safetensors") for n in useful):
        shown = _plain(pickles[0].rpartition("/")[2])
        raise LolgenError(
            f"{shown}: found a pickle, which can run any code when it is opened, so it was not; {_WANTED}"
        )


def _choose(parts: Mapping[str, bytes]) -> dict[str, bytes]:
    """The files of exactly one adapter, under the names that readers look for."""
    weights = [n for n in parts if n.endswith(".safetensors")]
    if CONFIG in parts and WEIGHTS in parts:
        return {CONFIG: parts[CONFIG], WEIGHTS: parts[WEIGHTS]}
    if len(weights) != 1:
        found = f"{len(weights)} .safetensors files" if weights else "no .safetensors file"
        raise LolgenError(f"found {found}; {_WANTED}")
    if CONFIG in parts:
        return {CONFIG: parts[CONFIG], WEIGHTS: parts[weights[0]]}
    if b"base_model.model." in parts[weights[0]][:4096]:
        raise LolgenError(
            f"found PEFT weights alone; {CONFIG} tells their scale: upload both together, or as a zip"
        )
    return {"adapter.safetensors": parts[weights[0]]}


def _check_header(name: str, data: bytes) -> None:
    if name.endswith(".safetensors") and MAX_HEADER < int.from_bytes(data[:8], "little") <= len(data):
        raise LolgenError(f"found a safetensors header of more than {_mb(MAX_HEADER)}; this is no adapter")


def _plain(name: str) -> str:
    """A client's name, cut and without what a page or a terminal would take for more than text."""
    return "".join(c if c.isalnum() or c in " ._-" else " " for c in name).strip()[:40] or "upload"


def _mb(n: int) -> str:
    return f"{n / 2**20:.0f} MB"
