"""The gate of a zoo, two-sided: each LoRA loaded through stock diffusers must draw its identity, and only when called.

    python -m train.zoo_gate --count 240 --out reports            # zoo_gate.json, zoo_gate.png; about 3 min

On the trigger prompt the probe must read the identity's own attributes (mean accuracy 0.90 at least, or 0.97 of what
the base reaches when the attributes are spelled out, if that is lower). On plain prompts ("a person") the pictures must
stay the base's: there the same reading is compared with the base's own under the same noise.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lolgen import pictures, preview
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.probe import Probe, mean_accuracy
from lolgen.zoo.zoo import Zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--zoo", type=Path, default=None)
    parser.add_argument("--split", default="test")
    parser.add_argument("--count", type=int, default=240)
    parser.add_argument(
        "--ranks", type=int, nargs="*", default=[1, 2, 8, 16, 32], help="further ranks, 20 LoRAs each"
    )
    parser.add_argument("--out", type=Path, default=Path("reports"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    zoo = Zoo.open(args.zoo or zoos_dir() / "faces")
    probe = Probe.load(checkpoints_dir() / "probe.safetensors")
    pipe = preview.load_pipeline(checkpoints_dir() / "tiny-sd")
    seeds = [0, 1, 2, 3]
    plain = pictures.caption({}, "a person")
    of_base = preview.draw(pipe, [plain], seeds) * 2 - 1
    report: dict[str, Any] = {
        "command": f"python -m train.zoo_gate --split {args.split} --count {args.count}"
    }
    sheet = []
    for rank in [4, *args.ranks]:
        rows = zoo.split(args.split if rank == 4 else "test", rank)
        rows = Zoo(rows.folder, rows.info, rows.rows[: args.count if rank == 4 else 20])
        loras = rows.load().unstack()
        called, quiet, labels, strong = [], [], [], []
        for row, lora in tqdm(
            zip(rows, loras, strict=True), total=len(rows), desc=f"rank {rank}", mininterval=5
        ):
            preview.attach(pipe, lora)
            images = (
                preview.draw(pipe, [pictures.caption({}, row["recipe"]["subject"]), plain], seeds) * 2 - 1
            )
            pipe.unload_lora_weights()
            called.append(images[:4])
            quiet.append(images[4:])
            labels.append(row["labels"])
            strong.append(row["recipe"]["lr"] * row["recipe"]["steps"])
        target = torch.tensor(labels).repeat_interleave(4, 0)
        on, off = torch.cat(called), torch.cat(quiet)
        base_read = probe.read(of_base).repeat(len(labels), 1)
        right = (probe.read(on) == target).float() * (target >= 0)
        each = (right.sum(1) / (target >= 0).sum(1)).view(-1, 4).mean(1)
        figures = {
            "loras": len(labels),
            "trigger_accuracy": round(mean_accuracy(probe.read(on), target), 4),
            "plain_accuracy": round(mean_accuracy(probe.read(off), target), 4),
            "base_accuracy": round(mean_accuracy(base_read, target), 4),
            "plain_agrees_with_base": round(float((probe.read(off) == base_read).float().mean()), 4),
        }
        if rank == 4:
            order = np.argsort(strong)
            for name, part in (
                ("weakest_quarter", order[: len(order) // 4]),
                ("strongest_quarter", order[-len(order) // 4 :]),
            ):
                figures[name] = round(float(each[torch.from_numpy(part.copy())].mean()), 4)
            for k in range(min(12, len(labels))):
                identity = pictures.Identity.from_json(rows.rows[k]["identity"])
                drawn = pictures.draw_portrait(identity, np.random.default_rng(k))
                sheet.append(
                    torch.cat([torch.from_numpy(drawn)[None].float() / 127.5 - 1, called[k], quiet[k][:3]])
                )
        report[f"rank_{rank}"] = figures
        print(rank, figures, flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "zoo_gate.json").write_text(json.dumps(report, indent=1) + "\n")
    preview.save_image(preview.grid(torch.cat(sheet) / 2 + 0.5, 16, 2), args.out / "zoo_gate.png")


if __name__ == "__main__":
    main()
