"""Round trips of `lolgen convert` at the true size of each family, and its speed beside stock diffusers.

    python -m train.convert_bench --out reports        # convert_bench.json; about 6 min on one core

For every family a random LoRA on every attention and feed-forward layer of the real structure (no weights of a base are
needed), through every ordered pair of formats that can hold it: the largest relative error of delta W against the
LoRA that was started from. Speed: reading a kohya file into our names against `lora_state_dict` of the stock
pipeline, which converts it too.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lolgen import io
from lolgen.io import parts
from lolgen.lora import LoRA, ModuleSpec, Spec
from lolgen.testing import random_lora
from lolgen.tools.convert import convert
from lolgen.tools.roundtrip import error

LAYERS = (
    "to_q",
    "to_k",
    "to_v",
    "to_out.0",
    "proj",
    "net.2",
    "proj_in",
    "proj_out",
    "linear",
    "proj_mlp",
    "to_add_out",
)
SDXL: dict[str, Any] = {
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def spec_of(family: str) -> Spec:
    """The adapted layers of a family at true size."""
    found: list[ModuleSpec] = []
    with torch.device("meta"):
        if family in ("sd1", "sdxl"):
            from diffusers import UNet2DConditionModel

            unet = UNet2DConditionModel(**(SDXL if family == "sdxl" else {"cross_attention_dim": 768}))
            found += layers(unet, "unet.")
            found += clip("text_encoder", 12, 768)
            found += clip("text_encoder_2", 32, 1280) if family == "sdxl" else []
        elif family == "flux":
            from diffusers import FluxTransformer2DModel

            inside = layers(FluxTransformer2DModel(guidance_embeds=True), "transformer.")
            found += [m for m in inside if "_blocks." in m.name] + clip("text_encoder", 12, 768)
        else:
            from transformers import LlamaConfig, LlamaForCausalLM

            model = LlamaForCausalLM(LlamaConfig())
            found += [m for m in layers(model, "", ("_proj",))]
    return Spec(tuple(found))


def layers(model: Any, prefix: str, ends: tuple[str, ...] = LAYERS) -> list[ModuleSpec]:
    found = []
    for name, m in model.named_modules():
        if isinstance(m, nn.Linear) and name.endswith(ends):
            found.append(ModuleSpec(prefix + name, m.out_features, m.in_features))
        elif isinstance(m, nn.Conv2d) and name.endswith(ends):
            kernel = (m.kernel_size[0], m.kernel_size[1])
            found.append(ModuleSpec(prefix + name, m.out_channels, m.in_channels, kernel, "conv"))
    return found


def clip(component: str, depth: int, width: int) -> list[ModuleSpec]:
    wide = {"fc1": (4 * width, width), "fc2": (width, 4 * width)}
    names = [n.replace("text_encoder.", f"{component}.") for n in io.clip_modules(depth)]
    return [ModuleSpec(n, *wide.get(n.rpartition(".")[2], (width, width))) for n in names]


def put(lora: LoRA, at: Path, format: str, base: str) -> Path:
    if format == "peft" and base != "llama":
        return parts.save(lora, at, base=base)
    return io.save(lora, at, format, base=base, companion=False)


def place(folder: Path, name: str, format: str) -> Path:
    return folder / (name if format == "peft" else f"{name}.safetensors")


def stock_seconds(family: str, file: Path) -> float:
    """How long the stock pipeline's class takes to read a kohya file into its own names."""
    import diffusers

    name = {"sd1": "StableDiffusionPipeline", "sdxl": "StableDiffusionXLPipeline", "flux": "FluxPipeline"}[
        family
    ]
    options: dict[str, Any] = {}
    if family == "sdxl":
        with torch.device("meta"):
            options["unet_config"] = diffusers.UNet2DConditionModel(**SDXL).config
    start = time.process_time()
    getattr(diffusers, name).lora_state_dict(str(file), **options)
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--families", nargs="+", default=["sd1", "sdxl", "flux", "llama"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("reports"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    report: dict[str, Any] = {
        "command": "python -m train.convert_bench",
        "rank": args.rank,
        "dtype": "float32",
    }
    for family in args.families:
        g = torch.Generator().manual_seed(args.seed)
        lora = random_lora(spec_of(family), args.rank, scale=0.37, generator=g)
        formats = ("peft",) if family == "llama" else io.FORMATS
        rows: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            sources = {f: put(lora, place(folder, f, f), f, family) for f in formats}
            for first, second in itertools.product(formats, repeat=2):
                start = time.process_time()
                made = convert(sources[first], place(folder, "out", second), second, base=family)
                seconds = time.process_time() - start
                end_to_end = error(lora, io.load(made.written, base=family))
                rows[f"{first} to {second}"] = {
                    "relative_error": end_to_end.relative,
                    "worst_module_error": end_to_end.worst_relative,
                    "cpu_seconds": round(seconds, 2),
                }
                print(family, first, second, rows[f"{first} to {second}"], flush=True)
            found: dict[str, Any] = {"modules": len(lora), "pairs": rows}
            found["largest_error"] = max(r["worst_module_error"] for r in rows.values())
            if "kohya" in sources:
                start = time.process_time()
                io.load(sources["kohya"])
                ours, stock = time.process_time() - start, stock_seconds(family, sources["kohya"])
                found["read_kohya_cpu_seconds"] = {"lolgen": round(ours, 2), "diffusers": round(stock, 2)}
                found["times_as_long_as_diffusers"] = round(ours / stock, 2)
        report[family] = found
    print(json.dumps({f: report[f]["largest_error"] for f in args.families}))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "convert_bench.json").write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
