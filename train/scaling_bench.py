"""How reading scales: every model of the table on LoRAs shaped like a GPT-3 family, from 125M to 175B.

    python -m train.scaling_bench                    # 10 min on one core; reports/scaling.{json,md,png}
    python -m train.scaling_bench --quick

As in the paper: rank 4, one square matrix a layer. Every reader is the one of the table, set up on a few LoRAs of that
shape and not trained (weights do not change the time), then asked about LoRAs that it has not seen: preprocessing and
forward pass, of one LoRA and of several at once. What a trained reader would hold more of is made as large as in the
table: `ours` has 256 components and 1,600 rows of its kernels, `pca` 512 components. Models that keep LoRAs as factors
(kernel, gp, dense) or their spectra (dsire) keep `--stored`; their time grows with that number, and is given by stored
LoRA too. `dense_formed` multiplies delta W out, as the paper's dense baseline, with a hidden layer of 64 and as the
linear map that is the table's first choice; the table's `dense` goes through the Gram matrix instead. `ours` listens
at the symmetry that every shipped reader has chosen, `ours_all_sizes` at the smallest group.

What would need more memory than `--limit` is not run; the bytes are given.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import gc
import io
import json
import statistics
import time
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from tqdm import tqdm

from lolgen.io.atomic import write_file
from lolgen.lora import Batch, Group, ModuleSpec, Spec
from lolgen.tasks import dense, features, flat_transformer, glnet, mlp, oalign, ours, pca, svd, w2t
from lolgen.tasks.models import MODELS
from lolgen.tasks.reader import Budget, Classes, Config, Layout, Reader
from lolgen.tasks.training import mlp as small_net
from train.memory import capped, out_of_memory, peak

SHAPES: dict[str, tuple[int, int]] = {
    "125M": (12, 768), "350M": (24, 1024), "760M": (24, 1536), "1.3B": (24, 2048), "2.7B": (32, 2560),
    "6.7B": (32, 4096), "13B": (40, 5140), "175B": (96, 12288),
}  # fmt: skip
"""Name -> (layers, width), Brown et al. 2020, table 2.1."""
PARAMETERS = {"M": 1e6, "B": 1e9}
RANK, HIDDEN, COMPONENTS, LORAS, PCA_COMPONENTS = 4, 64, 256, 1600, 512
SETUP = 6
"""LoRAs that a reader which keeps none is set up on."""
TOGETHER = 8
"""LoRAs read at once."""
KEEPS = frozenset({"dsire", "dense", "kernel", "gp"})
"""Models that keep something of every training LoRA, so that their time grows with the number of those."""
FORMED = {"dense_formed": HIDDEN, "dense_formed_linear": 0}
"""Model that multiplies delta W out -> its hidden width; 0 is the linear map."""


@dataclass(frozen=True)
class Row:
    """A line of the report: a model of `MODELS` and the configuration it is held to, if any."""

    model: str
    config: Config | None = None


ROWS: dict[str, Row] = {
    **{name: Row(name) for name in MODELS if name not in ("majority", "ours")},
    "ours": Row("ours", {"tier": 0.0}),
    "ours_all_sizes": Row("ours", {"tier": 2.0}),
}
"""Name -> row. A model more in `MODELS` is a row more here."""


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


def bytes_of(row: str, layers: int, width: int, stored: int) -> int:
    """What setting a reader up and reading one LoRA hold at most, float32: its weights, what it keeps, its inputs.

    With F = 2 layers width rank numbers in a LoRA and D = layers width^2 in delta W: a flattened net has F weights for
    every hidden unit; a dense one D, and delta W itself, for every hidden unit or, linear, for each of two classes.
    """
    flat, delta = 2 * layers * width * RANK, layers * width * width
    answers = layers * width * 6
    if row in FORMED:
        return 4 * delta * ((FORMED[row] or 2) + 1)
    model = ROWS[row].model
    # In LoRAs: those set up on, their rows, those standardised, and what reading several at once takes. Measured.
    copies = {"w2t": 64, "dsire": 4 * stored, **dict.fromkeys(("dense", "kernel", "gp"), stored + 16)}.get(
        model, 36
    )
    return 4 * {
        "mlp": flat * (HIDDEN + copies),
        "o_align": flat * (256 + copies),
        "pca": flat * (PCA_COMPONENTS + copies),
        "ours": answers * (COMPONENTS + 100) + SETUP * flat,
    }.get(model, flat * copies)


def held(thing: Any, seen: dict[int, int] | None = None) -> dict[int, int]:
    """Storage -> bytes of every tensor that a reader holds: its nets, and what its functions close over."""
    seen = {} if seen is None else seen
    if isinstance(thing, Tensor):
        storage = thing.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return seen
    parts: list[Any] = []
    if isinstance(thing, nn.Module):
        parts = [*thing.parameters(), *thing.buffers()]
    elif isinstance(thing, Batch):
        parts = [t for g in thing.groups for t in (g.U, g.V)]
    elif isinstance(thing, types.FunctionType):
        for cell in thing.__closure__ or ():
            with contextlib.suppress(ValueError):  # an empty cell
                parts.append(cell.cell_contents)
    elif isinstance(thing, types.MethodType):
        parts = [thing.__self__]
    elif isinstance(thing, functools.partial):
        parts = [thing.func, *thing.args, *thing.keywords.values()]
    elif isinstance(thing, Mapping):
        parts = list(thing.values())
    elif isinstance(thing, list | tuple):
        parts = list(thing)
    elif is_dataclass(thing) and not isinstance(thing, type):
        parts = [getattr(thing, f.name) for f in fields(thing)]
    for part in parts:
        held(part, seen)
    return seen


class _Wide:
    """Stands in for `Components` in `pca`: as many components as in the table, though set up on few LoRAs."""

    @staticmethod
    def fit(K: Tensor, most: int | None = None) -> features.Components:
        k = most or len(K)
        return features.Components(
            torch.randn(len(K), k, generator=torch.Generator().manual_seed(0)),
            K.mean(1),
            K.mean(),
            torch.ones(k),
        )


@contextlib.contextmanager
def untrained() -> Iterator[None]:
    """`train_net` that builds the net and leaves it at that; `pca` with all its components."""

    def build(make_: Callable[[], nn.Module], *_: Any, **__: Any) -> tuple[nn.Module, float]:
        return make_().eval(), 0.0

    with contextlib.ExitStack() as stack:
        for module in (dense, flat_transformer, glnet, mlp, oalign, ours, svd, w2t):
            stack.enter_context(mock.patch.object(module, "train_net", build))
        stack.enter_context(mock.patch.object(pca, "Components", _Wide))
        yield


def reader_of(row: str, batch: Batch) -> Callable[[Batch], Tensor]:
    """Batch -> scores of a row's model that was set up on `batch`."""
    layout: Layout = Classes({"label": 2})
    if row in FORMED:
        net = small_net(sum(m.out * m.in_flat for m in batch.spec), FORMED[row], layout.total).eval()

        def formed(x: Batch) -> Tensor:
            parts = [(g.U @ g.V.mT).flatten(1) for g in x.groups]
            found: Tensor = net(parts[0] if len(parts) == 1 else torch.cat(parts, 1))
            return found

        return formed
    y = torch.arange(len(batch))[:, None] % 2
    with untrained():
        fit, config = MODELS[ROWS[row].model].fit, ROWS[row].config
        reader: Reader = fit(batch, y, batch, y, layout, config=config, budget=Budget(1, 0.0))
    if isinstance(reader, ours.OursReader) and reader.model is not None:
        full_size(reader.model)
    return reader.scores


def full_size(model: ours.Ours) -> None:
    """Components and stored rows as many as in the table, and every member at work: no shipped reader has more."""
    t = model.traits
    t.into, t.centre = torch.zeros(len(t.into), COMPONENTS), torch.zeros(COMPONENTS)
    model.neighbours = torch.zeros(LORAS, COMPONENTS), torch.zeros(LORAS, len(t.mean))
    model.shares = torch.full_like(model.shares, 1 / len(model.members))
    for member in model.members:
        if member.kind == "kernel":
            member.tensors["weights"] = torch.zeros(LORAS, member.tensors["weights"].shape[1])
        if member.kind == "net":
            blocks = {"answers": COMPONENTS, "sizes": len(t.mean)}
            member.tensors |= {n: torch.ones(w) for n, w in blocks.items()}
            width = sum(blocks[b] for b in member.facts["blocks"])
            member.net = ours.Net(width, model.layout.total, 0.0).eval()


@torch.no_grad()
def seconds(
    read: Callable[[Batch], Tensor], fresh: Batch, count: int, repeats: int, least: float = 0.4
) -> float:
    """Median time of reading `count` LoRAs, a LoRA. Every reading has a batch of its own, so that what a reader
    remembers of a batch helps nobody; the first is left out; quick ones are repeated for `least` seconds."""
    found: list[float] = []
    for k in range(200):
        first = k * count % (len(fresh) - count + 1)
        batch = fresh[first : first + count]
        start = time.perf_counter()
        read(batch)
        found.append(time.perf_counter() - start)
        if k >= repeats and sum(found[1:]) >= least:
            break
    return statistics.median(found[1:]) / count


def entry_of(row: str, layers: int, width: int, stored: int, fresh: Batch, repeats: int) -> dict[str, Any]:
    """Seconds a LoRA read alone and among `TOGETHER`, bytes held by the reader, and the most that memory rose."""
    count = stored if row in KEEPS else SETUP
    gc.collect()
    with peak() as found:
        read = reader_of(row, make(layers, width, count))
        entry: dict[str, Any] = {"seconds": _short(seconds(read, fresh, 1, repeats))}
        if row not in FORMED:
            entry["seconds_together"] = _short(seconds(read, fresh, TOGETHER, repeats))
        entry["held_bytes"] = sum(held(read).values())
    if row in KEEPS:
        entry["seconds_a_stored_lora"] = _short(entry["seconds"] / stored)
    entry["peak_bytes"] = found.bytes
    return entry


def measure(names: list[str], rows: list[str], stored: int, limit: float, repeats: int) -> dict[str, Any]:
    """Row -> size -> what `entry_of` found, with the bytes needed; those alone where they exceed `limit`."""
    found: dict[str, Any] = {r: {} for r in rows}
    bar = tqdm(total=len(names) * len(rows), desc="scaling", unit="model")
    for name in names:
        layers, width = SHAPES[name]
        fresh = make(layers, width, TOGETHER, seed=1)
        for row in rows:
            bar.set_postfix_str(f"{name} {row}")
            need = bytes_of(row, layers, width, stored)
            entry: dict[str, Any] = {"need_bytes": need}
            if need <= limit:
                try:
                    with capped(limit):
                        entry |= entry_of(row, layers, width, stored, fresh, repeats)
                except (MemoryError, RuntimeError) as error:
                    if not out_of_memory(error):
                        raise
                    entry["stopped_at_limit"] = True
            found[row][name] = entry
            bar.update()
        for entries in found.values():
            for formed in FORMED:
                theirs = found.get(formed, {}).get(name, {}).get("seconds")
                if theirs and "seconds" in entries[name]:
                    ratio = theirs / entries[name]["seconds"]
                    entries[name][f"times_faster_than_{formed}"] = _short(ratio)
    bar.close()
    return found


def _short(x: float) -> float:
    return float(f"{x:.4g}")


def _table(report: dict[str, Any], cell: Callable[[dict[str, Any]], str], rows: list[str]) -> list[str]:
    names = report["sizes"]
    lines = ["| model | " + " | ".join(names) + " |", "| --- |" + " --- |" * len(names)]
    return lines + [
        f"| {r} | " + " | ".join(cell(report["models"][r][n]) for n in names) + " |" for r in rows
    ]


def markdown(report: dict[str, Any]) -> str:
    models, limit, stored = report["models"], report["limit_bytes"] / 1e9, report["stored"]
    rows = list(models)
    formed = [r for r in rows if r in FORMED]
    gb = 1e9

    def cell(key: str) -> Callable[[dict[str, Any]], str]:
        def text(e: dict[str, Any]) -> str:
            if "seconds" not in e and e.get("stopped_at_limit"):
                return "out of memory (stopped)"
            if "seconds" not in e:
                return f"out of memory ({e['need_bytes'] / gb:.3g} GB)"
            return f"{1e3 * e[key]:.3g}" if key in e else ""

        return text

    def memory(e: dict[str, Any]) -> str:
        if "held_bytes" not in e:
            return f"({e['need_bytes'] / gb:.3g})"
        peak_ = e["peak_bytes"]
        return f"{e['held_bytes'] / gb:.2g} / {'?' if peak_ is None else f'{peak_ / gb:.2g}'}"

    def ratio(e: dict[str, Any], against: str) -> str:
        found = e.get(f"times_faster_than_{against}")
        return "" if found is None else f"{found:.3g}"

    lines = [
        "# How reading scales",
        "",
        f"`{report['command']}`, one thread, float32, weights untrained. Milliseconds to read one LoRA of rank 4, one "
        f"square matrix a layer, of a GPT-3 family. kernel, gp, dense and dsire keep {stored} LoRAs here, not the "
        f"{LORAS:,} of the table, and their time grows with that number: the last table has it by stored LoRA. The "
        "others are as large as in the table. `dense_formed` multiplies delta W out and has a hidden layer of "
        f"{HIDDEN}, `dense_formed_linear` none. Where more than {limit:g} GB would be needed, nothing was run, and "
        "the gigabytes are given: that says what this limit rules out, not what a larger machine could do. `ours` "
        "runs every member its fit makes, which includes the readout of the size of delta W only up to "
        f"{ours.READOUT:,} numbers: at 125M and not beyond. Single times of two runs on a shared machine can "
        "differ by a factor of two; read the figures by their order of size.",
        "",
        "![time against size](scaling.png)",
        "",
        *_table(report, cell("seconds"), rows),
        "",
        f"A LoRA, when {TOGETHER} are read at once, milliseconds:",
        "",
        *_table(report, cell("seconds_together"), [r for r in rows if r not in FORMED]),
        "",
        "Gigabytes that the reader holds / that setting it up and reading took at most (what it would need):",
        "",
        *_table(report, memory, rows),
    ]
    for f in formed:
        lines += [
            "",
            f"Times faster than `{f}`, where that was measured (below 1: slower):",
            "",
            *_table(report, functools.partial(ratio, against=f), [r for r in rows if r not in FORMED]),
        ]
    keeps = [r for r in rows if r in KEEPS]
    if keeps:
        lines += [
            "",
            "Milliseconds by stored LoRA (the first table's, divided by the number stored):",
            "",
            *_table(report, cell("seconds_a_stored_lora"), keeps),
        ]
    return "\n".join(lines) + "\n"


def plot(report: dict[str, Any]) -> bytes:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9.5, 5.6), layout="constrained")
    for k, (model, each) in enumerate(report["models"].items()):
        points = [(parameters(n), e["seconds"]) for n, e in each.items() if "seconds" in e]
        if not points:
            continue
        axis.plot(
            *zip(*points, strict=True), label=model, marker="os^vDPX"[k % 7], markersize=4,
            color="#c8102e" if model == "ours" else f"C{k % 10}", linewidth=2.4 if model == "ours" else 1,
            linestyle="--" if model in FORMED else "-",
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
    parser.add_argument("--stored", type=int, default=32, help="LoRAs that kernel, gp, dense and dsire keep")
    parser.add_argument("--limit", type=float, default=6e9, help="bytes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="the two smallest sizes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    names = list(SHAPES)[:2] if args.quick else list(SHAPES)
    report = {
        "command": f"python -m train.scaling_bench{' --quick' if args.quick else ''}",
        "sizes": names,
        "stored": args.stored,
        "limit_bytes": args.limit,
        "models": measure(names, [*ROWS, *FORMED], args.stored, args.limit, args.repeats),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    write_file(args.out / "scaling.json", (json.dumps(report, indent=1) + "\n").encode())
    write_file(args.out / "scaling.md", markdown(report).encode())
    write_file(args.out / "scaling.png", plot(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
