"""The gate of the styles zoo: are pictures drawn with a LoRA of its own styles, and is everything else left alone?

    python -m train.styles_gate                      # 4 min on one core; reports/styles_gate.json, styles_gate.png

Pictures are drawn by stock diffusers with the adapter loaded as a file; the probe's second head, trained on rendered
pictures alone, says which style each is. LoRAs are of the test split, as many of each subset size as there are, at most
`--per-size`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from lolgen import pictures, preview
from lolgen.paths import checkpoints_dir, zoos_dir
from lolgen.probe import Probe
from lolgen.zoo.styles import SUBJECT
from lolgen.zoo.zoo import Zoo


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--zoo", type=Path, default=None)
    parser.add_argument("--per-size", type=int, default=12)
    parser.add_argument("--pictures", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("reports"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    zoo = Zoo.open(args.zoo or zoos_dir() / "styles").split("test")
    chosen = []
    for size in range(1, len(pictures.STYLES) + 1):
        same = sorted((r for r in zoo.rows if sum(r["labels"]) == size), key=lambda r: r["id"])
        chosen += same[:: max(1, len(same) // args.per_size)][: args.per_size]
    probe = Probe.load(checkpoints_dir() / "probe.safetensors")
    pipe = preview.load_pipeline(checkpoints_dir() / "tiny-sd")
    seeds = list(range(args.pictures))
    trigger, plain = pictures.caption({}, SUBJECT), pictures.caption({})

    def kinds(images: Tensor) -> list[int]:
        return (probe(images * 2 - 1)["kind"].argmax(1) - 1).tolist()

    of_base = kinds(preview.draw(pipe, [trigger], seeds))
    rows: list[dict[str, Any]] = []
    sheet: list[Tensor] = []
    loras = Zoo(zoo.folder, zoo.info, chosen).load().unstack()
    for row, lora in tqdm(zip(chosen, loras, strict=True), total=len(chosen), mininterval=5):
        subset = {s for s, bit in enumerate(row["labels"]) if bit}
        preview.attach(pipe, lora)
        words = [pictures.style_caption(s) for s in range(len(pictures.STYLES))]
        images = preview.draw(pipe, [trigger], seeds)
        others = preview.draw(pipe, [plain, *words], [0])
        pipe.unload_lora_weights()
        found, left = kinds(images), kinds(others)
        rows.append(
            {
                "id": row["id"],
                "size": len(subset),
                "within": sum(k in subset for k in found) / len(found),
                "covered": len(subset & set(found)) / min(len(subset), len(found)),
                "portraits_left": float(left[0] == -1),
                "style_words_left": sum(k == s for s, k in enumerate(left[1:])) / len(words),
                "chance": sum(k in subset for k in of_base) / len(of_base),
            }
        )
        if len(sheet) < 24 and row["id"].endswith("a"):
            sheet.append(images[:12])

    def mean(name: str, part: list[dict[str, Any]]) -> float:
        return round(sum(r[name] for r in part) / len(part), 4)

    names = ("within", "covered", "portraits_left", "style_words_left", "chance")
    report: dict[str, Any] = {
        "command": "python -m train.styles_gate",
        "loras": len(rows),
        "pictures_each": args.pictures,
        **{n: mean(n, rows) for n in names},
        "by_size": {
            str(size): {"loras": len(part)} | {n: mean(n, part) for n in names[:2]}
            for size in range(1, 11)
            if (part := [r for r in rows if r["size"] == size])
        },
    }
    print(json.dumps(report, indent=1))
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "styles_gate.json").write_text(json.dumps(report, indent=1) + "\n")
    preview.save_image(preview.grid(torch.cat(sheet), 12, 2), args.out / "styles_gate.png")


if __name__ == "__main__":
    main()
