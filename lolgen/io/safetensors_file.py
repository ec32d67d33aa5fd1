"""safetensors files, read with suspicion and written the same byte for byte every time.

The format: 8 bytes, the header's length as a little-endian integer; the header, a JSON object of
`name: {"dtype", "shape", "data_offsets"}` and `"__metadata__": {str: str}`; the tensors' bytes, without gaps.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from math import prod
from pathlib import Path
from typing import Any, TypeGuard

import safetensors
import torch
from torch import Tensor

from lolgen.errors import FormatError

Path_ = str | os.PathLike[str]

DTYPES: dict[str, torch.dtype] = {
    "I64": torch.int64, "F64": torch.float64, "F32": torch.float32, "I32": torch.int32,
    "BF16": torch.bfloat16, "F16": torch.float16, "I16": torch.int16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
"""The dtypes, in the order in which the library lays tensors out: widest first, so all are aligned."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_PLACE = {dtype: i for i, dtype in enumerate(DTYPES.values())}
_MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_OBJECT = 250  # bytes that a list or an object of a header takes when parsed, its entries included
_ROOM = 1 << 24  # bytes of parsed header that no file need account for: 20,000 tensors

AGAIN = "the file is damaged or incomplete: download or save it again"
NO_PICKLE = (
    "a pickle can run any code when it is opened, so it is never opened here: ask for a .safetensors file, "
    "or convert it where that does no harm: torch.load(..., weights_only=True), safetensors.torch.save_file"
)


def read(path: Path_) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata) of a safetensors file, on the CPU; the library's own `format` entry is left out.

    Every claim of the header is checked before any of it is used, and no floating tensor holds NaN or Inf.
    The tensors are views of the mapped file until they are written to: a file of gigabytes costs its pages,
    not a copy. Raises FormatError.
    """
    rows, metadata = read_header(path)
    tensors = read_raw(path, rows)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not finite(tensor):
            raise not_finite(path, key, tensor)
    metadata.pop("format", None)
    return tensors, metadata


def read_raw(path: Path_, keys: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of these keys, views of the mapped file, whatever numbers they hold. Check the header first
    (`read_header`). Raises FormatError."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in keys}
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, KeyError) as error:
        raise FormatError(path, found=str(error), wanted="a safetensors file", remedy=AGAIN) from None


def read_header(path: Path_) -> tuple[dict[str, Any], dict[str, str]]:
    """(rows, metadata) of a safetensors file, every claim checked; `rows[key]` has `dtype` and `shape`.
    No tensor is read. Raises FormatError."""
    size = Path(path).stat().st_size if Path(path).exists() else 0
    length = _length(path, _bytes(path, most=32), size)
    text = _bytes(path, most=8 + length)[8:]
    # As Python's objects a header of many empty lists is thirty times its text; real ones have their tensors.
    objects = text.count(b"[") + text.count(b"{")
    if _OBJECT * objects > 2 * size + _ROOM:
        raise FormatError(
            path,
            found=f"a header of {objects} objects in a file of {size} bytes",
            wanted="a header that is small beside its tensors",
            remedy=AGAIN,
        )
    rows, metadata = _header(path, text)
    _check_tensors(path, rows, size - 8 - length)
    return rows, metadata


def read_keys(path: Path_) -> list[str]:
    """The names of a safetensors file's tensors, from its header, checked as in `read`. FormatError."""
    return list(read_header(path)[0])


def write(path: Path_, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """`serialize` to `path`, atomically. FormatError when it cannot be written; nothing is left then."""
    from lolgen.io import atomic

    data = serialize(tensors, metadata)
    try:
        atomic.write_file(path, data)
    except OSError as error:
        raise cannot_write(path, error) from error


def serialize(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """The bytes of a safetensors file: the same tensors and metadata always give the same bytes.

    The library writes its metadata in random order, so equal zoos would not be equal files. Tensors lie in
    the library's order: by dtype, then by name. TypeError for metadata that is no string.
    """
    for key, value in metadata.items():
        if not isinstance(value, str):
            raise TypeError(f"metadata {key!r} is a {type(value).__name__}; a header holds strings only")
    order = sorted(tensors, key=lambda k: (_PLACE[tensors[k].dtype], k))
    header: dict[str, Any] = {}
    if metadata:
        header["__metadata__"] = {k: metadata[k] for k in sorted(metadata)}
    chunks, end = [], 0
    for key in order:
        tensor = tensors[key].detach().cpu().contiguous()
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        header[key] = {
            "dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + len(raw)],
        }  # fmt: skip
        chunks.append(raw)
        end += len(raw)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + b"".join(chunks)


def refresh_hashes(tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Recompute in place what `metadata` says of the tensors' bytes, where it says anything.

    `sshs_model_hash`: sha256 of all bytes behind the header. `sshs_legacy_hash`: the first 8 digits of the
    sha256 of the 64 KiB at offset 1 MiB of the file with `ss_*` metadata alone (sd-scripts).
    `modelspec.hash_sha256`: sha256 of all bytes behind the header, with 0x (Stability AI ModelSpec 1.0).
    """
    if not {"sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"} & metadata.keys():
        return
    file = serialize(tensors, {k: v for k, v in metadata.items() if k.startswith("ss_")})
    body = hashlib.sha256(memoryview(file)[8 + int.from_bytes(file[:8], "little") :]).hexdigest()
    fresh = {
        "sshs_model_hash": body,
        "sshs_legacy_hash": hashlib.sha256(file[0x100000:0x110000]).hexdigest()[:8],
        "modelspec.hash_sha256": f"0x{body}",
    }
    metadata.update({k: v for k, v in fresh.items() if k in metadata})


def finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or Inf; also for the 8-bit floats, which torch does not compare."""
    if not tensor.numel():
        return True
    # A NaN is smallest and largest at once. One pass without a mask: 30 times as fast as `isfinite(...).all()`.
    ends = torch.aminmax(tensor.to(torch.float16) if tensor.element_size() == 1 else tensor)
    return bool(torch.isfinite(ends.min) and torch.isfinite(ends.max))


def not_finite(path: Path_, key: str, tensor: Tensor) -> FormatError:
    wide = tensor.float()
    found = f"{int(wide.isnan().sum())} NaN and {int(wide.isinf().sum())} Inf in {wide.numel()} numbers"
    return FormatError(
        path,
        key=key,
        found=found,
        wanted="finite numbers",
        remedy="the training behind it diverged: use an earlier checkpoint",
    )


def brief(value: object, most: int = 80) -> str:
    """`repr`, cut short: what stands in a stranger's file may be long, or meant for a terminal."""
    text = repr(value)
    return text if len(text) <= most else f"{text[:most]}..."


def cannot_write(path: Path_, error: OSError) -> FormatError:
    return FormatError(
        path,
        found=error.strerror or str(error),
        wanted="a place that can be written to",
        remedy="nothing was written: choose another path or make room",
    )


def _bytes(path: Path_, most: int = -1) -> bytes:
    file = Path(path)
    if not file.exists():
        raise FormatError(
            path,
            found="no such file or folder",
            wanted="an adapter on this disk",
            remedy="check the path; download what lies on a hub first",
        )
    try:
        with file.open("rb") as f:
            return f.read(most)
    except OSError as error:
        raise FormatError(
            path,
            found=error.strerror or str(error),
            wanted="a file that can be read",
            remedy="check its permissions",
        ) from error


def _length(path: Path_, data: bytes, size: int) -> int:
    """The header's length, once the first bytes are known not to be something else."""
    if not size:
        raise FormatError(path, found="an empty file", wanted="a safetensors file", remedy=AGAIN)
    for magic, what, remedy in _OTHERS:
        # A header's length may look like another format's first bytes (1408 is 0x80 0x05, a pickle's);
        # behind it a safetensors file has its brace.
        if data.startswith(magic) and data[8:9] != b"{":
            raise FormatError(path, found=what, wanted="a safetensors file", remedy=remedy)
    if size < 8:
        raise FormatError(
            path, found=f"{size} bytes", wanted="a safetensors file, at least 8 bytes", remedy=AGAIN
        )
    length = int.from_bytes(data[:8], "little")
    if length > min(_MAX_HEADER, size - 8):
        raise FormatError(
            path,
            found=f"a header length of {length} in a file of {size} bytes",
            wanted=f"at most {min(_MAX_HEADER, size - 8)}",
            remedy=f"not a safetensors file, or {AGAIN}",
        )
    return length


_OTHERS: tuple[tuple[bytes, str, str], ...] = (
    (b"PK\x03\x04", "a zip archive, as torch.save writes (a pickle)", NO_PICKLE),
    *((b"\x80" + bytes([v]), f"a pickle (protocol {v})", NO_PICKLE) for v in range(2, 6)),
    (b"GGUF", "a GGUF file", "convert it to safetensors, or get the adapter's original file"),
    (b"version https://git-lfs", "a git-lfs pointer", "fetch the file itself: git lfs pull"),
    (b"<!DOCTYPE", "a web page", "the download went wrong: get the file itself, not its page"),
    (b"<html", "a web page", "the download went wrong: get the file itself, not its page"),
)


def _header(path: Path_, text: bytes) -> tuple[dict[str, Any], dict[str, str]]:
    """(rows of the tensors, metadata)."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [k for k, _ in pairs]
            twice = next(k for k in names if names.count(k) > 1)
            raise FormatError(
                path, key=twice[:50], found="the key twice", wanted="every key once", remedy=AGAIN
            )
        return found

    try:
        header = json.loads(text.decode(), object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise FormatError(
            path,
            found=f"a header that is not JSON ({error})",
            wanted="a safetensors file",
            remedy=f"not a safetensors file, or {AGAIN}",
        ) from None
    if not isinstance(header, dict):
        raise FormatError(path, found="a header that is no JSON object", wanted="a JSON object", remedy=AGAIN)
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise FormatError(
            path, key="__metadata__", found="something else", wanted="an object of strings", remedy=AGAIN
        )
    return header, metadata


def _check_tensors(path: Path_, rows: Mapping[str, Any], size: int) -> None:
    """Every tensor's dtype, shape and offsets; together they fill the `size` bytes without gap or overlap."""
    places = []
    for key, row in rows.items():
        if len(key) > 1000:
            raise FormatError(
                path,
                key=key[:50],
                found=f"a key of {len(key)} characters",
                wanted="at most 1000",
                remedy=AGAIN,
            )
        fields: dict[str, Any] = row if isinstance(row, dict) else {}
        dtype, shape, offsets = fields.get("dtype"), fields.get("shape"), fields.get("data_offsets")
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise FormatError(
                path,
                key=key,
                found=f"dtype {brief(dtype)}",
                wanted=f"one of {', '.join(DTYPES)}",
                remedy="save it in float32, float16 or bfloat16",
            )
        if not (_naturals(shape) and _naturals(offsets) and len(offsets) == 2):
            raise FormatError(
                path,
                key=key,
                found=f"shape {brief(shape)}, offsets {brief(offsets)}",
                wanted="lists of whole numbers",
                remedy=AGAIN,
            )
        need = prod(shape) * DTYPES[dtype].itemsize
        if offsets[1] - offsets[0] != need:
            raise FormatError(
                path,
                key=key,
                found=f"{offsets[1] - offsets[0]} bytes for {dtype} {tuple(shape)}",
                wanted=f"{need} bytes",
                remedy=AGAIN,
            )
        places.append((offsets[0], offsets[1], key))
    end = 0
    for begin, stop, key in sorted(places):
        if begin != end:
            what = "overlaps the tensor before it" if begin < end else "leaves a gap before it"
            raise FormatError(
                path, key=key, found=f"offset {begin}, which {what}", wanted=f"offset {end}", remedy=AGAIN
            )
        end = stop
    if size != end:
        raise FormatError(
            path, found=f"{size} bytes of tensors", wanted=f"{end} bytes, as the header says", remedy=AGAIN
        )


def _naturals(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)
