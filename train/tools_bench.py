"""Speed and optimality of `lolgen resize` and `lolgen merge`, against a full SVD of delta W in the same run.

    python -m train.tools_bench --out reports        # tools.json, tools.md; about 6 min on two cores

One 3072 x 3072 module at rank 64 (a Flux or Llama-sized layer): resize to rank 16, and merge two LoRAs to rank 64,
beside what other tools do: form delta W, `torch.linalg.svd` it in float32, cut. Errors are measured in float64 on the
full matrix, against the optimum that the float64 spectrum of delta W allows. Then a whole SDXL LoRA at rank 64 in
half precision, the 722 modules that sd-scripts trains in its UNet: load, resize, write; and merge two of them. All at
each number of threads asked for; the best of 5 runs, of 2 for a whole resize.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lolgen import gl, io
from lolgen.lora import Factors, LoRA, ModuleSpec, Spec
from lolgen.tools.files import Input
from lolgen.tools.merge import merge, merged
from lolgen.tools.methods import Options
from lolgen.tools.ranks import Target
from lolgen.tools.resize import resize, resized

SIZE, RANK, KEPT = 3072, 64, 16
WEIGHTS = (0.7, 0.3)


def sdxl_spec() -> Spec:
    """The attention modules of SDXL's UNet, from its structure: 722 linear layers."""
    modules: list[ModuleSpec] = []

    def linear(name: str, out: int, in_: int) -> None:
        modules.append(ModuleSpec(name, out, in_))

    def attention(at: str, width: int, depth: int) -> None:
        linear(f"{at}.proj_in", width, width)
        for i in range(depth):
            block = f"{at}.transformer_blocks.{i}"
            for attn, context in (("attn1", width), ("attn2", 2048)):
                linear(f"{block}.{attn}.to_q", width, width)
                linear(f"{block}.{attn}.to_k", width, context)
                linear(f"{block}.{attn}.to_v", width, context)
                linear(f"{block}.{attn}.to_out.0", width, width)
            linear(f"{block}.ff.net.0.proj", 8 * width, width)
            linear(f"{block}.ff.net.2", width, 4 * width)
        linear(f"{at}.proj_out", width, width)

    for block, width, depth in ((1, 640, 2), (2, 1280, 10)):
        for j in range(2):
            attention(f"unet.down_blocks.{block}.attentions.{j}", width, depth)
    attention("unet.mid_block.attentions.0", 1280, 10)
    for block, width, depth in ((0, 1280, 10), (1, 640, 2)):
        for j in range(3):
            attention(f"unet.up_blocks.{block}.attentions.{j}", width, depth)
    return Spec(tuple(modules))


def trained(spec: Spec, rank: int, seed: int, dtype: torch.dtype = torch.float32) -> LoRA:
    """A LoRA with the decaying spectrum of a trained one: column i of B shrinks as 1 / (1 + i / 4)."""
    generator = torch.Generator().manual_seed(seed)
    decay = 1 / (1 + torch.arange(rank) / 4)
    factors = {}
    for m in spec:
        B = 0.02 * torch.randn(m.out, rank, generator=generator) * decay
        A = torch.randn(rank, m.in_flat, generator=generator) / m.in_flat**0.5
        factors[m.name] = Factors(B.to(dtype), A.to(dtype))
    return LoRA(spec, factors)


def seconds(fn: Callable[[], Any], times: int = 1) -> tuple[float, float]:
    """(by the clock, of the processor), each the best of so many runs. The processor's seconds, of all threads, are
    what other work on the machine leaves alone: ratios are taken between them."""
    clock, processor = [], []
    for _ in range(times):
        start, busy = time.perf_counter(), time.process_time()
        fn()
        clock.append(time.perf_counter() - start)
        processor.append(time.process_time() - busy)
    return min(clock), min(processor)


def timed(fn: Callable[[], dict[str, Any]], times: int = 1) -> dict[str, float]:
    """The best of so many runs of a tool: seconds with reading and writing, of the algebra alone, of the processor."""
    runs = []
    for _ in range(times):
        start, busy = time.perf_counter(), time.process_time()
        report = fn()
        total, cpu = time.perf_counter() - start, time.process_time() - busy
        runs.append({"total": total, "algebra": report["seconds"], "cpu": cpu})
    return min(runs, key=lambda r: r["total"])


def above(W: Tensor, made: Factors, spectrum: Tensor) -> dict[str, float]:
    """Relative errors of a truncation of W (float64), and of the optimum at its rank."""
    norm = float(spectrum.norm())
    error = float(torch.linalg.matrix_norm(W - made.B.double() @ made.A.double())) / norm
    optimum = float(spectrum[made.rank :].norm()) / norm
    return {"error": error, "optimum": optimum, "above": error - optimum}


def one_module(threads: list[int], side: int = SIZE) -> dict[str, Any]:
    """The single module of side x side: seconds by threads, ratios, errors."""
    spec = Spec((ModuleSpec("m", side, side),))
    a, b = trained(spec, RANK, 0), trained(spec, RANK, 1)
    given = [Input("a", a, "peft"), Input("b", b, "peft")]
    target, both = Target(rank=KEPT), Target(rank=RANK)

    def do_resize(lora: LoRA = a) -> Factors:
        return resized(lora, target, "float64")[0]["m"].factors

    def do_merge() -> Factors:
        return merged(given, "sum", Options(WEIGHTS), both, "float64")[0]["m"].factors

    def full(W: Callable[[], Tensor]) -> tuple[float, float]:
        return seconds(lambda: torch.linalg.svd(W(), full_matrices=False))

    def sum_of() -> Tensor:
        return WEIGHTS[0] * a["m"].delta() + WEIGHTS[1] * b["m"].delta()

    rows = []
    for n in threads:
        torch.set_num_threads(n)
        do_resize(), do_merge()
        row: dict[str, Any] = {"threads": n, "load": round(os.getloadavg()[0], 2)}
        for name, ours, form in (("resize", do_resize, a["m"].delta), ("merge", do_merge, sum_of)):
            mine, theirs = seconds(ours, 5), full(form)
            row[name] = {
                "seconds": mine[0],
                "cpu": mine[1],
                "full_svd_seconds": theirs[0],
                "full_svd_cpu": theirs[1],
                "times_faster": theirs[1] / mine[1],
            }
        rows.append(row)
    torch.set_num_threads(max(threads))
    W = a["m"].to(torch.float64).delta()
    S = torch.linalg.svdvals(W)
    errors = {"resize": above(W, do_resize(), S)}
    for condition in (1e2, 1e4, 1e6):
        g = gl.random_gauge(
            rank=RANK,
            condition=condition,
            dtype=torch.float64,
            generator=torch.Generator().manual_seed(0),
        )
        moved = gl.act_lora(a.to(torch.float64), {"m": g})
        errors[f"resize in a gauge of condition {condition:.0e}"] = above(W, do_resize(moved), S)
    W = WEIGHTS[0] * W + WEIGHTS[1] * b["m"].to(torch.float64).delta()
    errors["merge"] = above(W, do_merge(), torch.linalg.svdvals(W))
    return {
        "size": side,
        "rank": RANK,
        "kept": KEPT,
        "full_svd_dtype": "float32",
        "rows": rows,
        "errors": errors,
    }


def whole_lora(threads: list[int], folder: Path, spec: Spec) -> dict[str, Any]:
    """A LoRA of these modules, in files: seconds of each step by threads."""
    paths = []
    for seed in range(2):
        lora = trained(spec, RANK, seed, torch.float16)
        paths.append(io.save(lora, folder / f"sdxl{seed}.safetensors", "diffusers"))
    out = folder / "out.safetensors"
    inputs = list(zip(paths, WEIGHTS, strict=True))
    resizes: dict[str, dict[str, Any]] = {
        f"resize to rank {KEPT}": {"rank": KEPT},
        "resize to error 0.1 overall": {"error": 0.1, "per": "overall"},
    }
    rows = []
    for n in threads:
        torch.set_num_threads(n)
        row: dict[str, Any] = {"threads": n, "load": round(os.getloadavg()[0], 2)}
        row["read"] = seconds(lambda: io.load(paths[0]))[0]
        for name, options in resizes.items():
            row[name] = timed(partial(resize, paths[0], out=out, **options), 2)
        for method in ("sum", "ties"):
            row[f"merge two by {method}, rank {RANK}"] = timed(
                partial(merge, inputs, method=method, rank=RANK, out=out)
            )
        rows.append(row)
    numbers = sum(f.B.numel() + f.A.numel() for f in io.load(paths[0]).factors.values())
    return {"modules": len(spec), "rank": RANK, "dtype": "float16", "parameters": numbers, "rows": rows}


def table(report: dict[str, Any]) -> str:
    """The report, for people."""
    lines = [
        "# Resize and merge, timed",
        "",
        f"`{report['command']}`. Load is the machine's at the start of a row, all that ran on it included; CPU seconds "
        "(all threads) do not count the others' work, and ratios are between them.",
    ]
    if "module" in report:
        lines += _module_lines(report["module"])
    if "sdxl" in report:
        lines += _sdxl_lines(report["sdxl"])
    return "\n".join(lines) + "\n"


def _module_lines(one: dict[str, Any]) -> list[str]:
    lines = [
        "",
        f"One {one['size']} x {one['size']} module at rank {RANK}: resize to rank {KEPT}, merge of two to rank {RANK}; "
        "the full SVD of delta W is torch's, in float32.",
        "",
        "| threads | load | resize, CPU ms | full SVD, CPU s | times | merge, CPU ms | full SVD, CPU s | times |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in one["rows"]:
        cells = [str(row["threads"]), str(row["load"])]
        for name in ("resize", "merge"):
            r = row[name]
            cells += [f"{1e3 * r['cpu']:.1f}", f"{r['full_svd_cpu']:.2f}", f"{r['times_faster']:.0f}"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "| relative error of delta W | lolgen | optimum | above it |", "| --- | --- | --- | --- |"]
    for name, e in one["errors"].items():
        lines.append(f"| {name} | {e['error']:.6f} | {e['optimum']:.6f} | {e['above']:.1e} |")
    return lines


def _sdxl_lines(many: dict[str, Any]) -> list[str]:
    steps = [k for k in many["rows"][0] if k not in ("threads", "load", "read")]
    lines = [
        "",
        f"An SDXL LoRA: {many['modules']} modules, rank {many['rank']}, {many['parameters'] / 1e6:.0f} M parameters in "
        "float16; seconds by the clock with reading and writing (CPU seconds).",
        "",
        f"| threads | load | read | {' | '.join(steps)} |",
        f"| --- | --- | --- |{' --- |' * len(steps)}",
    ]
    for row in many["rows"]:
        cells = [f"{row[s]['total']:.1f} ({row[s]['cpu']:.1f})" for s in steps]
        lines.append(f"| {row['threads']} | {row['load']} | {row['read']:.1f} | {' | '.join(cells)} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument(
        "--only", choices=("module", "sdxl"), help="one half; the report's other half is kept"
    )
    parser.add_argument("--folder", help="where the SDXL files go for a while (1 GB)")
    parser.add_argument("--out", type=Path, default=Path("reports"))
    args = parser.parse_args()
    report: dict[str, Any] = {}
    if args.only and (args.out / "tools.json").exists():
        report = json.loads((args.out / "tools.json").read_text())
    report |= {"command": "python -m train.tools_bench", "cores": os.cpu_count()}
    if args.only != "sdxl":
        report["module"] = one_module(args.threads)
    if args.only != "module":
        with tempfile.TemporaryDirectory(dir=args.folder) as folder:
            report["sdxl"] = whole_lora(args.threads, Path(folder), sdxl_spec())
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "tools.json").write_text(json.dumps(report, indent=1) + "\n")
    (args.out / "tools.md").write_text(table(report))
    print(table(report))


if __name__ == "__main__":
    main()
