"""Put the trained base model into checkpoints/: half precision, stock layout, with its CLIP.

    python -m train.base_ship --run runs/tiny-sd --out checkpoints/tiny-sd

Everything downstream (LoRAs, scores) is measured on these rounded weights, loaded in float32.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

from transformers import CLIPModel

from lolgen.quiet import load_stock_pipeline


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/tiny-sd"))
    parser.add_argument("--out", type=Path, default=Path("checkpoints/tiny-sd"))
    args = parser.parse_args()
    staged = args.out.with_name(f".{args.out.name}.tmp")
    shutil.rmtree(staged, ignore_errors=True)
    pipe = load_stock_pipeline(str(args.run))
    for part in (pipe.unet, pipe.vae, pipe.text_encoder):
        part.half()
    # diffusers loads its parts in float32 unless told otherwise, transformers in the file's own type: what a plain
    # `from_pretrained` puts together must agree.
    pipe.text_encoder.float()
    pipe.save_pretrained(staged)
    CLIPModel.from_pretrained(args.run / "clip").half().save_pretrained(staged / "clip")
    shutil.rmtree(args.out, ignore_errors=True)
    staged.rename(args.out)
    size = sum(p.stat().st_size for p in args.out.rglob("*") if p.is_file())
    print(f"{args.out}: {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
