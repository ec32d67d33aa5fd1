"""Uploads are untrusted: nothing outside them is read, nothing in them is run, nothing is left of a refused one."""

from __future__ import annotations

import json
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch
from PIL import Image

from demos import uploads
from lolgen import io
from lolgen.errors import LolgenError
from lolgen.lora import ModuleSpec, Spec
from lolgen.testing import random_lora

SPEC = Spec((ModuleSpec("unet.mid_block.attn.to_q", 8, 6), ModuleSpec("unet.mid_block.attn.to_v", 8, 6)))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return io.save(random_lora(SPEC, 2), tmp_path / "mine", "peft")


def stored(root: Path, name: str, data: bytes) -> Path:
    """A file as Gradio stores an upload."""
    place = root / f"{abs(hash((name, data))):064x}" / name
    place.parent.mkdir(parents=True)
    place.write_bytes(data)
    return place


def zipped(root: Path, entries: dict[str, bytes], name: str = "a.zip") -> Path:
    place = stored(root, name, b"")
    with zipfile.ZipFile(place, "w", zipfile.ZIP_DEFLATED) as z:
        for entry, data in entries.items():
            z.writestr(entry, data)
    return place


def refused(files: list[Path], tmp_path: Path, *words: str) -> None:
    target = tmp_path / "target"
    with pytest.raises(LolgenError) as found:
        uploads.take_adapter(files, target)
    text = str(found.value)
    assert "\n" not in text and str(tmp_path) not in text, text
    assert all(w in text for w in words), text
    assert not target.exists()


# -- which files are read at all


def test_an_uploaded_file_is_received(root):
    file = stored(root, "a.safetensors", b"x")
    assert uploads.received(root, {"path": str(file), "meta": {"_type": "gradio.FileData"}}) == [file]
    assert uploads.received(root, [{"path": str(file)}]) == [file]


@pytest.mark.parametrize(
    "path",
    [
        "/etc/passwd",
        __file__,
        "relative.safetensors",
        "{root}/../secret",
        "{root}/inner/../../secret",
        "{root}",
        "{root}/link",
        "{root}/linked/secret",
        "{root}/missing",
        "{root}-beside/secret",
        "http://127.0.0.1/a.safetensors",
        "file:///etc/passwd",
        "a\0b",
        "",
        None,
        7,
        ["/etc/passwd"],
    ],
)
def test_a_path_that_a_client_made_up_is_refused(root, tmp_path, path):
    (tmp_path / "secret").write_bytes(b"s")
    beside = tmp_path / "cache-beside"
    beside.mkdir()
    (beside / "secret").write_bytes(b"s")
    (root / "link").symlink_to(tmp_path / "secret")
    (root / "linked").symlink_to(tmp_path)
    if isinstance(path, str):
        path = path.replace("{root}", str(root))
    with pytest.raises(LolgenError) as found:
        uploads.received(root, [{"path": path, "url": "http://127.0.0.1/", "orig_name": "/etc/passwd"}])
    assert "secret" not in str(found.value) and "passwd" not in str(found.value)


@pytest.mark.parametrize("payload", [None, [], "x", {}, [None], {"path": {}}])
def test_no_file_at_all(root, payload):
    with pytest.raises(LolgenError, match="choose one"):
        uploads.received(root, payload)


# -- what is taken


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_one_file(root, tmp_path, format):
    lora = random_lora(SPEC, 2)
    file = io.save(lora, root / "h" / "my lora.safetensors", format)
    place, name, read = uploads.take_adapter([file], tmp_path / "t")
    assert name == "my lora" and len(read.spec) == 2
    assert place == tmp_path / "t" / "adapter.safetensors" and place.read_bytes() == file.read_bytes()


@pytest.mark.parametrize("inside", ["", "folder/", "a/b/"])
def test_a_zip_of_a_peft_folder(root, tmp_path, folder, inside):
    entries = {f"{inside}{f.name}": f.read_bytes() for f in folder.iterdir()}
    entries |= {f"{inside}README.md": b"hello", "__MACOSX/._x.safetensors": b"junk"}
    place, name, read = uploads.take_adapter([zipped(root, entries, "anna.zip")], tmp_path / "t")
    assert name == "anna" and {f.name for f in place.iterdir()} == {
        "adapter_model.safetensors",
        "adapter_config.json",
    }
    assert torch.equal(read.factors[SPEC.names[0]].B, io.load(folder).factors[SPEC.names[0]].B)


def test_the_files_of_a_peft_folder(root, tmp_path, folder):
    files = [
        stored(root, n, (folder / n).read_bytes())
        for n in ("adapter_config.json", "adapter_model.safetensors")
    ]
    place, _, read = uploads.take_adapter(files, tmp_path / "t")
    assert place.is_dir() and read.names == SPEC.names


def test_names_are_our_own(root, tmp_path):
    file = io.save(random_lora(SPEC, 2), root / "h" / "x.safetensors", "diffusers")
    odd = file.rename(file.with_name('<img src=x onerror="alert(1)">.safetensors'))
    place, name, _ = uploads.take_adapter([odd], tmp_path / "t")
    assert place.name == "adapter.safetensors" and not set(name) & set("<>\"'&/\\=")


# -- what is refused


class Bomb:
    def __reduce__(self):
        return (Path.touch, (Path("pwned"),))


@pytest.mark.parametrize("name", ["adapter_model.bin", "model.pt", "x.ckpt", "x.pkl", "x.safetensors"])
@pytest.mark.parametrize("as_zip", [False, True])
def test_a_pickle_is_refused_unopened(root, tmp_path, monkeypatch, name, as_zip):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps(Bomb())
    file = zipped(root, {name: data}) if as_zip else stored(root, name, data)
    refused([file], tmp_path, "pickle")
    assert not (tmp_path / "pwned").exists()


def test_a_torch_zip_called_safetensors_is_refused(root, tmp_path):
    torch.save({"a": torch.zeros(1)}, root / "x.safetensors")
    refused([root / "x.safetensors"], tmp_path, "x.safetensors", "pickle")


@pytest.mark.parametrize(
    "entry",
    ["../adapter.safetensors", "/etc/adapter.safetensors", "a/../../adapter.safetensors", "C:/a.safetensors",
     "..\\a.safetensors", "\\\\host\\a.safetensors"],
)  # fmt: skip
def test_a_zip_that_leads_out_is_refused(root, tmp_path, entry):
    file = io.save(random_lora(SPEC, 2), tmp_path / "x.safetensors", "diffusers")
    refused([zipped(root, {entry: file.read_bytes()})], tmp_path, "leads out")
    assert not (tmp_path / "adapter.safetensors").exists() and not (root / "adapter.safetensors").exists()


def test_a_link_in_a_zip_is_refused(root, tmp_path):
    place = stored(root, "l.zip", b"")
    with zipfile.ZipFile(place, "w") as z:
        link = zipfile.ZipInfo("adapter.safetensors")
        link.external_attr = 0o120777 << 16
        z.writestr(link, "/etc/passwd")
    refused([place], tmp_path, "link")


def test_a_bomb_is_refused_whatever_its_directory_claims(root, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_BYTES", 2**20)
    place = zipped(root, {"a.safetensors": bytes(2**22)})
    assert place.stat().st_size < 2**14
    refused([place], tmp_path, "unpacks to more than")
    # The same with a directory that claims 10 bytes: the size is in it and in the entry's own header.
    data = place.read_bytes().replace(struct.pack("<I", 2**22), struct.pack("<I", 10))
    lying = stored(root, "lying.zip", data)
    refused([lying], tmp_path, "zip")


def test_many_small_parts_add_up(root, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_BYTES", 2**20)
    refused(
        [zipped(root, {f"{i}.safetensors": bytes(2**18) for i in range(8)})], tmp_path, "unpacks to more than"
    )
    refused([zipped(root, {f"{i}.txt": b"" for i in range(300)}, "b.zip")], tmp_path, "300 files")


def test_a_file_over_the_limit_is_refused(root, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_BYTES", 2**20)
    refused([stored(root, "a.safetensors", bytes(2**20 + 1))], tmp_path, "at most 1 MB")


@pytest.mark.parametrize("cut", [10, 100, -30])
def test_a_damaged_zip(root, tmp_path, folder, cut):
    whole = zipped(root, {f.name: f.read_bytes() for f in folder.iterdir()}).read_bytes()
    damaged = whole[:cut] if cut > 0 else whole[:60] + bytes(20) + whole[80:]
    refused([stored(root, "damaged.zip", damaged)], tmp_path)


def test_an_encrypted_zip(root, tmp_path):
    data = bytearray(zipped(root, {"a.safetensors": b"secret"}).read_bytes())
    at = data.index(b"PK\x01\x02")
    data[6] |= 1  # the flag of the entry, then of the directory
    data[at + 8] |= 1
    refused([stored(root, "locked.zip", bytes(data))], tmp_path, "password")


def test_several_adapters_or_none(root, tmp_path, folder):
    weights = (folder / "adapter_model.safetensors").read_bytes()
    refused(
        [zipped(root, {"a/x.safetensors": weights, "b/y.safetensors": weights})], tmp_path, "several folders"
    )
    refused(
        [zipped(root, {"x.safetensors": weights, "y.safetensors": weights}, "b.zip")],
        tmp_path,
        "2 .safetensors",
    )
    refused([zipped(root, {"readme.txt": b""}, "c.zip")], tmp_path, "no .safetensors")
    refused([stored(root, "adapter_config.json", b"{}")], tmp_path, "no .safetensors")


def test_peft_weights_without_their_config(root, tmp_path, folder):
    weights = (folder / "adapter_model.safetensors").read_bytes()
    refused([stored(root, "adapter_model.safetensors", weights)], tmp_path, "adapter_config.json", "together")


def test_a_header_that_eats_memory(root, tmp_path, monkeypatch):
    monkeypatch.setattr(uploads, "MAX_HEADER", 1000)
    header = json.dumps({f"k{i}": {} for i in range(1000)}).encode()
    data = len(header).to_bytes(8, "little") + header
    refused([stored(root, "a.safetensors", data)], tmp_path, "header")


@pytest.mark.parametrize("rank", [uploads.MAX_RANK, uploads.MAX_RANK + 1])
def test_a_rank_that_eats_memory(root, tmp_path, rank):
    file = io.save(random_lora(SPEC, rank), root / "h" / "wide.safetensors", "diffusers")
    if rank <= uploads.MAX_RANK:
        uploads.take_adapter([file], tmp_path / "t")
    else:
        refused([file], tmp_path, "rank 1025")


@pytest.mark.parametrize("data", [b"", b"x", b"hello, this is text", b"\xff" * 100, b"GIF89a", b"{}" * 50])
def test_noise(root, tmp_path, data):
    refused([stored(root, "noise.safetensors", data)], tmp_path, "noise.safetensors")


# -- pictures


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "P", "1", "CMYK", "I;16"])
def test_a_picture_becomes_its_middle_square(tmp_path, mode):
    suffix = "jpg" if mode == "CMYK" else "png"
    Image.new(mode, (300, 200)).save(tmp_path / f"p.{suffix}")
    square = uploads.take_picture(tmp_path / f"p.{suffix}")
    assert square.mode == "RGB" and square.size == (200, 200)


def test_a_picture_that_cannot_be_read(tmp_path, monkeypatch):
    for name, data in {
        "a.png": b"",
        "b.png": b"text",
        "c.svg": b"<svg/>",
        "d.png": b"\x89PNG\r\n\x1a\n" + bytes(50),
    }.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(LolgenError, match="PNG, JPEG or WebP"):
            uploads.take_picture(tmp_path / name)
    Image.new("1", (6000, 6000)).save(tmp_path / "big.png")
    with pytest.raises(LolgenError, match="6000 x 6000"):
        uploads.take_picture(tmp_path / "big.png")
    monkeypatch.setattr(uploads, "MAX_PICTURE_BYTES", 10)
    with pytest.raises(LolgenError, match="at most"):
        uploads.take_picture(tmp_path / "big.png")
