"""The files of `train.fuzz`: good adapters damaged, headers that lie, configs of anything, and what is no adapter."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

Rng = random.Random
Rows = dict[str, dict[str, Any]]

SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
         "F8_E4M3": 1, "F8_E5M2": 1}  # fmt: skip
PATHS = (
    "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "unet.conv_in", "unet.mid_block.resnets.0.conv1",
    "text_encoder.text_model.encoder.layers.0.self_attn.q_proj", "transformer.transformer_blocks.0.attn.to_q",
    "transformer.single_transformer_blocks.3.attn.to_k", "base_model.model.model.layers.0.self_attn.q_proj",
    "base_model.model.model.embed_tokens", "base_model.model.h.0.attn.c_attn", "down_blocks.0.attentions.0.proj_in",
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", "lora_unet_single_blocks_1_linear1",
    "lora_te1_text_model_encoder_layers_3_self_attn_q_proj", "lora_unet_double_blocks_0_img_attn_qkv",
    "lora_unet_input_blocks_4_1_transformer_blocks_1_attn2_to_v", "lora_te_text_model_encoder_layers_0_mlp_fc1",
    "lora_unet_joint_blocks_0_x_block_attn_qkv", "lycoris_down_blocks_0_attentions_0_proj_out",
    "diffusion_model.double_blocks.0.img_attn.qkv", "lora_unet_own_layer", "a", "x.y.z",
)  # fmt: skip
TAILS = (
    "lora_A.weight", "lora_B.weight", "lora_down.weight", "lora_up.weight", "lora_mid.weight", "alpha", "dora_scale",
    "lora_embedding_A", "lora_embedding_B", "lora_magnitude_vector", "lora_B.bias", "lora_A.default.weight",
    "processor.to_q_lora.down.weight", "lora.up.weight", "lora_linear_layer.down.weight", "hada_w1_a", "hada_w1_b",
    "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2", "lokr_w1", "lokr_w2", "lokr_w1_a", "lokr_w1_b", "lokr_w2_a",
    "lokr_w2_b", "lokr_t2", "oft_blocks", "a1.weight", "diff", "diff_b", "weight", "bias", "on_input", "w_norm",
    "vera_lambda_b", "lora_E", "scalar", "",
)  # fmt: skip
PAIRS = (
    ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight"),
    ("lora_embedding_A", "lora_embedding_B"), ("lora.down.weight", "lora.up.weight"),
    ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"),
)  # fmt: skip
ODD_NUMBERS: tuple[Any, ...] = (
    0, 1, -1, 2**31, 2**63, 2**64, 10**30, -(2**63), 1e308, -0.0, 1.5, True, None, "4", [], {}, float("nan"),
    float("inf"),
)  # fmt: skip
METADATA = (
    "ss_base_model_version", "ss_network_dim", "ss_tag_frequency", "ss_training_started_at", "modelspec.architecture",
    "modelspec.title", "lora_adapter_metadata", "format", "sshs_model_hash", "lolgen.io.modules", "lolgen.io.component",
)  # fmt: skip


def make(number: int, folder: Path) -> Path:
    """Write file (or PEFT folder) `number` below `folder`; its path."""
    rng = Rng(number)
    kind = rng.choice((good_damaged, good_damaged, lying_header, lying_header, odd_tensors, odd_tensors, peft_folder,
                       peft_folder, plausible, plausible, junk))  # fmt: skip
    return kind(rng, folder)


def _write(folder: Path, data: bytes, name: str = "x.safetensors") -> Path:
    (folder / name).write_bytes(data)
    return folder / name


def container(rows: Rows, body: bytes, metadata: Any = None, length: int | None = None) -> bytes:
    """The bytes of a file with this header, right or wrong."""
    header: dict[str, Any] = ({"__metadata__": metadata} if metadata is not None else {}) | rows
    head = json.dumps(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", (len(head) if length is None else length) % 2**64) + head + body


def tensors(rng: Rng, shapes: dict[str, tuple[int, ...]], dtype: str | None = None) -> tuple[Rows, bytes]:
    """Rows and bytes of tensors of these shapes: small numbers, now and then NaN, Inf, or anything."""
    rows: Rows = {}
    body = b""
    for key, shape in shapes.items():
        kind = dtype or rng.choice(("F32", "F32", "F16", "BF16", "F64", "F8_E4M3", "I8", "BOOL"))
        n = math.prod(shape)
        raw = _numbers(rng, kind, n)
        rows[key] = {"dtype": kind, "shape": list(shape), "data_offsets": [len(body), len(body) + len(raw)]}
        body += raw
    return rows, body


def _numbers(rng: Rng, kind: str, n: int) -> bytes:
    size = SIZES[kind]
    if rng.random() < 0.03:
        return rng.randbytes(n * size)  # any bits: NaN, Inf, subnormal, huge
    if rng.random() < 0.1:
        return bytes(n * size)
    if kind in ("F32", "F64", "F16"):
        form = {"F32": "f", "F64": "d", "F16": "e"}[kind]
        scale = rng.choice((1.0, 1.0, 1.0, 1e-4, 1e3))
        return struct.pack(f"<{n}{form}", *(rng.gauss(0, 1) * scale for _ in range(n)))
    if kind == "BF16":
        return b"".join(struct.pack("<f", rng.gauss(0, 1))[2:] for _ in range(n))
    return bytes(rng.randrange(0, 100 if size == 1 and kind != "BOOL" else 2) for _ in range(n * size))


def pair(rng: Rng, path: str, tails: tuple[str, str]) -> dict[str, tuple[int, ...]]:
    """The shapes of a good pair, sometimes with an alpha and a kernel."""
    r, out, in_ = rng.randint(1, 6), rng.randint(1, 12), rng.randint(1, 12)
    kernel = rng.choice(((), (), (1, 1), (3, 3), (3,)))
    ones = (1,) * len(kernel)
    embedding = "embedding" in tails[0]
    found: dict[str, tuple[int, ...]] = {
        f"{path}.{tails[0]}": (r, in_) if embedding else (r, in_, *kernel),
        f"{path}.{tails[1]}": (out, r) if embedding else (out, r, *ones),
    }
    if rng.random() < 0.4:
        found[f"{path}.alpha"] = ()
    return found


def good(rng: Rng) -> bytes:
    """A small adapter as programs write them."""
    kohya = rng.random() < 0.5
    tails = PAIRS[1] if kohya else rng.choice(PAIRS)
    paths = [
        p for p in PATHS if p.startswith("lora_") == kohya and not p.startswith(("base_model", "lycoris"))
    ]
    shapes: dict[str, tuple[int, ...]] = {}
    for path in rng.sample(paths, rng.randint(1, 4)):
        shapes |= pair(rng, path, tails)
    metadata = {
        k: "1" for k in rng.sample(METADATA, rng.randint(0, 3)) if k not in ("lora_adapter_metadata",)
    }
    return container(*tensors(rng, shapes, rng.choice(("F32", "F16", "BF16"))), metadata or None)


def good_damaged(rng: Rng, folder: Path) -> Path:
    """Bytes changed, taken out, put in, cut off; or nothing at all."""
    data = bytearray(good(rng))
    for _ in range(rng.choice((0, 1, 1, 2, 8))):
        at = rng.randrange(len(data)) if data else 0
        # The header is a small part of the file, and the interesting one.
        at = rng.randrange(min(len(data), 400)) if data and rng.random() < 0.6 else at
        act = rng.randrange(4)
        if act == 0 and data:
            data[at] = rng.randrange(256)
        elif act == 1:
            del data[at : at + rng.choice((1, 1, 8, 100))]
        elif act == 2:
            data[at:at] = rng.randbytes(rng.choice((1, 4, 64)))
        else:
            del data[at:]
    return _write(folder, bytes(data))


def lying_header(rng: Rng, folder: Path) -> Path:
    """Rows whose dtype, shape or offsets are not so; keys twice; metadata of anything; any length."""
    rows, body = tensors(rng, pair(rng, rng.choice(PATHS), rng.choice(PAIRS)), "F32")
    for _ in range(rng.randint(1, 3)):
        row = rows[rng.choice(list(rows))]
        field = rng.choice(("dtype", "shape", "data_offsets", "drop", "extra", "all"))
        if field == "dtype":
            row["dtype"] = rng.choice((*SIZES, "F4", "C64", "", 7, None, ["F32"], "F32" * 300))
        elif field == "drop" and row:
            row.pop(rng.choice(list(row)))
        elif field == "extra":
            row[rng.choice(("dtype", "x", "shape"))] = rng.choice(ODD_NUMBERS)
        elif field == "all":
            rows[rng.choice(list(rows))] = rng.choice(ODD_NUMBERS)
            break
        elif isinstance(row.get(field), list) and row[field]:
            row[field][rng.randrange(len(row[field]))] = rng.choice(ODD_NUMBERS)
        else:
            row[field] = rng.choice(([0, 4], [4, 0], [0, 2**63], [[0, 4]], "0", [0] * 1000, [1] * 70))
    metadata: Any = rng.choice((None, {}, {"a": 1}, [], "x", {"a": None}, {"k": "v" * 10_000}, {"": ""}))
    length = None if rng.random() < 0.8 else rng.choice((0, 1, 7, 2**31, 2**63, 2**64 - 1, len(body)))
    data = container(rows, body, metadata, length)
    if rng.random() < 0.2:  # a key twice, which no dict can hold
        data = _again(data)
    if rng.random() < 0.1:
        deep = rng.choice((b"[", b'{"a":')) * rng.choice((100, 10_000, 200_000))
        wide = (
            b'{"a":['
            + rng.choice((b"[],", b"{},", b"0,", b'"",')) * rng.choice((1000, 60_000, 500_000))
            + b"0]}"
        )
        data = rng.choice((deep, wide))
        data = struct.pack("<Q", len(data)) + data
    return _write(folder, data)


def _again(data: bytes) -> bytes:
    head = data[8 : 8 + int.from_bytes(data[:8], "little")]
    twice = head[:-1] + b"," + head[1:] if len(head) > 2 else head
    return struct.pack("<Q", len(twice)) + twice + data[8 + len(head) :]


def _shape(rng: Rng) -> tuple[int, ...]:
    sizes = [rng.choice((0, 1, 1, 2, 3, 4, 7, 16)) for _ in range(rng.choice((0, 1, 2, 2, 2, 3, 4, 4, 5)))]
    return tuple(sizes) if math.prod(sizes) <= 4096 else (4, 4)


def _key(rng: Rng) -> str:
    path = rng.choice(PATHS)
    if rng.random() < 0.1:
        path = "".join(
            rng.choice("ab.\n\t\x00\x1b[é_\ud83d0 \"'/\\") for _ in range(rng.choice((1, 20, 999, 1500)))
        )
        path = path.encode("utf-8", "replace").decode()
    tail = rng.choice(TAILS)
    return f"{path}.{tail}" if tail else path


def odd_tensors(rng: Rng, folder: Path) -> Path:
    """A true header over keys and shapes that do not go together."""
    shapes = {_key(rng): _shape(rng) for _ in range(rng.randint(1, 8))}
    if rng.random() < 0.5:
        shapes |= pair(rng, rng.choice(PATHS), rng.choice(PAIRS))
    if rng.random() < 0.1:  # empty tensors of enormous shapes
        shapes[_key(rng)] = rng.choice(((0, 2**40), (2**40, 0), (2**31, 0, 2**31)))
    return _write(folder, container(*tensors(rng, shapes), _metadata(rng)))


def _metadata(rng: Rng) -> dict[str, str] | None:
    found = {}
    for key in rng.sample(METADATA, rng.randint(0, 4)):
        found[key] = rng.choice((
            "", "null", "1", "nan", "[" * 5000, '{"unet.r": 4, "unet.lora_alpha": 8}', "\x1b[31mred\n",
            '{"unet.alpha_pattern": {"(a+)+": 3}, "unet.lora_alpha": 1}', '{"r": "x", "lora_alpha": []}', '["a", 1]',
            '{"a": {"b": 1e999, "c": -3}}', "x" * 20_000, '{"lora_alpha": NaN}', '["unet.conv_in", "a.b"]',
        ))  # fmt: skip
    return found or None


def peft_folder(rng: Rng, folder: Path) -> Path:
    """An adapter's folder: good weights or not, with a config of anything."""
    place = folder / "adapter"
    place.mkdir()
    shapes: dict[str, tuple[int, ...]] = {}
    for path in rng.sample([p for p in PATHS if "lora_" not in p], rng.randint(1, 3)):
        path = path if path.startswith("base_model") else f"base_model.model.{path}"
        shapes |= pair(rng, path, rng.choice((PAIRS[0], PAIRS[0], PAIRS[2])))
    shapes = {k: s for k, s in shapes.items() if not k.endswith(".alpha") or rng.random() < 0.2}
    if rng.random() < 0.3:
        shapes[f"base_model.model.{_key(rng)}"] = _shape(rng)
    data = container(*tensors(rng, shapes, rng.choice(("F32", "F16"))), _metadata(rng))
    if rng.random() < 0.1:
        data = data[: rng.randrange(len(data))]
    (place / "adapter_model.safetensors").write_bytes(data)
    config = _config(rng)
    if config is not None:
        (place / "adapter_config.json").write_bytes(config)
    return place


def _config(rng: Rng) -> bytes | None:
    if rng.random() < 0.1:
        return rng.choice((None, b"", b"{", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b'{"r":' * 10_000))
    config: dict[str, Any] = {"peft_type": "LORA", "lora_alpha": 8}  # without r, any rank will do
    if rng.random() < 0.2:
        config["r"] = rng.randint(1, 6)
    patterns = (
        "to_q",
        ".*",
        "(a+)+$",
        "(",
        "^x",
        "a" * 600,
        "(.*)(.*)(.*)(.*)(.*)x",
        "[",
        "\\",
        "q_proj|k_proj",
        "",
    )
    for _ in range(rng.randint(0, 4)):
        field = rng.choice((
            "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "peft_type", "init_lora_weights",
            "use_dora", "target_modules", "modules_to_save", "auto_mapping", "base_model_name_or_path",
            "fan_in_fan_out", "target_parameters", "layer_replication", "lora_bias",
        ))  # fmt: skip
        if field.endswith("pattern") and rng.random() < 0.8:
            config[field] = {rng.choice(patterns): rng.choice((1, 4, 8, *ODD_NUMBERS)) for _ in range(3)}
        elif field == "peft_type":
            config[field] = rng.choice(("LOHA", "VERA", "ADALORA", 5, None, "LORA", "x" * 1000))
        elif field == "init_lora_weights":
            config[field] = rng.choice(("pissa", "OLoRA", "eva", True, False, 3, [], "pissa_niter_4"))
        elif field == "auto_mapping":
            config[field] = rng.choice((
                {"base_model_class": "UNet2DConditionModel", "parent_library": "diffusers.models"}, {}, [], "x", 4,
                {"base_model_class": 5}, {"base_model_class": "FluxTransformer2DModel", "parent_library": 7},
            ))  # fmt: skip
        else:
            config[field] = rng.choice(ODD_NUMBERS)
    return json.dumps(config).encode()


def plausible(rng: Rng, folder: Path) -> Path:
    """LoHa, LoKr, DoRA, Tucker and full weights whose shapes nearly fit."""
    path = rng.choice([p for p in PATHS if not p.startswith("base_model")])
    r, out, in_ = rng.randint(1, 5), rng.randint(1, 10), rng.randint(1, 10)
    makers: tuple[Callable[[], dict[str, tuple[int, ...]]], ...] = (
        lambda: {f"{path}.hada_w{i}_{h}": (out, r) if h == "a" else (r, in_) for i in "12" for h in "ab"},
        lambda: {f"{path}.lokr_w1": (2, 2), f"{path}.lokr_w2_a": (out, r), f"{path}.lokr_w2_b": (r, in_)},
        lambda: {f"{path}.lokr_w1_a": (2, r), f"{path}.lokr_w1_b": (r, 2), f"{path}.lokr_w2": (out, in_, 3, 3)},
        lambda: {f"{path}.hada_w1_a": (r, out), f"{path}.hada_w1_b": (r, in_), f"{path}.hada_t1": (r, r, 3, 3),
                 f"{path}.hada_w2_a": (r, out), f"{path}.hada_w2_b": (r, in_), f"{path}.hada_t2": (r, r, 3, 3)},
        lambda: {f"{path}.lora_down.weight": (r, in_, 1, 1), f"{path}.lora_up.weight": (out, r, 1, 1),
                 f"{path}.lora_mid.weight": (r, r, *rng.choice(((3, 3), (1, 1), (500, 3), (3,))))},
        lambda: pair(rng, path, PAIRS[1]) | {f"{path}.dora_scale": rng.choice(((out, 1), (1, in_), (1,), ()))},
        lambda: {f"{path}.weight": (out, in_), f"{path}.bias": (out,)},
    )  # fmt: skip
    shapes = rng.choice(makers)()
    if rng.random() < 0.5:
        shapes[f"{path}.alpha"] = rng.choice(((), (1,), (2,), (0,)))
    if rng.random() < 0.4:
        key = rng.choice(list(shapes))
        shapes[key] = rng.choice((_shape(rng), tuple(reversed(shapes[key])), (*shapes[key], 1)))
    if rng.random() < 0.3:
        shapes.pop(rng.choice(list(shapes)))
    dtype = rng.choice((None, "F32", "F16"))
    return _write(folder, container(*tensors(rng, shapes, dtype), _metadata(rng)))


def junk(rng: Rng, folder: Path) -> Path:
    """Other formats, text, random bytes, nothing."""
    start = rng.choice((
        b"", b"PK\x03\x04", b"\x80\x04K\x01.", b"\x80\x02}q\x00.", b"GGUF", b"<!DOCTYPE html>", b"{}", b"\x00" * 8,
        b"version https://git-lfs.github.com/spec/v1\n", b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ",
    ))  # fmt: skip
    name = rng.choice(("x.safetensors", "x.safetensors", "x.bin", "x.pt", "adapter_model.bin"))
    return _write(folder, start + rng.randbytes(rng.choice((0, 1, 9, 300))), name)
