"""How fast `lolgen inspect` is on a whole SDXL LoRA, beside what a user would write on safetensors and torch.

    python -m train.inspect_bench --out reports        # inspect.json; about 1 min on one core

The file is written first: the UNet's attention and MLP layers under kohya's SDXL names, random numbers, float16.
The rival opens the same file with `safetensors.torch.load_file` and takes every module's singular values from
QR of its factors and an SVD of rank x rank, in float32, on as many threads; the SVD of the full delta W, which
many scripts take, is timed on a few modules and scaled up by cost.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from lolgen.io import safetensors_file as stf
from lolgen.tools.inspect import report


def sdxl_sizes() -> dict[str, tuple[int, int]]:
    """kohya's name of each attention and MLP layer of SDXL's UNet -> (out, in): 722 modules."""
    found: dict[str, tuple[int, int]] = {}
    places = {
        "input_blocks_4_1": (640, 2), "input_blocks_5_1": (640, 2), "input_blocks_7_1": (1280, 10),
        "input_blocks_8_1": (1280, 10), "middle_block_1": (1280, 10), "output_blocks_0_1": (1280, 10),
        "output_blocks_1_1": (1280, 10), "output_blocks_2_1": (1280, 10), "output_blocks_3_1": (640, 2),
        "output_blocks_4_1": (640, 2), "output_blocks_5_1": (640, 2),
    }  # fmt: skip
    for place, (width, depth) in places.items():
        at = f"lora_unet_{place}"
        found[f"{at}_proj_in"] = found[f"{at}_proj_out"] = (width, width)
        for i in range(depth):
            block = f"{at}_transformer_blocks_{i}"
            for attention, reads in (("attn1", width), ("attn2", 2048)):
                found[f"{block}_{attention}_to_q"] = found[f"{block}_{attention}_to_out_0"] = (width, width)
                found[f"{block}_{attention}_to_k"] = found[f"{block}_{attention}_to_v"] = (width, reads)
            found[f"{block}_ff_net_0_proj"] = (8 * width, width)
            found[f"{block}_ff_net_2"] = (width, 4 * width)
    return found


def write(file: Path, rank: int) -> dict[str, Any]:
    """A file of these modules; what is in it."""
    g = torch.Generator().manual_seed(0)
    tensors = {}
    for name, (out, in_) in sdxl_sizes().items():
        tensors[f"{name}.lora_down.weight"] = (torch.randn(rank, in_, generator=g) / in_**0.5).half()
        tensors[f"{name}.lora_up.weight"] = (torch.randn(out, rank, generator=g) * 0.01).half()
        tensors[f"{name}.alpha"] = torch.tensor(rank / 2)
    stf.write(file, tensors, {"ss_base_model_version": "sdxl_base_v1-0", "ss_network_dim": str(rank)})
    return {"modules": len(tensors) // 3, "rank": rank, "megabytes": round(file.stat().st_size / 2**20, 1)}


def by_qr(file: Path) -> int:
    """What a careful user would write: the spectra, and nothing else of the report."""
    tensors = safetensors.torch.load_file(file)
    count = 0
    for key, A in tensors.items():
        if key.endswith(".lora_down.weight"):
            B = tensors[key.replace("lora_down", "lora_up")].float()
            _, Rb = torch.linalg.qr(B)
            _, Ra = torch.linalg.qr(A.float().T)
            count += len(torch.linalg.svdvals(Rb @ Ra.T))
    return count


def full_svd(file: Path, modules: int = 6) -> float:
    """Seconds of the SVDs of all full delta W, from a few of each cost."""
    tensors = safetensors.torch.load_file(file)
    sizes = sdxl_sizes()
    cost = {n: max(s) * min(s) ** 2 for n, s in sizes.items()}
    some = sorted(sizes, key=lambda n: cost[n])[:: len(sizes) // modules][:modules]
    start = time.perf_counter()
    for n in some:
        torch.linalg.svdvals(
            tensors[f"{n}.lora_up.weight"].float() @ tensors[f"{n}.lora_down.weight"].float()
        )
    return (time.perf_counter() - start) * sum(cost.values()) / sum(cost[n] for n in some)


def best(act: Callable[[], object], times: int = 3) -> float:
    """Seconds of the fastest of some runs, the file in the page cache."""
    found = []
    for _ in range(times):
        start = time.perf_counter()
        act()
        found.append(time.perf_counter() - start)
    return round(min(found), 3)


def processor(act: Callable[[], object], times: int = 3) -> float:
    """The same of the processor's time, all threads together, which a busy machine changes less."""
    found = []
    for _ in range(times):
        start = time.process_time()
        act()
        found.append(time.process_time() - start)
    return round(min(found), 3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("reports"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "sdxl.safetensors"
        what = write(file, args.rank)
        ours = best(lambda: report.inspect(file))
        rival = best(lambda: by_qr(file))
        command = [sys.executable, "-m", "lolgen.cli", "inspect", str(file), "--json"]
        env = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
        cold = best(lambda: subprocess.run(command, check=True, capture_output=True, env=env))
        alone = best(lambda: subprocess.run([sys.executable, "-c", "import torch"], check=True, env=env))
        found = {
            "command": "python -m train.inspect_bench",
            "file": what,
            "threads": args.threads,
            "seconds": {
                "inspect": ours,
                "inspect_whole_command": cold,
                "import_torch_alone": alone,
                "qr_of_the_factors": rival,
                "svd_of_full_delta_w_estimated": round(full_svd(file), 1),
            },
            "processor_seconds": {
                "inspect": processor(lambda: report.inspect(file)),
                "qr_of_the_factors": processor(lambda: by_qr(file)),
            },
            "times_faster_than_qr": round(rival / ours, 2),
        }
    print(json.dumps(found, indent=1))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "inspect.json").write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
