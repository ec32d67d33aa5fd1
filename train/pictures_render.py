"""Render the training pictures once: portraits of the train split, and the ten styles.

    python -m train.pictures_render --out runs/pictures            # 48,000 + 10 x 1,500, about 3 min on 2 cores
    python -m train.pictures_render --out runs/smoke --portraits 200 --styles 10

Each shard is a safetensors file with `pixels` (N, 3, 32, 32) uint8, `labels` (N, 6) int8 (-1: not visible;
-2 for style pictures) and `style` (N,) int8 (-1 for portraits). A shard is a function of its number alone,
so a killed run goes on with the shards that are missing.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from lolgen import pictures
from train.state import load_tensors, save_tensors

SHARD = 1000


def render_portraits(path: Path, shard: int, split: str, count: int) -> Path:
    rng = np.random.default_rng([7, shard, {"train": 0, "validation": 1, "test": 2}[split]])
    pixels, labels = [], []
    for _ in range(count):
        identity = pictures.sample_identity(rng, split)
        pixels.append(pictures.draw_portrait(identity, rng))
        labels.append(pictures.labels(identity.attributes))
    save(path, pixels, np.array(labels), np.full(count, -1))
    return path


def render_style(path: Path, style: int, shard: int, count: int) -> Path:
    rng = np.random.default_rng([11, shard, style])
    pixels = [pictures.draw_style(style, rng) for _ in range(count)]
    save(path, pixels, np.full((count, len(pictures.ATTRIBUTES)), -2), np.full(count, style))
    return path


def save(path: Path, pixels: list[np.ndarray], labels: np.ndarray, style: np.ndarray) -> None:
    tensors = {
        "pixels": torch.from_numpy(np.stack(pixels)),
        "labels": torch.from_numpy(labels.astype(np.int8)),
        "style": torch.from_numpy(style.astype(np.int8)),
    }
    save_tensors(path, tensors, {})


def load_pictures(folder: Path, pattern: str = "*.safetensors") -> dict[str, torch.Tensor]:
    """All shards whose names match, concatenated."""
    shards = [load_tensors(p)[0] for p in sorted(folder.glob(pattern))]
    if not shards:
        raise SystemExit(
            f"no pictures in {folder}: run `python -m train.pictures_render --out {folder}` first"
        )
    return {k: torch.cat([s[k] for s in shards]) for k in shards[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("runs/pictures"))
    parser.add_argument("--portraits", type=int, default=48_000)
    parser.add_argument("--styles", type=int, default=1_500, help="pictures per style")
    parser.add_argument("--heldout", type=int, default=2_000, help="portraits of each of validation and test")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    jobs: list[tuple[Callable[..., Path], tuple[Any, ...]]] = []
    counts = {"train": args.portraits, "validation": args.heldout, "test": args.heldout}
    for split, total in counts.items():
        for i, start in enumerate(range(0, total, SHARD)):
            path = args.out / f"portraits-{split}-{i:04d}.safetensors"
            jobs.append((render_portraits, (path, i, split, min(SHARD, total - start))))
    for style in range(len(pictures.STYLES)):
        for i, start in enumerate(range(0, args.styles, SHARD)):
            path = args.out / f"styles-{style}-{i:04d}.safetensors"
            jobs.append((render_style, (path, style, i, min(SHARD, args.styles - start))))
    todo = [(f, a) for f, a in jobs if not a[0].exists()]
    with ProcessPoolExecutor(args.workers) as pool:
        futures = [pool.submit(f, *a) for f, a in todo]
        for future in tqdm(futures, unit="shard"):
            future.result()


if __name__ == "__main__":
    main()
