"""The container: literal bytes, the library's own layout, hashes."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import safetensors.torch
import torch

from lolgen.errors import FormatError
from lolgen.io import safetensors_file as stf

TENSORS = {
    "b": torch.tensor([1, -1], dtype=torch.int8),
    "z": torch.tensor([[1.0, 2.0]]),
    "a": torch.tensor(0.5, dtype=torch.float16),
}
HEADER = (
    b'{"__metadata__":{"k":"v","n":"\xc3\xa9"},"z":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]},'
    b'"a":{"dtype":"F16","shape":[],"data_offsets":[8,10]},"b":{"dtype":"I8","shape":[2],"data_offsets":[10,12]}}'
)
BODY = b"\x00\x00\x80?\x00\x00\x00@" + b"\x008" + b"\x01\xff"


def test_the_bytes_of_a_file() -> None:
    padding = -len(HEADER) % 8
    wanted = (len(HEADER) + padding).to_bytes(8, "little") + HEADER + b" " * padding + BODY
    assert stf.serialize(TENSORS, {"n": "é", "k": "v"}) == wanted


def test_the_layout_is_that_of_the_library() -> None:
    g = torch.Generator().manual_seed(0)
    tensors = {
        f"{i}.{name}": torch.randint(0, 2, (3, i), generator=g).to(dtype)
        for i in range(3)
        for name, dtype in stf.DTYPES.items()
    }
    tensors["view"] = torch.arange(12.0).reshape(3, 4).T
    whole = {k: v.contiguous() for k, v in tensors.items()}
    assert stf.serialize(tensors, {}) == safetensors.torch.save(whole)
    assert stf.serialize(tensors, {"format": "pt"}) == safetensors.torch.save(whole, {"format": "pt"})


def test_written_and_read_back(tmp_path: Path) -> None:
    file = tmp_path / "new" / "x.safetensors"
    stf.write(file, TENSORS, {"k": "v", "format": "pt"})
    tensors, metadata = stf.read(file)
    assert metadata == {"k": "v"}
    assert set(stf.read_keys(file)) == set(tensors) == set(TENSORS)
    for key, tensor in TENSORS.items():
        assert tensors[key].dtype == tensor.dtype
        assert torch.equal(tensors[key], tensor)
    assert [p.name for p in file.parent.iterdir()] == ["x.safetensors"]


@pytest.mark.parametrize("length", [0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_length_that_looks_like_a_pickle(length: int, tmp_path: Path) -> None:
    text = b'{"__metadata__":{"k":"' + b"v" * (length - 25) + b'"}}'
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    assert file.read_bytes()[:2] == bytes([0x80, length >> 8])
    assert stf.read(file) == ({}, {"k": "v" * (length - 25)})


def test_hashes_follow_the_tensors() -> None:
    big = {"x": torch.arange(400_000, dtype=torch.float32)}
    metadata = {
        "sshs_model_hash": "old",
        "sshs_legacy_hash": "old",
        "modelspec.hash_sha256": "old",
        "ss_seed": "1",
    }
    stf.refresh_hashes(big, metadata)
    body = big["x"].numpy().tobytes()
    bare = safetensors.torch.save(big, {"ss_seed": "1"})
    assert metadata == {
        "sshs_model_hash": hashlib.sha256(body).hexdigest(),
        "sshs_legacy_hash": hashlib.sha256(bare[0x100000:0x110000]).hexdigest()[:8],
        "modelspec.hash_sha256": "0x" + hashlib.sha256(body).hexdigest(),
        "ss_seed": "1",
    }
    silent = {"ss_seed": "1"}
    stf.refresh_hashes(big, silent)
    assert silent == {"ss_seed": "1"}


def test_a_header_holds_strings() -> None:
    with pytest.raises(TypeError, match="metadata 'k' is a int"):
        stf.serialize({}, {"k": 1})  # type: ignore[dict-item]


def test_nowhere_to_write(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(FormatError, match="nothing was written"):
        stf.write(tmp_path / "file" / "x.safetensors", TENSORS, {})


@pytest.mark.parametrize("name", ["F64", "F32", "BF16", "F16", "F8_E5M2"])
def test_one_bad_number_anywhere_is_found(name: str) -> None:
    """Every place and every length, vectorised or not: the reduction must let no NaN through."""
    for n in (1, 7, 8, 33, 130):
        clean = torch.linspace(-1, 1, n).to(stf.DTYPES[name])
        assert stf.finite(clean)
        for place in range(n):
            for bad in (float("nan"), float("inf"), -float("inf")):
                tensor = clean.float()
                tensor[place] = bad
                assert not stf.finite(tensor.to(clean.dtype)), (n, place, bad)
    assert stf.finite(torch.zeros(0, 3, dtype=stf.DTYPES[name]))


def test_what_is_read_outlives_the_file(tmp_path: Path) -> None:
    """Views of a mapped file: another file put in its place, or none, changes nothing; nor do writes reach it."""
    file = tmp_path / "x.safetensors"
    stf.write(file, {"a": torch.arange(6.0)}, {})
    before = file.read_bytes()
    tensors, _ = stf.read(file)
    tensors["a"][0] = 7
    assert file.read_bytes() == before
    stf.write(file, {"a": torch.zeros(6)}, {})
    file.unlink()
    assert tensors["a"].tolist() == [7, 1, 2, 3, 4, 5]


def test_the_header_alone(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    stf.write(file, {"a": torch.zeros(2, 3), "b": torch.zeros((), dtype=torch.int64)}, {"k": "v"})
    rows, metadata = stf.read_header(file)
    assert {k: (r["dtype"], r["shape"]) for k, r in rows.items()} == {"b": ("I64", []), "a": ("F32", [2, 3])}
    assert metadata == {"k": "v"}
