"""How reading scales: every model of the table on LoRAs shaped like a GPT-3 family, from 125M to 175B.

    python -m train.scaling_bench                    # 10 min on one core; reports/scaling.{json,md,png}
    python -m train.scaling_bench --quick

As in the paper: rank 4, one square matrix a layer. Every reader is the one of the table, set up on `--references` LoRAs
of that shape and not trained (weights do not change the time), then asked about one LoRA: preprocessing and forward
pass. `dense_formed` multiplies delta W out, as the paper's dense baseline; the table's `dense` goes through the Gram
matrix instead. What would need more memory than `--limit` is not run; the bytes are given.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lolgen.io.atomic import write_file
from lolgen.lora import Batch, Group, ModuleSpec, Spec
from lolgen.tasks import dense, flat_transformer, glnet, mlp, oalign, ours, svd, w2t
from lolgen.tasks.models import MODELS
from lolgen.tasks.reader import Budget, Classes, Layout, Reader
from lolgen.tasks.training import mlp as small_net

SHAPES: dict[str, tuple[int, int]] = {
    "125M": (12, 768), "350M": (24, 1024), "760M": (24, 1536), "1.3B": (24, 2048), "2.7B": (32, 2560),
    "6.7B": (32, 4096), "13B": (40, 5140), "175B": (96, 12288),
}  # fmt: skip
"""Name -> (layers, width), Brown et al. 2020, table 2.1."""
PARAMETERS = {"M": 1e6, "B": 1e9}
RANK, HIDDEN, COMPONENTS, LORAS = 4, 64, 256, 1600


def make(layers: int, width: int, count: int, seed: int = 0) -> Batch:
    """`count` random LoRAs of one square matrix a layer, rank 4."""
    g = torch.Generator().manual_seed(seed)
    spec = Spec(tuple(ModuleSpec(f"layers.{i}.q_proj", width, width) for i in range(layers)))
    U, V = (torch.randn(count, layers, width, RANK, generator=g) / width**0.5 for _ in range(2))
    return Batch(
        spec, [Group(tuple(range(layers)), U, V)], torch.full((count, layers), RANK, dtype=torch.long)
    )


def parameters(name: str) -> float:
    return float(name[:-1]) * PARAMETERS[name[-1]]


def bytes_of(model: str, layers: int, width: int, references: int) -> int:
    """What a model holds at most while it reads one LoRA: first layer, references and input, float32."""
    flat, delta = 2 * layers * width * RANK, layers * width * width
    return 4 * {
        "mlp": flat * (HIDDEN + 2 * references),
        "o_align": flat * (256 + 2 * references),
        "pca": flat * 3 * references,
        "dense_formed": delta * (HIDDEN + 1),
        "ours": layers * width * 6 * (COMPONENTS + 2 * references) + flat * references,
    }.get(model, flat * 3 * references)


@contextlib.contextmanager
def untrained() -> Iterator[None]:
    """`train_net` that builds the net and leaves it at that."""

    def build(make_: Callable[[], nn.Module], *_: Any, **__: Any) -> tuple[nn.Module, float]:
        return make_().eval(), 0.0

    with contextlib.ExitStack() as stack:
        for module in (dense, flat_transformer, glnet, mlp, oalign, ours, svd, w2t):
            stack.enter_context(mock.patch.object(module, "train_net", build))
        yield


def reader_of(model: str, batch: Batch) -> Callable[[Batch], Tensor]:
    """Batch -> scores of a model that was set up on `batch`."""
    layout: Layout = Classes({"label": 2})
    if model == "dense_formed":
        delta = sum(m.out * m.in_flat for m in batch.spec)
        net = small_net(delta, HIDDEN, layout.total).eval()
        return lambda x: net(torch.cat([(g.U @ g.V.mT).flatten(1) for g in x.groups], 1))
    y = torch.arange(len(batch))[:, None] % 2
    with untrained():
        reader: Reader = MODELS[model].fit(batch, y, batch, y, layout, budget=Budget(1, 0.0))
    if isinstance(reader, ours.OursReader) and reader.model is not None:
        full_size(reader.model)
    return reader.scores


def full_size(model: ours.Ours) -> None:
    """Components and stored LoRAs as many as in the table, and every member at work."""
    t = model.traits
    t.into, t.centre = torch.zeros(len(t.into), COMPONENTS), torch.zeros(COMPONENTS)
    near = torch.zeros(LORAS, COMPONENTS), torch.zeros(LORAS, len(t.mean))
    model.neighbours = near
    model.shares = torch.full_like(model.shares, 1 / len(model.members))
    kept = []
    for k, member in enumerate(model.members):
        if member.kind == "cosine":
            continue  # its readout holds a matrix of the size of delta W for each module and class
        if member.kind == "kernel":
            member.tensors["weights"] = torch.zeros(LORAS, member.tensors["weights"].shape[1])
        if member.kind == "net":
            blocks = {"answers": COMPONENTS, "sizes": len(t.mean)}
            member.tensors |= {n: torch.ones(w) for n, w in blocks.items()}
            width = sum(blocks[b] for b in member.facts["blocks"])
            member.net = ours.Net(width, model.layout.total, 0.0).eval()
        kept.append(k)
    model.members = [model.members[k] for k in kept]
    model.shares, model.temperatures = model.shares[kept], model.temperatures[kept]


@torch.no_grad()
def seconds(read: Callable[[Batch], Tensor], batch: Batch, repeats: int) -> float:
    """Median time of reading one LoRA that was not read before (nothing is kept from it)."""
    found = []
    for k in range(repeats + 1):
        one = batch[k % len(batch) : k % len(batch) + 1]
        start = time.perf_counter()
        read(one)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])


def measure(
    names: list[str], models: list[str], references: int, limit: float, repeats: int
) -> dict[str, Any]:
    found: dict[str, Any] = {m: {} for m in models}
    bar = tqdm(total=len(names) * len(models), desc="scaling", unit="model")
    for name in names:
        layers, width = SHAPES[name]
        batch = make(layers, width, references)
        for model in models:
            bar.set_postfix_str(f"{name} {model}")
            need = bytes_of(model, layers, width, references)
            entry: dict[str, Any] = {"bytes": need}
            if need <= limit:
                entry["seconds"] = float(f"{seconds(reader_of(model, batch), batch, repeats):.4g}")
            found[model][name] = entry
            bar.update()
    bar.close()
    return found


def markdown(report: dict[str, Any]) -> str:
    names = report["sizes"]
    lines = [
        "# How reading scales",
        "",
        f"`{report['command']}`, one thread. Milliseconds to read one LoRA of rank 4, one square matrix a layer, of a "
        f"GPT-3 family, {report['references']} stored LoRAs for the models that keep some. `dense_formed` multiplies "
        f"delta W out. Where more than {report['limit_bytes'] / 1e9:.0f} GB would be needed: the gigabytes. `ours` is "
        "without the one member whose readout is as large as delta W.",
        "",
        "![time against size](scaling.png)",
        "",
        "| model | " + " | ".join(names) + " |",
        "| --- |" + " --- |" * len(names),
    ]
    for model, each in report["models"].items():
        cells = [
            f"{1e3 * e['seconds']:.3g}" if "seconds" in e else f"out of memory ({e['bytes'] / 1e9:.0f} GB)"
            for e in (each[n] for n in names)
        ]
        lines.append(f"| {model} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any]) -> bytes:
    import io

    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 5.2), layout="constrained")
    for k, (model, each) in enumerate(report["models"].items()):
        points = [(parameters(n), e["seconds"]) for n, e in each.items() if "seconds" in e]
        axis.plot(
            *zip(*points, strict=True), label=model, marker="os^vDPX"[k % 7], markersize=4,
            color="#c8102e" if model == "ours" else f"C{k % 10}", linewidth=2.4 if model == "ours" else 1,
            linestyle="--" if model == "dense_formed" else "-",
        )  # fmt: skip
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("parameters of the base")
    axis.set_ylabel("seconds to read one LoRA, one thread")
    axis.grid(alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    figure.legend(fontsize=8, loc="outside right center")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("reports"))
    parser.add_argument("--references", type=int, default=16)
    parser.add_argument("--limit", type=float, default=9e9, help="bytes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the two smallest sizes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = list(SHAPES)[:2] if args.quick else list(SHAPES)
    models = [*(m for m in MODELS if m != "majority"), "dense_formed"]
    report = {
        "command": f"python -m train.scaling_bench{' --quick' if args.quick else ''}",
        "sizes": names,
        "references": args.references,
        "limit_bytes": args.limit,
        "models": measure(names, models, args.references, args.limit, args.repeats),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_file(args.out / "scaling.json", (json.dumps(report, indent=1) + "\n").encode())
    write_file(args.out / "scaling.md", markdown(report).encode())
    write_file(args.out / "scaling.png", plot(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
