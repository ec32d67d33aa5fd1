"""Measure tiny-sd: what the probe reads from its pictures, its reconstructions, its CLIP score; and show them.

    python -m train.base_eval --base checkpoints/tiny-sd --out reports      # base.json, base.png
    python -m train.base_eval --state runs/state/base.safetensors --count 96  # a look while the base trains

Captions are full and of the test split: no portrait with that combination of attributes was seen in training.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lolgen import pictures, preview
from lolgen.base import Base
from lolgen.paths import checkpoints_dir
from lolgen.probe import Probe, accuracy, mean_accuracy


def clip_scores(clip: Any, tokenizer: Any, images: Tensor, prompts: list[str]) -> Tensor:
    """Cosine of picture (in [-1, 1]) and caption under the embedded CLIP, (N,)."""
    ids = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        out = clip(input_ids=ids, pixel_values=images)
    return (out.text_embeds * out.image_embeds).sum(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--base", type=Path, default=None, help="pipeline folder (default: the shipped one)")
    parser.add_argument("--clip", type=Path, default=None)
    parser.add_argument("--state", type=Path, help="a training state, to look at its moving average")
    parser.add_argument("--count", type=int, default=400)
    parser.add_argument("--guidance", type=float, nargs="*", default=[1.0, 2.0, 3.0, 4.0])
    parser.add_argument("--out", type=Path, help="folder for base.json and base.png")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rng = np.random.default_rng(123)
    people = [pictures.sample_identity(rng, "test") for _ in range(args.count)]
    pixels = torch.from_numpy(np.stack([pictures.draw_portrait(p, rng) for p in people])).float() / 127.5 - 1
    labels = torch.tensor([pictures.labels(p.attributes) for p in people])
    prompts = [
        pictures.caption({n: v for n, v in p.attributes.items() if pictures.visible(p.attributes, n)})
        for p in people
    ]
    folder = args.base or (Path("runs/tiny-sd") if args.state else checkpoints_dir() / "tiny-sd")
    probe = Probe.load(checkpoints_dir() / "probe.safetensors")
    base = _from_state(folder, args.state) if args.state else Base.load(folder)
    report: dict[str, Any] = {"count": args.count, "steps": preview.STEPS, "captions": "full, test split"}
    styles = [pictures.style_caption(i) for i in range(10) for _ in range(10)]
    for guidance in args.guidance:
        g = torch.Generator().manual_seed(0)
        drawn = base.decode(base.sample(base.text(prompts), g, preview.STEPS, guidance))
        each = accuracy(probe.read(drawn), labels)
        row: dict[str, Any] = {"probe_accuracy": round(mean_accuracy(probe.read(drawn), labels), 4)}
        row |= {n: round(float(v), 4) for n, v in zip(pictures.ATTRIBUTES, each, strict=True)}
        drawn_styles = base.decode(base.sample(base.text(styles), g, preview.STEPS, guidance))
        kinds = probe(drawn_styles)["kind"].argmax(-1) - 1
        row["style_accuracy"] = round(
            float((kinds == torch.arange(10).repeat_interleave(10)).float().mean()), 4
        )
        report[f"guidance_{guidance:g}"] = row
        print(guidance, row, flush=True)
        if guidance == preview.GUIDANCE:
            keep, keep_styles = drawn, drawn_styles
    pairs = base.decode(base.encode(((pixels + 1) * 127.5).round().byte()))
    report["reconstruction_accuracy"] = round(mean_accuracy(probe.read(pairs), labels), 4)
    report["rendered_accuracy"] = round(mean_accuracy(probe.read(pixels), labels), 4)
    if (args.clip or folder.parent / "clip").exists() or (folder / "clip").exists():
        from transformers import CLIPModel

        where = args.clip or (folder / "clip" if (folder / "clip").exists() else folder.parent / "clip")
        clip = CLIPModel.from_pretrained(where, local_files_only=True).eval()
        drawn_score = float(clip_scores(clip, base.tokenizer, keep, prompts).mean())
        real_score = float(clip_scores(clip, base.tokenizer, pixels, prompts).mean())
        report["clip_score"] = {"drawn": round(drawn_score, 4), "rendered": round(real_score, 4),
                                "ratio": round(drawn_score / real_score, 4)}  # fmt: skip
    print(json.dumps(report, indent=1))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "base.json").write_text(json.dumps(report, indent=1) + "\n")
        n = min(64, args.count)
        sheet = torch.cat([keep[:n], keep_styles[::2]])
        preview.save_image(preview.grid(sheet / 2 + 0.5, 16, 2), args.out / "base.png")


def _from_state(folder: Path, state: Path) -> Base:
    from diffusers import AutoencoderKL
    from transformers import CLIPTextModel, CLIPTokenizer

    from train.base_train import RECIPES, build_scheduler, build_unet
    from train.state import load_tensors

    unet = build_unet(RECIPES["full"]["width"], 96)
    prefix = "model/ema/"
    unet.load_state_dict(
        {k[len(prefix) :]: v for k, v in load_tensors(state)[0].items() if k.startswith(prefix)}
    )
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    text = CLIPTextModel.from_pretrained(folder / "text_encoder")
    for part in (unet, vae, text):
        part.eval().requires_grad_(False)
    return Base(unet, vae, text, CLIPTokenizer.from_pretrained(folder / "tokenizer"), build_scheduler())


if __name__ == "__main__":
    main()
