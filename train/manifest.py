"""Write checkpoints/manifest.json: every shipped file with its size and sha256, the recipe and the scores behind it.

python -m train.manifest            # write
python -m train.manifest --check    # verify; exit code 1 names the first file that differs
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

from lolgen.io import atomic
from lolgen.paths import checkpoints_dir

NAME = "manifest.json"
MADE_BY: dict[str, dict[str, Any]] = {
    "tiny-sd": {
        "stages": ["pictures_render", "vae_train", "clip_train", "base_train", "base_ship"],
        "scores": "base.json",
    },
    "probe.safetensors": {"stages": ["probe_train"], "scores": "base.json"},
    "selector.safetensors": {"stages": ["probe_train --recipe selector --seed 1"]},
    "faces": {"stages": ["generator_train", "generator_tune", "predictor_train"], "scores": "generate.json"},
    "zoos/faces": {"stages": ["zoo_build", "clip_labels"], "scores": "zoo_gate.json"},
    "zoos/styles": {"stages": ["zoo_build --recipe styles"], "scores": "styles_gate.json"},
    "zoos/faces-fresh": {"stages": ["zoo_build --recipe fresh"]},
    "tiny-sd-further": {"stages": ["base_further"]},
    "zoos/faces-further": {"stages": ["zoo_build --recipe further --base checkpoints/tiny-sd-further"]},
    "predictors": {"stages": ["predictors_train"]},
    "tiny-lm": {"stages": ["lm_train"], "scores": "speeches_gate.json"},
    "zoos/speeches": {"stages": ["zoo_build --recipe speeches"], "scores": "speeches_gate.json"},
    "speeches": {"stages": ["speeches_train"], "scores": "speeches.json"},
    "speeches/editor.json": {"stages": ["speeches_edit_tune"], "scores": "speeches_edit.json"},
    "speeches/text.safetensors": {"stages": ["text_fit"], "scores": "text_map.json"},
}


def files_of(root: Path) -> dict[str, dict[str, Any]]:
    """Relative path -> size in bytes and sha256, the manifest itself left out."""
    found = {}
    for path in sorted(p for p in root.rglob("*") if p.is_file() and p.name != NAME):
        data = path.read_bytes()
        found[path.relative_to(root).as_posix()] = {
            "bytes": len(data),
            "sha256": hashlib.sha256(data).hexdigest(),
        }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--reports", type=Path, default=Path("reports"))
    args = parser.parse_args()
    root = checkpoints_dir()
    found = files_of(root)
    if args.check:
        recorded = json.loads((root / NAME).read_text("utf-8"))["files"]
        for name in sorted({*found, *recorded}):
            if found.get(name) != recorded.get(name):
                sys.exit(f"{name}: found {found.get(name)}, the manifest says {recorded.get(name)}")
        print(f"{len(found)} files as the manifest says")
        return
    made = {}
    for name, how in MADE_BY.items():
        entry: dict[str, Any] = {"stages": [f"python -m train.{s}" for s in how["stages"]]}
        report = args.reports / str(how.get("scores", ""))
        if report.is_file():
            entry["scores"] = json.loads(report.read_text("utf-8"))
        made[name] = entry
    text = json.dumps({"models": made, "files": found}, indent=1) + "\n"
    atomic.write_file(root / NAME, text.encode())
    print(f"{len(found)} files, {sum(f['bytes'] for f in found.values()) / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
