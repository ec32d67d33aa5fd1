"""Whatever is wrong with a file: one FormatError with the file, what was found and wanted, and the remedy."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapters import UNET, random
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save
from torch import Tensor

from lolgen import io
from lolgen.errors import FormatError, LolgenError

K = "unet.conv_out"
PAIR = {f"{K}.lora_A.weight": torch.ones(2, 3), f"{K}.lora_B.weight": torch.ones(4, 2)}


def raw(header: Any, body: bytes = b"", length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + body


def row(shape: list[Any], begin: Any, end: Any, dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def pair_with(**changes: Tensor | None) -> bytes:
    tensors = {k: v for k, v in (PAIR | {f"{K}.{k}": v for k, v in changes.items()}).items() if v is not None}
    return save(tensors)


def nan(shape: tuple[int, ...], value: float) -> Tensor:
    t = torch.ones(shape)
    t.view(-1)[0] = value
    return t


GOOD = save(PAIR)
BAD: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "an empty file"),
    "three bytes": (b"abc", "3 bytes"),
    "text": (b"this is not a safetensors file at all", "header length"),
    "truncated body": (GOOD[:-4], "bytes of tensors"),
    "truncated header": (GOOD[:40], "header length"),
    "trailing bytes": (GOOD + b"\0" * 8, "bytes of tensors"),
    "header too long": (raw({}, length=2**63), "header length of 9223372036854775808"),
    "header not JSON": (raw(b"{'a': 1}"), "not JSON"),
    "header not UTF-8": (raw(b'{"\xff": 1}'), "not JSON"),
    "header a list": (raw([1]), "no JSON object"),
    "header too deep": (raw(b'{"a":' * 50_000), "not JSON"),
    "header of objects alone": (raw(b'{"a":[' + b"[]," * 200_000 + b"[]]}"), "a header of 200003 objects"),
    "key twice": (raw(b'{"a":{},"a":{}}'), "the key twice"),
    "metadata not strings": (raw({"__metadata__": {"a": 1}}), "'__metadata__'"),
    "row not an object": (raw({"a": 5}), "dtype None"),
    "unknown dtype": (raw({"a": row([1], 0, 4, "F33")}, b"\0" * 4), "dtype 'F33'"),
    "dtype a list": (raw({"a": row([1], 0, 4, ["F32"])}, b"\0" * 4), "dtype ['F32']"),
    "negative shape": (raw({"a": row([-1], 0, 4)}, b"\0" * 4), "whole numbers"),
    "boolean shape": (raw({"a": row([True], 0, 4)}, b"\0" * 4), "whole numbers"),
    "fractional offset": (raw({"a": row([1], 0, 4.0)}, b"\0" * 4), "whole numbers"),
    "a very long key": (raw({"a" * 2000: row([1], 0, 4)}, b"\0" * 4), "a key of 2000 characters"),
    "a very long dtype": (raw({"a": row([1], 0, 4, "F" * 2000)}, b"\0" * 4), "dtype 'FFF"),
    "size lies": (raw({"a": row([2], 0, 4)}, b"\0" * 4), "4 bytes for F32 (2,)"),
    "huge shape": (raw({"a": row([2**62, 2**62], 0, 4)}, b"\0" * 4), "4 bytes for F32"),
    "overlap": (raw({"a": row([2], 0, 8), "b": row([2], 4, 12)}, b"\0" * 12), "overlaps the tensor before"),
    "gap": (raw({"a": row([1], 0, 4), "b": row([1], 8, 12)}, b"\0" * 12), "leaves a gap"),
    "past the end": (raw({"a": row([2], 0, 8)}, b"\0" * 4), "4 bytes of tensors"),
    "pickle": (pickle.dumps({"a": 1}), "a pickle (protocol 4)"),
    "zip": (b"PK\x03\x04" + b"\0" * 50, "a zip archive"),
    "gguf": (b"GGUF" + b"\0" * 50, "a GGUF file"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
    "web page": (b"<!DOCTYPE html><html></html>", "a web page"),
    "no tensors": (save({}), "no key of a LoRA among 0"),
    "a full model": (save({"model.weight": torch.ones(2)}), "not a full model"),
    "B is missing": (pair_with(**{"lora_B.weight": None}), "without its up (B) half"),
    "A is missing": (pair_with(**{"lora_A.weight": None}), "without its down (A) half"),
    "integers": (pair_with(**{"lora_A.weight": torch.ones(2, 3, dtype=torch.int8)}), "dtype int8"),
    "NaN": (pair_with(**{"lora_A.weight": nan((2, 3), float("nan"))}), "1 NaN and 0 Inf in 6 numbers"),
    "Inf": (pair_with(**{"lora_B.weight": nan((4, 2), -float("inf")).bfloat16()}), "0 NaN and 1 Inf"),
    "ranks differ": (
        pair_with(**{"lora_B.weight": torch.ones(4, 3)}),
        "shape (4, 3); wanted (out, 2) to go with",
    ),
    "rank 0": (
        pair_with(**{"lora_A.weight": torch.ones(0, 3), "lora_B.weight": torch.ones(4, 0)}),
        "a rank of 1 or more",
    ),
    "one-dimensional": (pair_with(**{"lora_A.weight": torch.ones(6)}), "shape (6,)"),
    "a scalar": (pair_with(**{"lora_A.weight": torch.ones(())}), "shape ()"),
    "Tucker core that grows": (
        pair_with(**{"lora_mid.weight": torch.ones(2, 1, 700, 700), "lora_A.weight": torch.ones(1, 300)}),
        "not far larger than both",
    ),
    "B of a conv not 1x1": (
        pair_with(**{"lora_A.weight": torch.ones(2, 3, 3, 3), "lora_B.weight": torch.ones(4, 2, 3, 3)}),
        "wanted (out, 2, 1, 1)",
    ),
    "two adapters": (
        pair_with(**{"lora_A.second.weight": torch.ones(2, 3), "lora_B.second.weight": torch.ones(4, 2)}),
        "a second",
    ),
    "alpha of two numbers": (pair_with(alpha=torch.ones(2)), "wanted one number"),
    "alpha without a pair": (
        save(PAIR | {"unet.conv_in.alpha": torch.tensor(1.0)}),
        "an alpha without a factor pair",
    ),
    "a bias without a pair": (
        save(PAIR | {"unet.conv_in.lora_B.bias": torch.ones(2)}),
        "a bias without a factor pair",
    ),
    "header metadata not JSON": (
        save(PAIR, {"lora_adapter_metadata": "{"}),
        "'lora_adapter_metadata'",
    ),
    "header metadata a number": (save(PAIR, {"lora_adapter_metadata": "5"}), "found int"),
    "mixed formats": (
        save(PAIR | {"lora_unet_conv_in.lora_down.weight": torch.ones(2, 3)}),
        "PEFT key among kohya keys",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_bytes(name: str, tmp_path: Path) -> None:
    data, words = BAD[name]
    file = tmp_path / "bad.safetensors"
    file.write_bytes(data)
    one_line(file, lambda: io.load(file), words)


def one_line(file: Path, act: Callable[[], object], words: str) -> None:
    with pytest.raises(FormatError) as caught:
        act()
    text = str(caught.value)
    assert "\n" not in text
    assert text.startswith(str(file))
    assert words in text
    assert caught.value.found and caught.value.wanted and caught.value.remedy
    assert len(text) < 1000


FOLDERS: dict[str, tuple[dict[str, bytes], str]] = {
    "empty": ({}, "a folder without adapter_model.safetensors"),
    "no adapter": ({"README.md": b"hello"}, "a folder without adapter_model.safetensors"),
    "config alone": ({"adapter_config.json": b"{}"}, "a folder without"),
    "weights alone": (
        {"adapter_model.safetensors": save({f"base_model.model.{k}": v for k, v in PAIR.items()})},
        "adapter_config.json: found no such file",
    ),
    "config not JSON": ({"adapter_config.json": b"{,", "adapter_model.safetensors": GOOD}, "not JSON"),
    "config a list": ({"adapter_config.json": b"[]", "adapter_model.safetensors": GOOD}, "found list"),
    "weights damaged": (
        {"adapter_config.json": b"{}", "adapter_model.safetensors": GOOD[:-1]},
        "bytes of tensors",
    ),
    "weights of a full model": (
        {"adapter_config.json": b"{}", "adapter_model.safetensors": save({"w": torch.ones(1)})},
        "no factor pair",
    ),
    "a pickle": ({"adapter_config.json": b"{}", "adapter_model.bin": pickle.dumps(1)}, "found a pickle"),
    "two files": ({"a.safetensors": GOOD, "b.safetensors": GOOD}, "found a.safetensors, b.safetensors"),
}


@pytest.mark.parametrize("name", FOLDERS)
def test_bad_folders(name: str, tmp_path: Path) -> None:
    files, words = FOLDERS[name]
    for file, data in files.items():
        (tmp_path / file).write_bytes(data)
    one_line(tmp_path, lambda: io.load(tmp_path), words)


def test_what_is_not_there(tmp_path: Path) -> None:
    one_line(tmp_path / "no", lambda: io.load(tmp_path / "no"), "no such file or folder")
    one_line(tmp_path / "no", lambda: io.detect(tmp_path / "no"), "no such file or folder")


def test_no_pickle_is_opened(tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "boom",))

    for suffix in (".bin", ".pt", ".safetensors"):
        file = tmp_path / f"x{suffix}"
        file.write_bytes(pickle.dumps(Bomb()))
        one_line(file, lambda file=file: io.load(file), "a pickle")  # type: ignore[misc]
        torch.save({"a": torch.ones(1), "b": Bomb()}, file)
        one_line(file, lambda file=file: io.load(file), "a zip archive")  # type: ignore[misc]
    assert not (tmp_path / "boom").exists()


@given(data=st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_damage_gives_a_traceback(data: st.DataObject, tmp_path: Path) -> None:
    """A good file with bytes changed, cut or put in is read or refused, never anything else."""
    damaged = bytearray(data.draw(st.sampled_from([GOOD, GOOD_KOHYA, GOOD_HEADER])))
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, max(0, len(damaged) - 1)))
        kind = data.draw(st.sampled_from(["set", "cut", "put"]))
        if kind == "set" and damaged:
            damaged[at] = data.draw(st.integers(0, 255))
        elif kind == "cut":
            del damaged[at : at + data.draw(st.integers(1, 40))]
        else:
            damaged[at:at] = data.draw(st.binary(min_size=1, max_size=20))
    file = tmp_path / "x.safetensors"
    file.write_bytes(bytes(damaged))
    try:
        lora = io.load(file)
    except FormatError as error:
        assert "\n" not in str(error)
    else:
        assert all(torch.isfinite(f.delta().float()).all() for f in lora.factors.values())


GOOD_KOHYA = save(
    {
        "lora_unet_conv_in.lora_down.weight": torch.ones(2, 3, 3, 3),
        "lora_unet_conv_in.lora_up.weight": torch.ones(4, 2, 1, 1),
        "lora_unet_conv_in.alpha": torch.tensor(1.0),
    },
    {"ss_network_dim": "2"},
)
GOOD_HEADER = save(
    PAIR,
    {"lora_adapter_metadata": '{"unet.r": 2, "unet.lora_alpha": 4, "unet.alpha_pattern": {"conv_out": 1}}'},
)


FIELDS = (
    *("r", "lora_alpha", "rank_pattern", "alpha_pattern"),
    *("use_rslora", "init_lora_weights", "peft_type", "auto_mapping"),
)


@given(
    config=st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
        lambda x: st.lists(x, max_size=3) | st.dictionaries(st.text(max_size=8), x, max_size=3),
        max_leaves=6,
    ),
    field=st.sampled_from(FIELDS),
)
@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_no_config_gives_a_traceback(config: Any, field: str, tmp_path: Path) -> None:
    (tmp_path / "adapter_model.safetensors").write_bytes(GOOD)
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2} | {field: config}))
    try:
        io.load(tmp_path)
    except FormatError as error:
        assert "\n" not in str(error)


def test_the_error_is_lolgens() -> None:
    assert issubclass(FormatError, LolgenError)


def test_reading_and_writing_need_no_other_library(tmp_path: Path) -> None:
    io.save(random(UNET), tmp_path / "x", "peft")
    code = (
        "import sys, lolgen.io as io; io.save(io.load(sys.argv[1]), sys.argv[2], 'kohya');"
        "assert not {'peft', 'diffusers', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, tmp_path / "x", tmp_path / "y.safetensors"], check=True)
    assert io.detect(tmp_path / "y.safetensors") == "kohya"
